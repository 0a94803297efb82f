"""The example's format, by the suite that every format passes, and found as an installed one is."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelctl
from modelctl.errors import UnreadableError, UnsupportedError
from modelctl.formats import guests
from modelctl.testing import FormatSuite, Sample

EXAMPLE = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", autouse=True)
def path(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The package where an installer would put it, with its entry point; in this process and in
    those that it starts."""
    site = tmp_path_factory.mktemp("site")
    (site / "modelctl_npz.py").symlink_to(EXAMPLE / "modelctl_npz.py")
    info = site / "modelctl_npz-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: modelctl-npz\nVersion: 0.1.0\n")
    (info / "entry_points.txt").write_text(_entry_points())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        others = os.environ.get("PYTHONPATH", "")
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(site), others))))
        guests.third_party.cache_clear()
        yield site
    guests.third_party.cache_clear()


def _entry_points() -> str:
    """What an installer makes of the example's pyproject.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text("utf-8"))["project"]
    lines = []
    for group, points in project["entry-points"].items():
        lines.append(f"[{group}]")
        lines += [f"{name} = {value}" for name, value in points.items()]
    return "\n".join(lines) + "\n"


def arrays(width: int) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    return {
        "fc.weight": rng.normal(size=(width, width)).astype("f4"),
        "fc.bias": rng.normal(size=width),
        "turned": np.asfortranarray(rng.normal(size=(3, width))),
        "half": rng.normal(size=(4, 2)).astype("f2"),
        "mask": np.array([True, False]),
        "counter": np.array(7),
        "empty": np.zeros((0, 3), "i2"),
        "complex": np.array([1 + 2j, 3], "c8"),
    }


class TestNpz(FormatSuite):
    name, label = "npz", "npz"

    def make(self, folder: Path, width: int) -> Sample:
        # what is big-endian in the file is the same numbers
        swapped = np.arange(6, dtype=">i4").reshape(2, 3)
        np.savez(folder / "a.npz", **arrays(width), swapped=swapped)
        return Sample(folder / "a.npz", {**arrays(width), "swapped": swapped.astype("<i4")})


class TestCompressed(FormatSuite):
    name, label = "npz", "npz"
    structure_only = False

    def make(self, folder: Path, width: int) -> Sample:
        np.savez_compressed(folder / "a.npz", **arrays(width))
        return Sample(folder / "a.npz", arrays(width))


def test_it_is_found_by_its_entry_point() -> None:
    names = [point.name for point in importlib.metadata.entry_points(group="modelctl.formats")]
    assert "npz" in names
    assert [one.name for one in guests.third_party()].count("npz") == 1


def test_the_commands_read_it_and_convert_it(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays(5))

    def run(*argv: str) -> str:
        command = [sys.executable, "-m", "modelctl", *argv]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    assert [line.split()[0] for line in run("ls", "a.npz").splitlines()] == list(arrays(5))
    assert "npz · state_dict · 8 tensors" in run("summary", "a.npz")
    run("convert", "a.npz", "-o", "a.safetensors")
    with modelctl.open(tmp_path / "a.safetensors") as ckpt:
        found = {name: ref.tobytes() for name, ref in ckpt.tensors().items()}
    assert found == {name: array.tobytes("C") for name, array in arrays(5).items()}
    run("diff", "a.npz", "a.safetensors")  # it ends with 0: nothing differs


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("raise OSError('gone')", "can't be loaded: OSError: gone"),
        ("Npz = 3", "is no modelctl"),
    ],
)
def test_a_broken_package_is_named(code: str, said: str, tmp_path: Path, path: Path) -> None:
    (tmp_path / "modelctl_npz.py").write_text(code)
    np.savez(tmp_path / "a.npz", **arrays(5))
    search = os.pathsep.join((str(tmp_path), os.environ["PYTHONPATH"]))
    done = subprocess.run(
        [sys.executable, "-m", "modelctl", "ls", str(tmp_path / "a.npz")],
        cwd=tmp_path,  # Python looks there first
        env={**os.environ, "PYTHONPATH": search},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"the format 'npz' of modelctl-npz {said}" in done.stderr
    assert "hint: upgrade or uninstall modelctl-npz" in done.stderr


def test_objects_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}, None]))
    with pytest.raises(UnsupportedError, match="no numbers"):
        modelctl.open(tmp_path / "a.npz")


def test_what_lies_about_its_size(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(8, "f4"))
    data = (tmp_path / "a.npz").read_bytes()
    (tmp_path / "a.npz").write_bytes(data.replace(b"(8,)", b"(9,)"))
    with pytest.raises(UnreadableError, match=r"36 bytes of values, it has 32"):
        modelctl.open(tmp_path / "a.npz")


def test_without_it_the_file_is_no_checkpoint(tmp_path: Path, path: Path) -> None:
    np.savez(tmp_path / "a.npz", **arrays(5))
    code = "import sys, modelctl; modelctl.open(sys.argv[1])"
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    source = Path(modelctl.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.npz")],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(source)},
        capture_output=True,
        text=True,
    )
    assert "modelctl does not read by itself" in done.stderr
