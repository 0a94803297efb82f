"""What is shared is shown once, whatever it would spell out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.core.tree import walk
from modelctl.errors import UnreadableError, UnsupportedError
from modelctl.inspection.show import outline, show


def laughs(inner: Any, keyed: bool = False) -> Any:
    """Forty levels, each the one below it twice."""
    for _ in range(40):
        inner = {"a": inner, "b": inner} if keyed else [inner, inner]
    return inner


@pytest.mark.parametrize("keyed", [False, True])
@pytest.mark.parametrize("leaf", ["ha", torch.ones(1)])
def test_what_is_shared_is_shown_once(leaf: Any, keyed: bool, tmp_path: Path) -> None:
    saved = {"model": {"w": torch.ones(2)}, "x": laughs([leaf], keyed)}
    torch.save(saved, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        branches = list(outline(ckpt.root))
        assert len(branches) < 100
        second = "b" if keyed else "1"
        assert [one.text for one in branches if one.depth == 2 and one.label == second] == [
            f"(the same as 'x.{'a' if keyed else '0'}')"
        ]
        below = "x.b" if keyed else "x.1"
        inner = list(outline(show(ckpt, below).node, below))
        assert any(f"(the same as '{below}." in one.text for one in inner)
        with pytest.raises(UnsupportedError, match="spelt out too often"):
            show(ckpt).as_dict()
        mc.summarize(ckpt).as_dict()
        if isinstance(leaf, torch.Tensor):
            with pytest.raises(UnreadableError, match="paths: a bomb"):
                list(walk(ckpt.root))


def test_what_is_shared_a_few_times_is_spelt_out_as_json(tmp_path: Path) -> None:
    group = {"lr": 0.1, "names": ["a", "b"]}
    torch.save({"groups": [group] * 50}, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        found = show(ckpt).as_dict()["value"]
    assert json.loads(json.dumps(found)) == {"groups": [group] * 50}
