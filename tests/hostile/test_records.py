"""Records in a file's metadata that are not what modelctl writes: read as far as they go."""

from __future__ import annotations

from pathlib import Path

import pytest

import modelctl
from modelctl.cli import run

from .build.containers import BIAS, described, safetensors

RECORDS = ("freeze", "removed", "history", "only", "metadata", "tied")
VALUES = ("3", '"text"', "[3]", '[{"name": 3}]', '{"3": 3}', '{"frozen": 3}', "null", "NaN", "true")
COMMANDS = (
    *(["summary"], ["show"], ["convert"]),
    *(
        ["drop", "--pattern", "a.*"],
        ["freeze", "--pattern", "a.*"],
        ["strip-prefix", "--prefix", "a."],
    ),
)


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("value", VALUES)
def test_of_another_kind(
    record: str, value: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.safetensors"
    tensors = {"a.w": described(), "b.w": described(begin=16, end=32)}
    metadata = {f"modelctl.{record}": value}
    source.write_bytes(safetensors({"__metadata__": metadata, **tensors}, BIAS * 2))
    with modelctl.open(source) as ckpt:
        assert ckpt.tensors()["b.w"].tobytes() == BIAS
    for number, (command, *more) in enumerate(COMMANDS):
        for suffix in (".pt", ".safetensors") if number > 1 else ("",):
            out = ["-o", str(tmp_path / f"{number}{suffix}")] if suffix else []
            code = run([command, str(source), *more, *out])
            said = capsys.readouterr().err
            assert code == 0, (command, said)
