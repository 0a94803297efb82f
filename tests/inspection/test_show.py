"""What is shared is shown once, whatever it would spell out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.cli import run
from modelctl.core.tree import walk
from modelctl.errors import UnreadableError, UnsupportedError
from modelctl.inspection.show import _joined, outline, show


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


def test_the_objects_of_megatron_are_called_by_their_keys(tmp_path: Path, capsys) -> None:
    """It saves an object as ``key/shard_<offset>_<shape>``: the tree says the key, and a path may;
    the names stay what they are."""
    saved = {
        "layers.weight": torch.ones(2),
        **{f"layers.extra/shard_{i}_3": {"at": i} for i in range(3)},
        "rng/shard_0.0_1.1": [{"seed": 7}],
        "grid/shard_0.1_2.2": {"at": 1},
        # not Megatron's: each is called as it is
        "two": 1,
        "two/shard_0_1": {"x": 2},
        "odd/shard_0_1": {"x": 3},
        "odd/shard_0_2": {"x": 4},
        "rev/shard_0_2": {"x": 5},
        "rev/shard_0_1": {"x": 6},
    }
    torch.save(saved, tmp_path / "a.pt")
    with mc.open(tmp_path / "a.pt") as ckpt:
        assert [(one.depth, one.label, one.text) for one in outline(_joined(ckpt.root))][1:] == [
            (1, "layers.weight", "tensor f32 2"),
            (1, "layers.extra", ""),
            *[line for i in range(3) for line in ((2, str(i), ""), (3, "at", str(i)))],
            *((1, "rng", "list of 1"), (2, "0", ""), (3, "seed", "7")),
            *((1, "grid", ""), (2, "0.1", ""), (3, "at", "1")),
            (1, "two", "1"),
            *((1, "two/shard_0_1", ""), (2, "x", "2")),
            *((1, "odd", ""), (2, "x", "3"), (1, "odd/shard_0_2", ""), (2, "x", "4")),
            *((1, "rev", ""), (2, "0", ""), (3, "x", "5"), (1, "rev/shard_0_1", ""), (2, "x", "6")),
        ]
        for path, value in {"rng.0.seed": 7, "layers.extra.2.at": 2, "grid.0.1.at": 1}.items():
            assert show(ckpt, path).node == value
        assert show(ckpt, "rng/shard_0.0_1.1.0.seed").node == 7
        assert set(show(ckpt).as_dict()["value"]) == set(saved)
    assert run(["show", str(tmp_path / "a.pt")]) == 0
    assert "layers.extra\n  0" in capsys.readouterr().out
