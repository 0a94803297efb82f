"""The library at a prompt and in a notebook: reports that print, checkpoints to look into."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import modelctl as mc
from modelctl.cli import run
from modelctl.errors import ModelctlError, NoMatchError, UnsupportedError, UsageError

SAMPLE = Path(__file__).parents[1] / "sample_models" / "cnn-ddp.pt"

CALLS: dict[str, tuple[Any, list[str]]] = {
    "summary": (lambda at: mc.summary(at), ["summary"]),
    "summary, deeper": (lambda at: mc.summary(at, depth=None), ["summary", "--depth", "all"]),
    "ls": (lambda at: mc.ls(at, "*fc*"), ["ls", "*fc*"]),
    "show": (lambda at: mc.show(at), ["show"]),
    "show, one": (lambda at: mc.show(at, "epoch"), ["show", "epoch"]),
}


@pytest.mark.parametrize("name", CALLS)
def test_reports_are_those_of_the_commands(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    call, (command, *options) = CALLS[name]
    report = call(SAMPLE)
    run([command, str(SAMPLE), *options, "--format", "json"])
    told = json.loads(capsys.readouterr().out)
    assert told.pop("schema") == f"modelctl.{command}/1"
    if name != "summary":  # programs get all levels
        assert json.loads(json.dumps(report.as_dict())) == told
    with mc.open(SAMPLE) as ckpt:
        opened = call(ckpt)
    run([command, str(SAMPLE), *options])
    printed = capsys.readouterr().out.rstrip("\n").splitlines()
    if command == "ls":  # a pipe gets bare names
        printed = [line.split()[0] for line in str(report).splitlines()[1:]]
        assert printed == [row.name for row in report]
    else:
        shown = str(report).splitlines()
        assert shown[1 : len(printed)] == printed[1:]
        assert shown[0] == printed[0].replace(", 0.0 s, torch not loaded", "")
    assert str(opened).splitlines()[2:] == str(report).splitlines()[2:]
    assert report._repr_html_().startswith("<pre>")


def test_a_diff_of_paths(tmp_path: Path) -> None:
    mc.edit(SAMPLE, "strip-prefix", output=tmp_path / "b.pt")
    found = mc.diff(SAMPLE, tmp_path / "b.pt")
    assert found.differs
    assert (found.a, found.b) == (str(SAMPLE), str(tmp_path / "b.pt"))
    assert "the names of A are the other's under 'module.'; 73 tensors bit-equal" in str(found)
    assert (len(found.removed), len(found.added)) == (47, 47)
    assert not mc.diff(SAMPLE, SAMPLE).differs


def test_a_checkpoint_is_looked_into() -> None:
    with mc.open(SAMPLE) as ckpt:
        assert list(ckpt) == ["arch", "epoch", "lr", "state_dict", "optimizer"]
        assert ckpt["epoch"] == 3
        assert ckpt["optimizer.param_groups.0.lr"] == pytest.approx(0.1)
        assert list(ckpt["state_dict"]) == list(ckpt.state_dict())
        assert ckpt["state_dict.module.fc.bias"] is ckpt.state_dict()["module.fc.bias"]
        assert "epoch" in ckpt
        assert "epochs" not in ckpt
        with pytest.raises(NoMatchError, match="nothing at 'epochs'") as raised:
            ckpt["epochs"]
        assert raised.value.hint == "nearest: epoch"
        text = repr(ckpt)
        assert "training checkpoint" in text
        assert len(text) < 200
        html = ckpt._repr_html_()
        assert html.count("<tr>") == 31  # headings, and 30 of
        assert "of 47" in html


def test_values_by_numpy_and_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    values = {
        "f32": torch.randn(3, 4).t(),
        "bf16": torch.randn(5).to(torch.bfloat16),
        "f16": torch.randn(2, 2).half(),
        "i64": torch.tensor(7),
        "bool": torch.tensor([True, False]),
        "c64": torch.randn(2, dtype=torch.complex64),
        "none": torch.zeros(0, 3),
    }
    torch.save({**values, "f8": torch.ones(2).to(torch.float8_e4m3fn)}, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        for name, expected in values.items():
            ref = ckpt[name]
            as_torch = ref.torch()
            assert as_torch.dtype == expected.dtype
            assert torch.equal(as_torch, expected)
            found = np.asarray(ref)
            assert found.shape == tuple(expected.shape)
            wide = expected.float() if name == "bf16" else expected
            assert found.dtype == wide.numpy().dtype
            assert np.array_equal(found, wide.numpy())
            found[...] = 0  # its own
        assert np.asarray(ckpt["f16"], dtype="f8").dtype == np.float64
        assert torch.equal(ckpt["f8"].torch().float(), torch.ones(2))
        with pytest.raises(UnsupportedError, match="no numbers of the dtype float8_e4m3fn"):
            ckpt["f8"].numpy()
        with pytest.raises(ValueError, match="an array of their own"):
            np.array(ckpt["f16"], copy=False)


@pytest.mark.parametrize("name", ["strip_prefix", "freeze", "summarize", "save", "match"])
def test_a_path_where_a_checkpoint_is_wanted(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} takes an opened checkpoint, not a str") as raised:
        getattr(mc, name)("a.pt", "x")
    assert "mc.open(path)" in (raised.value.hint or "")


def test_what_is_neither_a_path_nor_a_checkpoint() -> None:
    with pytest.raises(UsageError, match="not a dict"):
        mc.summary({})  # type: ignore[arg-type]
    with mc.open(SAMPLE) as ckpt, pytest.raises(UsageError, match="key= goes with a path"):
        mc.ls(ckpt, key="state_dict")


def test_a_traceback_has_the_hint() -> None:
    with pytest.raises(ModelctlError) as raised:
        mc.open(SAMPLE, key="nothing")
    error = raised.value
    shown = "".join(traceback.format_exception(error))
    assert not hasattr(error, "add_note") or f"hint: {error.hint}" in shown
    error.hint = "another"
    assert error.__notes__ == ["hint: another"]
