"""What went wrong once, in the hands of somebody new to it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.core.nodes import ordered_dict
from modelctl.core.records import FREEZE, HISTORY, read_record

from .files import Cli, net, tensor, training, write

SAMPLES = Path(__file__).parents[2] / "sample_models"


def compiled(suffix: str) -> list[Path]:
    return sorted(SAMPLES.glob(f"*{suffix}"))


@pytest.mark.parametrize(
    "name", [path.name for path in SAMPLES.iterdir() if path.suffix in (".pt2", ".zip", ".gz")]
)
def test_an_archive_is_never_replaced_by_what_was_read_of_it(
    cli: Cli, tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    path.write_bytes((SAMPLES / name).read_bytes())
    before = path.read_bytes()
    for words in (("convert", path, "--in-place"), ("convert", path, "-o", tmp_path / "x.pt")):
        found = cli(*words)
        assert found.code == 2
        assert "would be lost" in found.err
    assert path.read_bytes() == before
    assert not (tmp_path / "x.pt").exists()


def test_torchscript_is_not_written_as_a_pickle(cli: Cli, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 3)), path)
    assert cli("convert", path, "--in-place").code == 2
    torch.jit.load(path)
    assert cli("convert", path, "--weights-only", "-o", tmp_path / "w.pt").code == 0
    assert list(torch.load(tmp_path / "w.pt", weights_only=True)) == ["weight", "bias"]


def test_a_whole_module_becomes_its_state_dict(cli: Cli, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    torch.save(model, tmp_path / "whole.pt")
    assert cli("convert", tmp_path / "whole.pt", "-o", tmp_path / "sd.pt").code == 0
    loaded = torch.load(tmp_path / "sd.pt", weights_only=True)
    assert list(loaded) == list(model.state_dict())
    model.load_state_dict(loaded)


def test_one_member_of_an_archive_is_picked_by_its_name(cli: Cli) -> None:
    archive = next(path for path in compiled(".zip"))
    with mc.open(archive) as ckpt:
        member = str(next(key for key in ckpt.root if str(key).startswith("policy.pth")))
        names = list(ckpt.root[member].entries)
    found = cli("ls", archive, "--key", member)
    assert (found.code, found.out.split()) == (0, names)


def test_tied_weights_freeze_together(tmp_path: Path) -> None:
    shared = tensor(4, 3)
    root = {"emb.weight": shared, "mid.weight": tensor(3, 3), "lm_head.weight": shared}
    with mc.open(write(tmp_path / "tied.pt", root)) as ckpt:
        frozen = mc.freeze(ckpt, "lm_head")
        record = read_record(frozen, FREEZE)
        assert record["frozen"] == ["emb.weight", "lm_head.weight"]
        assert frozen.notes[-1].text == "frozen: 1 of 2 parameters"
        totals = mc.summarize(frozen).totals
        assert (totals.trainable, totals.frozen) == (9, 12)
        assert read_record(mc.unfreeze(frozen, "emb"), FREEZE) is None


def test_renames_of_an_ema_copy_are_told(cli: Cli, tmp_path: Path) -> None:
    root = {"model": ordered_dict(net()), "ema": ordered_dict(net("module.")), "epoch": 1}
    found = cli("strip-prefix", write(tmp_path / "e.pt", root), "-o", tmp_path / "o.pt")
    assert f"EMA copy 'ema': {len(net())} renamed, 0 removed" in found.out


def test_a_name_that_begins_with_a_dot_is_no_wrappers(tmp_path: Path) -> None:
    with mc.open(write(tmp_path / "d.pt", {".lead": tensor(2), "b": tensor(2)})) as ckpt:
        assert list(mc.strip_prefix(ckpt).state_dict()) == [".lead", "b"]


def test_what_changes_nothing_writes_nothing(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", net())
    before = path.read_bytes()
    found = cli("strip-prefix", path, "--in-place")
    assert (found.code, path.read_bytes()) == (0, before)
    assert "nothing to write" in found.out
    assert cli("strip-prefix", path, "-o", tmp_path / "copy.pt").code == 0
    with mc.open(tmp_path / "copy.pt") as ckpt:
        assert read_record(ckpt, HISTORY) is None


def test_a_batch_is_looked_at_before_the_first_is_written(cli: Cli, tmp_path: Path) -> None:
    first = write(tmp_path / "a.pt", net("module."))
    before = first.read_bytes()
    found = cli("strip-prefix", first, tmp_path / "nothing.pt", "--in-place")
    assert found.code == 2
    assert first.read_bytes() == before


def test_json_of_several_files_is_one_document(cli: Cli, tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{name}.pt", net("module.")) for name in "ab"]
    found = json.loads(cli("strip-prefix", *paths, "--dry-run", "--format", "json").out)
    assert [one["source"] for one in found["files"]] == [str(path) for path in paths]


def test_a_dry_run_knows_that_the_folder_is_missing(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "m.pt", net("module."))
    found = cli("strip-prefix", path, "-o", tmp_path / "no" / "x.pt", "--dry-run")
    assert found.code == 2
    assert "no directory" in found.err


def test_set_does_not_swallow_a_section(cli: Cli, tmp_path: Path) -> None:
    path = write(tmp_path / "t.pt", training())
    found = cli("merge", "--model", path, "--set", "optimizer=3", "-o", tmp_path / "o.pt")
    assert found.code == 2
    assert "would replace" in found.err


def test_csv_is_for_programs(cli: Cli, tmp_path: Path) -> None:
    lines = cli("summary", write(tmp_path / "m.pt", net()), "--format", "csv").out.splitlines()
    assert lines[0] == "path,kind,repeat,tensors,params,buffers,bytes,trainable"
    assert all(cell.isdigit() for cell in lines[1].split(",")[2:7])


def test_the_help_of_recipes_shows_their_tables(cli: Cli) -> None:
    assert "[[edit]]" in cli("apply", "--help").out


@pytest.mark.skipif(os.name != "posix", reason="a shell")
@pytest.mark.parametrize("command", ["summary", "ls", "show"])
@pytest.mark.parametrize("end", [">&-", "| head -c 1 >/dev/null"])
def test_a_reader_that_leaves_early_is_no_finding(tmp_path: Path, command: str, end: str) -> None:
    names = {f"layers.{i}.weight": tensor(2) for i in range(3000)}
    write(tmp_path / "m.pt", names)
    depth = "--depth all --no-fold" if command == "summary" else ""
    script = f"set -o pipefail; {sys.executable} -m modelctl {command} m.pt {depth} {end}"
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_closed_checkpoint_says_so(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.ones(3072, 3072).t()}, tmp_path / "big.pt")
    with mc.open(tmp_path / "big.pt") as ckpt:
        ref = ckpt.state_dict()["w"]
    with pytest.raises(mc.ModelctlError, match="closed"):
        ref.tobytes()


def test_values_for_scripts_are_bare_numbers(cli: Cli, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    saved = {
        "best": np.float64(0.25),
        "count": np.int32(-7),
        "step": torch.tensor(12.0),
        "seen": torch.tensor([3]),
        "many": torch.zeros(2),
    }
    torch.save(saved, tmp_path / "c.pt")
    shown = {name: cli("show", tmp_path / "c.pt", name).out.strip() for name in saved}
    assert shown.pop("many") == "tensor f32 2"
    assert shown == {"best": "0.25", "count": "-7", "step": "12.0", "seen": "3"}


def test_the_lr_of_an_optimizer_may_be_numpys(cli: Cli, tmp_path: Path) -> None:
    np = pytest.importorskip("numpy")
    torch = pytest.importorskip("torch")
    optimizer = torch.optim.SGD(torch.nn.Linear(2, 2).parameters(), lr=np.float64(0.125))
    torch.save({"optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "c.pt")
    assert "lr 0.125" in cli("summary", tmp_path / "c.pt").out


def test_a_name_with_wildcards_in_it_can_be_named(cli: Cli, tmp_path: Path) -> None:
    write(tmp_path / "m.pt", {"star*.w[0]?": tensor(2), "b": tensor(2)})
    assert cli("ls", tmp_path / "m.pt", "star*.w[0]?").out == "star*.w[0]?\n"


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="signals of POSIX")
@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGINT"])
def test_a_request_to_end_leaves_nothing_behind(name: str, place: Path) -> None:
    write(place / "a.pt", net())
    number = getattr(signal, name)
    code = (
        "import os, signal, sys; from modelctl.cli import main; real = os.fsync\n"
        # a process in the background of a script is started deaf to it
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        f"os.fsync = lambda fd: os.kill(os.getpid(), {int(number)}) or real(fd)\n"
        "sys.argv = ['modelctl', 'add-prefix', 'a.pt', '--prefix', 'm', '-o', 'b.pt']; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stderr == "interrupted\n"
    assert done.returncode == (130 if name == "SIGINT" else 128 + number)
    assert os.listdir() == ["a.pt"]


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("import sys; sys.exit(2)", "importing 'bad.py' failed: SystemExit: 2"),
        ("def net(): raise SystemExit('no')", "bad.py:net can't be built: SystemExit: no"),
        (
            "import torch\nclass net(torch.nn.Module):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.fc = torch.nn.Linear(6, 5)\n"
            "    def forward(self, x): raise SystemExit(0)\n",
            "bad.py, line 6: ended the program (0)",
        ),
    ],
)
def test_who_ends_the_program_is_named(cli: Cli, flat: Path, code: str, said: str) -> None:
    pytest.importorskip("torch")
    Path("bad.py").write_text(code)
    done = cli("summary", flat, "--arch", "bad.py:net", "--input-size", "1,2")
    assert (done.code, done.out) == (2, "")
    assert said in done.err
    done = cli("summary", flat, "--arch", "bad.py:net", "--input-size", "1,2", "--json")
    assert done.code == 2
    assert said in json.loads(done.out)["error"]["message"]
