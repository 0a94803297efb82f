"""Parts of a checkpoint as files, from Python: there and back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import modelctl as mc
from modelctl.errors import UsageError
from tests.cli.files import net, training, write


@pytest.fixture
def ddp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "ddp.pt", training())


def test_apart_and_together_again(ddp: Path) -> None:
    apart = mc.split_file("ddp.pt", output="parts", history=False)
    assert [part.part for part in apart.parts] == ["model", "optimizer", "rest"]
    assert [part.tensors for part in apart.parts] == [12, 9, 0]
    for part in apart.parts:
        assert part.bytes_written == Path(str(part.output)).stat().st_size
    files = {part.part: str(part.output) for part in apart.parts}
    done = mc.merge_files(**files, output="whole.pt", history=False)
    assert (done.source, done.output) == ("parts/model.pt", "whole.pt")
    with mc.open("ddp.pt") as a, mc.open("whole.pt") as b:
        assert not mc.diff(a, b).differs


def test_dry_runs_write_nothing(ddp: Path) -> None:
    apart = mc.split_file(ddp, output="parts", dry_run=True)
    assert [(part.output, part.bytes_written) for part in apart.parts] == [(None, None)] * 3
    merged = mc.merge_files(ddp, epoch=7, dry_run=True)
    assert [note.text for note in merged.notes] == ["epoch: 3 -> 7"]
    assert os.listdir() == ["ddp.pt"]


def test_values_are_set(ddp: Path) -> None:
    model = write(Path("m.pt"), net())
    done = mc.merge_files(model, epoch=2, set={"note": "hello"}, output="out.pt")
    assert done.plan.added == ["epoch", "note"]
    with mc.open("out.pt") as ckpt:
        assert ckpt.root["note"] == "hello"


def test_wrong_usage(ddp: Path) -> None:
    with pytest.raises(UsageError, match="no model to merge into"):
        mc.merge_files(optimizer=ddp, output="out.pt")
    with pytest.raises(UsageError, match="where does the result go"):
        mc.merge_files(ddp)
    with pytest.raises(UsageError, match="where do the parts go"):
        mc.split_file(ddp)
