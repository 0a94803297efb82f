"""What ranks of torch wrote, read without torch: equal to what torch makes of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import modelctl as mc
from modelctl.core.tensors import TensorRef

torch = pytest.importorskip("torch")

WORLDS = [1, 2, 4]


def flat(value: Any, at: str = "") -> dict[str, Any]:
    """Tensors and values by their paths, with keys as text: as torch flattens them."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list | tuple)
        and any(isinstance(v, torch.Tensor | dict) for v in value)
        else None
    )
    if inner is None:
        return {at: value}
    return {k: v for key, one in inner for k, v in flat(one, f"{at}/{key}").items()}


def check(found: Any, expected: Any) -> None:
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, TensorRef)
        assert found.shape == tuple(expected.shape)
        assert torch.equal(found.torch(), expected)
        assert found.torch().dtype == expected.dtype
    else:
        assert found == expected


@pytest.mark.parametrize("world", WORLDS)
def test_a_folder_is_what_torch_makes_one_file_of(written, world):
    folder = written(world)
    expected = torch.load(folder / "dcp.pt", weights_only=False)
    with mc.open(folder / "dcp") as ckpt:
        found = flat(ckpt.root)
        assert found.keys() == flat(expected).keys()
        for path, value in flat(expected).items():
            check(found[path], value)
        assert not ckpt.findings
        assert ckpt.sections.kind == "training checkpoint"


@pytest.mark.parametrize("world", WORLDS[1:])
def test_files_of_ranks_are_joined(written, world):
    folder = written(world)
    expected = torch.load(folder / "whole.pt", weights_only=True)
    with mc.open(folder / "ranks") as ckpt:
        model = ckpt["model"]
        assert model.keys() == expected.keys()
        for name, value in expected.items():
            check(model[name], value)
        moments = ckpt["optim.state"]
        shapes = [
            ref.shape for name, ref in model.items() if name in dict(Net().named_parameters())
        ]
        assert [one["exp_avg"].shape for one in moments.values()] == shapes
        assert not ckpt.findings


@pytest.mark.parametrize("world", WORLDS)
def test_parts_in_safetensors_are_joined(written, world):
    folder = written(world)
    if not (folder / "parts").exists():
        pytest.skip("this torch has no writer of them")
    expected = torch.load(folder / "whole.pt", weights_only=True)
    with mc.open(folder / "parts") as ckpt:
        for name, ref in ckpt.state_dict().items():
            check(ref, expected[name])
        assert set(expected) >= set(ckpt.state_dict()) >= {"rows", "columns", "number"}


@pytest.mark.parametrize("what", ["dcp", "ranks", "parts"])
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_they_are_converted_to_one_file(written, tmp_path, what, suffix):
    source = written(4) / what
    if not source.exists():
        pytest.skip("this torch has no writer of them")
    from modelctl.surgery.convert import convert

    out = tmp_path / f"out{suffix}"
    with mc.open(source) as ckpt:
        part = ckpt if suffix == ".pt" else convert(ckpt, weights_only=True)
        mc.save(part, out)
        with mc.open(out) as again:
            before, after = part.tensors(), again.tensors()
            assert before.keys() == after.keys()
            for name, ref in before.items():
                assert after[name].spec == ref.spec
                assert after[name].tobytes() == ref.tobytes(), name
    if suffix == ".pt":
        torch.load(out, weights_only=True)


def test_nothing_of_torch_is_imported(written):
    import subprocess
    import sys

    folder: Path = written(2)
    code = (
        "import sys, modelctl as mc\n"
        "for name in sys.argv[1:]:\n"
        "    with mc.open(name) as ckpt: [ref.tobytes() for ref in ckpt.tensors().values()]\n"
        "assert 'torch' not in sys.modules"
    )
    paths = [str(folder / name) for name in ("dcp", "ranks")]
    subprocess.run([sys.executable, "-c", code, *paths], check=True)


def Net() -> Any:  # it is the net's class
    from .ranks import Net as Made

    return Made()
