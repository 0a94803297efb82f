"""Parts of one model with the same tensors that go their own way: what an edit does not touch, it
names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn

import modelctl as mc
from tests.surgery.nets import opened


def dino(student: str = "student", teacher: str = "teacher") -> nn.ModuleDict:
    def part() -> nn.Module:
        backbone = nn.ModuleDict({"patch_embed": nn.Linear(3, 4), "blocks": nn.Linear(4, 4)})
        return nn.ModuleDict({"backbone": backbone, "dino_head": nn.Linear(4, 7)})

    return nn.ModuleDict({student: part(), teacher: part()})


def said(path: Path, saved: Any, edit: Any) -> list[str]:
    with opened(path / "in.pt", saved) as ckpt:
        return [note.text for note in edit(ckpt).notes if "stays as it was" in note.text]


STAYS = "'{}' has the same tensors as '{}': it stays as it was"


@pytest.mark.parametrize("names", [("student", "teacher"), ("online", "target_network")])
@pytest.mark.parametrize("nested", [False, True])
def test_the_other_one_is_named(tmp_path: Path, names: tuple[str, str], nested: bool) -> None:
    state = dino(*names).state_dict()
    saved = {"model": state, "iteration": 3} if nested else state
    for one, other in (names, names[::-1]):
        told = [STAYS.format(other, one)]
        strip = lambda ckpt: mc.strip_prefix(ckpt, f"{one}.backbone")  # noqa: B023, E731
        assert said(tmp_path, saved, strip) == told
        drop = lambda ckpt: mc.drop(ckpt, f"{one}.dino_head")  # noqa: B023, E731
        assert said(tmp_path, saved, drop) == told
        rename = lambda ckpt: mc.rename(ckpt, f"{one}.*.blocks.*={one}.*.layers.*")  # noqa: B023, E731
        assert said(tmp_path, saved, rename) == told


@pytest.mark.parametrize(
    "edit",
    [
        lambda ckpt: mc.keep(ckpt, "teacher.backbone"),
        lambda ckpt: mc.drop(ckpt, "student"),
        lambda ckpt: mc.add_prefix(ckpt, "model"),
        lambda ckpt: mc.drop(ckpt, "*.dino_head.*"),
        lambda ckpt: mc.rename(ckpt, "*.blocks.*=*.layers.*"),
    ],
)
def test_nothing_where_both_follow_or_one_goes(tmp_path: Path, edit: Any) -> None:
    assert said(tmp_path, dino().state_dict(), edit) == []


def test_nothing_of_what_is_no_copy(tmp_path: Path) -> None:
    net = nn.ModuleDict({"student": nn.Linear(3, 4), "teacher": nn.Linear(4, 5)})
    drop = lambda ckpt: mc.drop(ckpt, "student.bias")  # noqa: E731
    assert said(tmp_path, net.state_dict(), drop) == []
