"""DeepSpeed's folders that are not whole, mixed, or lie: refused by name, whatever they hold."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.tree import path_text, walk
from modelctl.errors import DamagedError, ModelctlError, UnreadableError, UnsupportedError

torch = pytest.importorskip("torch")

from . import deepspeed as ds  # noqa: E402

MODEL = "mp_rank_00_model_states.pt"
OPTIMIZER = "bf16_zero_pp_rank_{}_mp_rank_00_optim_states.pt"


@pytest.fixture(params=[2, 3])
def stage(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def folder(tmp_path: Path, stage: int) -> Path:
    return ds.save(tmp_path / "run", ds.trained(), ds.Layout(stage, 2))


def change(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Change what a file holds."""
    with ds.deepspeed():
        root = torch.load(path, weights_only=False)
        edit(root)
        torch.save(root, path)


def model(folder: Path, stage: int, rank: int = 0) -> Path:
    return folder / ds.TAG / (f"zero_pp_rank_{rank}_{MODEL}" if stage == 3 else MODEL)


def optimizer(folder: Path, rank: int = 0) -> Path:
    return folder / ds.TAG / OPTIMIZER.format(rank)


def refused(folder: Path, match: str) -> ModelctlError:
    with pytest.raises(ModelctlError, match=match) as e:
        mc.open(folder)
    assert folder.name in str(e.value)
    return e.value


def test_a_rank_is_missing(folder):
    optimizer(folder, 0).unlink()
    assert "all ranks" in (refused(folder, "the file of rank 0 is missing beside bf16_").hint or "")


def test_the_last_rank_is_missing(folder):
    optimizer(folder, 1).unlink()
    refused(folder, "2 ranks saved it, 1 file here")


def test_a_model_s_file_of_a_rank_is_missing(tmp_path):
    folder = ds.save(tmp_path / "run", ds.trained(), ds.Layout(3, 2))
    model(folder, 3, 1).unlink()
    refused(folder, "1 file of model states beside 2 of the optimizer")


def test_files_of_two_saves(tmp_path):
    folder = ds.save(tmp_path / "run", ds.trained(), ds.Layout(3, 2))
    change(model(folder, 3, 1), lambda root: root.update(global_steps=3))
    refused(folder, "files of different saves: global_steps 2, 3")


def test_a_rank_of_the_optimizer_of_another_save(tmp_path, stage):
    """Of the same model, some steps later: all shapes are the same."""
    folder = ds.save(tmp_path / "run", ds.trained(), ds.Layout(stage, 2))
    later = ds.save(tmp_path / "later", ds.trained(5), ds.Layout(stage, 2))
    shutil.copy(optimizer(later, 1), optimizer(folder, 1))
    refused(folder, "files of different saves: the optimizer's step is 2, 5")


def test_two_saves_in_one_folder(folder):
    other = optimizer(folder).with_name(optimizer(folder).name.removeprefix("bf16_"))
    shutil.copy(optimizer(folder), other)
    refused(folder, "two saves in one folder: bf16_zero_pp_rank_0.* and zero_pp_rank_0")


@pytest.mark.parametrize("of", [model, optimizer])
def test_a_file_that_is_cut_off_is_named(folder, stage, of):
    path = of(folder, stage) if of is model else of(folder)
    path.write_bytes(path.read_bytes()[:-100])
    refused(folder, path.name)


def test_without_the_optimizer_s_files(folder, stage):
    """Stage 3 has no weights then; the others have those that it trained with, and say so."""
    for rank in (0, 1):
        optimizer(folder, rank).unlink()
    if stage == 3:
        refused(folder, r"the files with its weights, …_optim_states.pt, are missing")
        return
    with mc.open(folder) as ckpt:
        assert ckpt.state_dict()["a.weight"].dtype.name == "bfloat16"
        assert any("files of its optimizer are missing" in one.text for one in ckpt.warnings)


@pytest.mark.parametrize(
    "name", ["mp_rank_01_model_states.pt", "layer_01-model_00-model_states.pt"]
)
def test_several_model_ranks_and_layers_are_told(folder, stage, name):
    if stage == 3:
        name = name.replace("01-model_00-", "0_expert_1_mp_rank_00_")
    shutil.copy(model(folder, stage), folder / ds.TAG / name)
    assert isinstance(refused(folder, "not joined yet"), UnsupportedError)


@pytest.mark.parametrize("shape", [(36, 5), (10**12, 10**6), (1 << 59,) * 60, (70, 5)])
def test_a_shape_that_lies(folder, stage, shape):
    def edit(root: dict[str, Any]) -> None:
        root["param_shapes"][1]["bn.bias"] = torch.Size(shape)

    change(model(folder, stage), edit)
    refused(folder, r"'bn.bias' of \[.*missing")


@pytest.mark.parametrize("shape", [(-1, 5), "x", 7, (1.5,), ((1,),), (1 << 61,), (10**5000,)])
def test_a_shape_that_is_none(folder, stage, shape):
    change(model(folder, stage), lambda root: root["param_shapes"][1].update({"bn.bias": shape}))
    refused(folder, "a size that is none|integer|digits")


def test_a_parameter_that_is_not_listed(folder, stage):
    """What is left over is more than what fills up."""
    change(model(folder, stage), lambda root: root["param_shapes"][0].popitem())
    refused(folder, "elements are left over behind the parameters of group 0")


FIELDS = [
    *((True, key) for key in ("module", "buffer_names", "param_shapes", "frozen_param_shapes")),
    *((True, key) for key in ("frozen_param_fragments", "shared_params", "global_steps")),
    *((True, key) for key in ("dp_world_size",)),
    *((False, key) for key in ("base_optimizer_state", "single_partition_of_fp32_groups")),
    *((False, key) for key in ("fp32_flat_groups", "optimizer_state_dict", "loss_scaler")),
    *((False, key) for key in ("zero_stage", "partition_count", "param_alignment_paddings")),
]
ODD: list[Any] = [
    None, 0, -1, 2**70, "x", [], [[]], [1], [None], [{}], [{"a": 1}], {}, {"a": 1}, {"a": []},
    {1: 2}, {"state": {}}, {"state": {0: 1}, "param_groups": [1, 2]}, [["a"], ["b"]],
    {"state": {"a": {}, 0: {}}, "param_groups": [{}, {}]}, [OrderedDict(), OrderedDict()],
    {"state": {0: {}, 5: {}, -3: {}}, "param_groups": [{}, {}]}, (1, [2]), [[-5, 3], [2]],
    {"state": {0: {"exp_avg": 3}, 1: {"exp_avg": []}}, "param_groups": [{}, {}]},
]  # fmt: skip


@pytest.mark.parametrize("of_model", [True, False])
def test_whatever_stands_in_a_field_there_is_no_other_error(tmp_path, folder, stage, of_model):
    path = model(folder, stage) if of_model else optimizer(folder)
    odd = [
        *ODD,
        torch.zeros(3, 4),
        [torch.zeros(2), torch.zeros(2, 2)],
        [torch.zeros(()), torch.zeros(())],
        {"frozen.weight": torch.zeros(2), "frozen.bias": torch.zeros(0)},
        {"a.weight": torch.zeros(2).expand(2, 2), ("b",): 1},
    ]
    with ds.deepspeed():
        whole = torch.load(path, weights_only=False)
        read, said = 0, set()
        for key in [key for is_model, key in FIELDS if is_model is of_model]:
            for value in odd:
                root = dict(whole)
                if of_model:
                    root[key] = value
                else:
                    root["optimizer_state_dict"] = root["optimizer_state_dict"] | {key: value}
                torch.save(root, path)
                try:
                    with mc.open(folder) as ckpt:
                        for ref in ckpt.tensors().values():
                            ref.tobytes()
                        read += 1
                except ModelctlError as e:
                    said.add(str(e).split(":")[0].split(",")[0])
        assert read  # what is not looked at may be anything
        assert said <= {str(folder), str(path)}


@pytest.mark.parametrize("says", ["..", ".", "/etc", "../run", "", "\0", "nothing", "x" * 5000])
def test_latest_that_names_what_is_no_folder_here(folder, says):
    (folder / "latest").write_text(says)
    with mc.open(folder / ds.TAG) as ckpt:
        assert ckpt.state_dict()
    with pytest.raises(ModelctlError, match="run"):
        mc.open(folder)


def test_latest_that_names_a_folder_that_is_gone(folder):
    shutil.move(folder / ds.TAG, folder.parent / "elsewhere")
    refused(folder, f"'latest' names '{ds.TAG}', which is not here")


def test_latest_that_is_a_folder_or_names_a_file(folder):
    (folder / "latest").write_text("latest")
    with pytest.raises(ModelctlError):
        mc.open(folder / "latest")
    (folder / "latest").unlink()
    (folder / "latest").mkdir()
    with pytest.raises(ModelctlError):
        mc.open(folder / "latest")
    with pytest.raises(ModelctlError, match="run"):
        mc.open(folder)


def test_links_out_of_the_folder_are_not_followed(folder, tmp_path):
    moved = tmp_path / "elsewhere.pt"
    shutil.move(optimizer(folder), moved)
    optimizer(folder).symlink_to(moved)
    assert "--follow-symlinks" in (refused(folder, "symbolic link").hint or "")


def test_an_optimizer_of_another_layout_is_left_out_and_that_is_said(folder, stage):
    key = "optimizer_state_dict" if stage == 3 else "base_optimizer_state"
    for rank in (0, 1):
        change(
            optimizer(folder, rank),
            lambda root: root["optimizer_state_dict"].update({key: [{"step": 1}]}),
        )
    with mc.open(folder) as ckpt:
        assert any("left out" in one.text for one in ckpt.warnings)
        assert "optimizer" not in ckpt.root


def test_a_summary_of_many_ranks_and_parameters_is_quick_and_small(tmp_path):
    names = [f"layers.{i}.weight" for i in range(500)]
    folder = tmp_path / "run"
    folder.mkdir()
    shapes = [OrderedDict((name, torch.Size((64, 3))) for name in names)]
    module = OrderedDict((name, torch.zeros(0)) for name in names)
    for rank in range(16):
        held = {"module": module, "param_shapes": shapes, "global_steps": 1, "buffer_names": []}
        torch.save(held, folder / f"zero_pp_rank_{rank}_{MODEL}")
        flat = torch.zeros(6000).split(60)
        moments = {i: {"step": 1, "exp_avg": one, "exp_avg_sq": one} for i, one in enumerate(flat)}
        fields = {
            "zero_stage": 3,
            "partition_count": 16,
            "fp32_flat_groups": list(flat),
            "optimizer_state_dict": {"state": moments, "param_groups": [{"lr": 1.0}]},
        }
        torch.save({"optimizer_state_dict": fields}, folder / OPTIMIZER.format(rank))
    # the peak that wait gives of a child would be this process's own
    code = (
        "import time\n"
        "from modelctl.cli import main\n"
        "try: main()\n"
        "finally: print(time.process_time(), open('/proc/self/status').read())"
    )
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc")
    found = subprocess.run(
        [sys.executable, "-c", code, "summary", str(folder)],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    assert "ZeRO-3, 16 ranks" in found
    assert float(found.split("Name:")[0].split()[-1]) < 2
    assert int(found.split("VmHWM:")[1].split()[0]) < 256 << 10


@pytest.fixture
def universal(tmp_path: Path, stage: int) -> Path:
    return ds.universal(tmp_path / "run", ds.trained(), ds.Layout(stage, 2))


def of_parameter(folder: Path, file: str, name: str = "a.bias") -> Path:
    return folder / ds.TAG / "zero" / name / file


def test_universal_without_a_parameter(universal):
    shutil.rmtree(of_parameter(universal, ""))
    refused(universal, "zero/'a.bias' is missing")


def test_universal_without_the_weights_of_one(universal):
    of_parameter(universal, "fp32.pt").unlink()
    refused(universal, "zero/'a.bias' has no weights in fp32.pt")


def test_universal_with_a_moment_of_another_shape(universal):
    torch.save(torch.zeros(3), of_parameter(universal, "exp_avg.pt"))
    refused(universal, r"zero/'a.bias': exp_avg is of \[3\], the weights of \[7\]")


def test_universal_without_its_options_leaves_the_optimizer_out(universal):
    of_parameter(universal, "", "optimizer_state.pt").unlink()
    with mc.open(universal) as ckpt:
        assert any("left out" in one.text for one in ckpt.warnings)


@pytest.mark.parametrize("value", [None, 3, [], {"param": 3}, {"param": {}}, torch.zeros(2, 2)])
@pytest.mark.parametrize("file", ["fp32.pt", "exp_avg.pt", "step.pt", "odd.pt"])
def test_universal_with_whatever_in_a_file(universal, file, value):
    torch.save(value, of_parameter(universal, file))
    said = "a.bias"
    try:
        with mc.open(universal) as ckpt:
            assert [ref.tobytes() for ref in ckpt.tensors().values()]
    except UnreadableError as e:
        said = e.message
    assert "a.bias" in said


def test_universal_of_more_parameters_than_files_may_be_open(universal):
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = max(int(one.name) for one in Path("/dev/fd").iterdir()) + 8
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        with mc.open(universal) as ckpt:
            assert all(ref.tobytes() for ref in ckpt.state_dict().values())
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_latest_of_others_is_none_of_ours(tmp_path):
    """A link to the newest file or folder, as many trainings keep it."""
    torch.save({"w": torch.ones(2)}, tmp_path / "last.pt")
    (tmp_path / "elsewhere").mkdir()
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(tmp_path / "last.pt", run / "last.pt")
    for target in ("last.pt", str(tmp_path / "last.pt"), str(tmp_path / "elsewhere"), "gone"):
        (run / "latest").symlink_to(target)
        with mc.open(run) as ckpt:
            assert ckpt["w"].shape == (2,)
        (run / "latest").unlink()
    (run / "latest").write_text("step")
    (run / "step").symlink_to(tmp_path / "elsewhere")
    with mc.open(run) as ckpt:
        assert ckpt["w"].shape == (2,)


def test_a_save_that_is_a_link_out_of_the_folder_is_not_followed(folder, tmp_path):
    shutil.move(folder / ds.TAG, tmp_path / "elsewhere")
    (folder / ds.TAG).symlink_to(tmp_path / "elsewhere")
    assert "--follow-symlinks" in (refused(folder, "symbolic link").hint or "")
    with mc.open(folder, follow_symlinks=True) as ckpt:
        assert ckpt.state_dict()


@pytest.mark.parametrize("what", ["missing", "shape"])
def test_the_command_ends_with_2_and_says_why(folder, stage, what):
    if what == "missing":
        optimizer(folder, 0).unlink()
    else:
        huge = torch.Size((1 << 30, 1 << 30))
        change(model(folder, stage), lambda root: root["param_shapes"][1].update({"one": huge}))
    done = subprocess.run(
        [sys.executable, "-m", "modelctl", "summary", str(folder)], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert str(folder) in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("to", ["torch", "dcp"])
@pytest.mark.parametrize("name", ["module.a.weight", "optimizer.state.0.exp_avg"])
def test_a_flipped_bit_of_a_flat_group_is_seen(folder, name, to, tmp_path):
    """Where the bytes go into files of torch's, whose checksums are others."""
    with mc.open(folder) as ckpt:
        refs = {path_text(path): node for path, node in walk(ckpt.root)}
        runs = refs[name].storage.runs()
    assert runs is not None
    path = Path(runs[-1].source.name)
    data = bytearray(path.read_bytes())
    data[runs[-1].offset + 1] ^= 8
    path.write_bytes(data)
    with pytest.raises(DamagedError) as e, mc.open(folder) as ckpt:
        mc.save(ckpt, tmp_path / "out", to=to)
    assert str(path) in str(e.value)
    assert not (tmp_path / "out").exists()
