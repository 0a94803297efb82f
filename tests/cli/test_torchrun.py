"""Under torchrun the processes of one command are one: the same bytes, said once, or nothing."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import pytest

from tests.storage.faults import leftovers

torch = pytest.importorskip("torch")
if not torch.distributed.is_available() or not torch.distributed.is_gloo_available():
    pytest.skip("this torch has no gloo", allow_module_level=True)

ROOT = Path(__file__).parents[2]
LINES = """\
strip-prefix run.pt -o OUT/stripped.pt
convert run.pt --weights-only -o OUT/w.safetensors
convert run.pt --weights-only --max-shard-size 300kB -o OUT/shards/
convert run.pt --to dcp -o OUT/dcp
convert OUT/dcp -o OUT/again.pt
rename run.pt --map module.*=net.* -o OUT/renamed.pt
drop OUT/renamed.pt --pattern *.bias --in-place
split run.pt -o OUT/parts
strip-prefix run.pt -o OUT/stripped.pt
convert run.pt --dry-run -o OUT/no.pt
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a training checkpoint."""
    generator = torch.Generator().manual_seed(0)
    model = OrderedDict(
        (f"module.layers.{i}.{name}", torch.randn(shape, generator=generator))
        for i in range(6)
        for name, shape in (("weight", (200, 100)), ("bias", (200,)))
    )
    model["module.head.weight"] = model["module.layers.0.weight"]
    torch.save({"model": model, "epoch": 3}, tmp_path / "run.pt")
    return tmp_path


def started(place: Path, size: int, lines: str, *dying: int) -> subprocess.CompletedProcess[str]:
    (place / "lines").write_text(lines)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"}
    return subprocess.run(
        [*torchrun, f"--nproc-per-node={size}", "-m", "tests.cli.ranks", "lines"]
        + [str(one) for one in dying],
        cwd=place,
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )


def contents(folder: Path) -> dict[str, bytes]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("size", [2, 4])
def test_the_same_files_as_alone(
    size: int, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from modelctl.cli import run

    monkeypatch.chdir(place)
    (place / "alone").mkdir()
    (place / "all").mkdir()
    codes = [run(line.split()) for line in LINES.replace("OUT", "alone").splitlines()]
    assert codes == [0] * 8 + [2, 0]
    said = capsys.readouterr()
    done = started(place, size, LINES.replace("OUT", "all"))
    for rank in range(size):
        assert (place / f"lines.codes-{rank}").exists(), done.stderr
        assert (place / f"lines.codes-{rank}").read_text() == " ".join(map(str, codes))
    assert contents(place / "all") == contents(place / "alone")
    assert len(contents(place / "all")) > 10
    assert leftovers(place) == []
    # said once, as by one alone
    assert done.stdout == said.out.replace("alone/", "all/")
    for line in said.err.replace("alone/", "all/").splitlines():
        assert done.stderr.splitlines().count(line) == said.err.splitlines().count(
            line.replace("all/", "alone/")
        )


@pytest.mark.parametrize("dying", [0, 1])
def test_a_rank_that_is_killed_leaves_nothing(dying: int, place: Path) -> None:
    """It dies when all others wait for its part of the file."""
    before = contents(place)
    done = started(place, 2, "strip-prefix run.pt --in-place\n", dying, 4)
    assert done.returncode
    assert "SIGKILL" in done.stderr
    (place / "lines").unlink()
    for left in place.glob("lines.codes*"):  # of the other, if torchrun let it come to its end
        assert left.read_text() == "2"
        left.unlink()
    assert contents(place) == before
    assert leftovers(place) == []


def test_what_a_rank_starts_works_alone(place: Path) -> None:
    """A training's own processes have torchrun's variables, too: nobody else runs the command."""
    said = {
        "RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1",
        "TORCHELASTIC_RUN_ID": "none",
    }  # fmt: skip
    command = [sys.executable, "-m", "modelctl", "strip-prefix", "run.pt", "-o", "out.pt"]
    training = f"import subprocess, sys; sys.exit(subprocess.call({command!r}))"
    env = os.environ | said | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        [sys.executable, "-c", training], cwd=place, env=env, capture_output=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert (place / "out.pt").exists()


def test_streams_are_refused(place: Path) -> None:
    done = started(place, 2, "convert run.pt --to safetensors --weights-only -o -\n")
    assert (place / "lines.codes-1").read_text() == "2"
    assert "torchrun's processes have no stdin and stdout in common" in done.stderr
