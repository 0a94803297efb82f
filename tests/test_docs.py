"""What README and docs say is what happens: their commands are run, their output is compared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
_BLOCK = re.compile(r"^```(\w+)(?: title=\"([^\"]+)\")?\n(.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    kind: str
    title: str
    text: str


def blocks(path: Path) -> list[Block]:
    return [Block(*found) for found in _BLOCK.findall(path.read_text("utf-8"))]


def run(script: str, folder: Path) -> str:
    """The stdout of a shell script, which must not fail."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    env = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{script}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def plain(text: str) -> str:
    """Without what differs from run to run: the time it took."""
    return re.sub(r"\d+\.\d s, (?=torch|no tensor)", "0.0 s, ", text).rstrip()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """The tutorial, run as it stands: its folder, and what each ``sh`` block printed."""
    pytest.importorskip("torch")
    folder = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "sample_models", folder / "sample_models")
    printed: list[str] = []
    for block in blocks(ROOT / "docs" / "tutorial.md"):
        if block.kind == "python":
            (folder / block.title).write_text(block.text)
        elif block.kind == "sh":
            printed.append(run(block.text, folder))
        elif block.kind == "text":
            assert plain(printed[-1]) == plain(block.text)
        else:
            assert block.kind == "toml"
            assert block.text.strip() in (folder / "sample_models/transfer.toml").read_text()
    return folder, printed


def test_the_tutorial_runs_as_it_stands(story: tuple[Path, list[str]]) -> None:
    _, printed = story
    assert "layer2 has moved" in printed[-1]
    assert "layer3 has moved" in printed[-1]
    assert printed[-1].count("no difference") == 1  # layer2 before it thawed


def test_the_recipe_keeps_the_optimizer_in_step(story: tuple[Path, list[str]]) -> None:
    import torch

    folder, _ = story
    old = torch.load(folder / "sample_models/cnn-ddp.pt", weights_only=True)
    new = torch.load(folder / "backbone.pt", weights_only=True)
    fixed = ("running_mean", "running_var", "num_batches_tracked")
    before = [name for name in old["state_dict"] if not name.endswith(fixed)]
    after = [name for name in new["state_dict"] if not name.endswith(fixed)]
    assert new["optimizer"]["param_groups"][0]["params"] == list(range(len(after)))
    for i, name in enumerate(after):
        was = old["optimizer"]["state"][before.index("module." + name)]["momentum_buffer"]
        assert torch.equal(new["optimizer"]["state"][i]["momentum_buffer"], was)


def test_the_merged_checkpoint_resumes_in_torch(story: tuple[Path, list[str]]) -> None:
    import torch

    folder, _ = story
    ckpt = torch.load(folder / "resume.pt", weights_only=True)
    saved = torch.load(folder / "sample_models/layer3-adamw.pt", weights_only=True)
    assert ckpt["epoch"] == 4
    assert ckpt["lr"] == ckpt["optimizer"]["param_groups"][0]["lr"] == 1e-3
    assert ckpt["optimizer"]["state"].keys() == saved["state"].keys()
    for id_, state in saved["state"].items():
        assert torch.equal(ckpt["optimizer"]["state"][id_]["exp_avg"], state["exp_avg"])


def test_the_frozen_part_never_moved_and_the_rest_did(story: tuple[Path, list[str]]) -> None:
    import torch

    folder, _ = story
    start = torch.load(folder / "resume.pt", weights_only=True)["state_dict"]
    end = torch.load(folder / "run/last.pt", weights_only=True)["model"]
    moved = {name for name, value in start.items() if not torch.equal(value, end[name])}
    assert {name.partition(".")[0] for name in moved} == {"layer2", "layer3"}
    assert {name for name in start if name.startswith(("layer2", "layer3"))} == moved
    assert end["fc.weight"].shape == (5, 32)


def test_the_readme_shows_what_summary_prints(tmp_path: Path) -> None:
    first = next(block for block in blocks(ROOT / "README.md") if block.kind == "text")
    printed = run("modelctl summary sample_models/cnn-ddp.pt", ROOT)
    assert plain(printed) == plain(first.text)


def test_the_readme_shows_what_is_printed_of_a_known_model(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from modelctl.inspection.architectures import index as architectures

    known = architectures.find_architecture("torchvision:resnet18")
    shapes = architectures.shapes(known, classes=10)
    state = {f"module.{name}": torch.zeros(shape) for name, shape in shapes.items()}
    torch.save(state, tmp_path / "cats.pt")
    shown = "".join(block.text for block in blocks(ROOT / "README.md") if block.kind == "console")
    commands = [line[2:] for line in shown.splitlines() if line.startswith("$ ")]
    printed = [f"$ {command}\n{run(f'{command} || true', tmp_path)}" for command in commands]
    assert plain("".join(printed)) == plain(shown)


def test_the_readme_python_runs(tmp_path: Path) -> None:
    code = next(block for block in blocks(ROOT / "README.md") if block.kind == "python")
    shutil.copytree(ROOT / "sample_models", tmp_path / "sample_models")
    (tmp_path / "example.py").write_text(code.text)
    run("python example.py && modelctl ls backbone.pt", tmp_path)


def test_ci_runs_what_the_readme_says() -> None:
    commands = [
        line
        for block in blocks(ROOT / "README.md")
        if block.kind == "sh"
        for line in block.text.strip().splitlines()
    ]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert commands == [line for line in script if line in commands]


def test_ci_has_the_oldest_torch_that_is_claimed() -> None:
    extras = re.search(r"^torch = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    vision = re.search(r"^vision = \[(.*)\]$", (ROOT / "pyproject.toml").read_text(), re.M)
    assert extras is not None
    assert vision is not None
    claimed = dict(re.findall(r"\"(\w+)>=(\d+\.\d+)", extras[1] + vision[1]))
    script = (ROOT / ".ci/run").read_text()
    for name in ("torch", "torchvision"):
        assert f"'{name}=={claimed[name]}.*'" in script
    assert f"torch {claimed['torch']} or later" in " ".join(
        (ROOT / "README.md").read_text().split()
    )


def test_the_reference_of_the_commands_is_up_to_date() -> None:
    spec = spec_from_file_location("make_cli", ROOT / "docs/make_cli.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.page()
    assert made == (ROOT / "docs/cli.md").read_text("utf-8"), "run: python docs/make_cli.py"


def test_the_samples_are_what_the_script_makes(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    for name in ("make.py", "small_cnn.py"):
        shutil.copy(ROOT / "sample_models" / name, tmp_path)
    run("python make.py", tmp_path)
    made = torch.load(tmp_path / "cnn-ddp.pt", weights_only=True)
    kept = torch.load(ROOT / "sample_models/cnn-ddp.pt", weights_only=True)
    assert made.keys() == kept.keys()
    assert list(made["state_dict"]) == list(kept["state_dict"])
    for name, value in kept["state_dict"].items():
        # another processor rounds otherwise: near, not equal
        assert torch.allclose(made["state_dict"][name], value, rtol=1e-2, atol=1e-3), name
