"""split, and merge as its inverse: on the layouts of real frameworks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import modelctl as mc
from modelctl.core.checkpoint import Checkpoint
from modelctl.errors import NoMatchError, UsageError

from .nets import Net, opened, same_tensors
from .test_merge import Trained


def ours(t: Trained) -> dict[str, Any]:
    return {"model": t.net.state_dict(), "optimizer": t.optimizer.state_dict(), "epoch": 3}


def imagenet(t: Trained) -> dict[str, Any]:
    return {
        "epoch": 3,
        "arch": "net",
        "state_dict": t.net.state_dict(),
        "best_acc1": torch.tensor(71.2),
        "optimizer": t.optimizer.state_dict(),
        "scheduler": t.scheduler.state_dict(),
    }


def lightning(t: Trained) -> dict[str, Any]:
    return {
        "epoch": 4,
        "global_step": 1200,
        "state_dict": t.net.state_dict(),
        "callbacks": {"ModelCheckpoint": {"best": torch.tensor(0.5)}},
        "optimizer_states": [t.optimizer.state_dict()],
        "lr_schedulers": [t.scheduler.state_dict()],
    }


def timm(t: Trained) -> dict[str, Any]:
    ema = OrderedDict((name, value + 1) for name, value in t.net.state_dict().items())
    return {
        "epoch": 1,
        "state_dict": t.net.state_dict(),
        "optimizer": t.optimizer.state_dict(),
        "version": 2,
        "state_dict_ema": ema,
    }


def two_optimizers(t: Trained) -> dict[str, Any]:
    return {"model": t.net.state_dict(), "optimizers": [t.optimizer.state_dict()] * 2, "step": 9}


def in_a_tuple(t: Trained) -> Any:
    return (
        t.net.state_dict(),
        {"state": t.optimizer.state_dict(), "epoch": 3},
        (t.scheduler.state_dict(), 4),
    )


LAYOUTS = {f.__name__: f for f in (ours, imagenet, lightning, timm, two_optimizers, in_a_tuple)}


def put_together(folder: Path, parts: dict[str, Checkpoint]) -> Any:
    """The parts through their files, and merged."""
    mc.save_parts(parts, folder / "parts")
    assert {path.stem for path in (folder / "parts").iterdir()} == set(parts)
    opened = {name: mc.open(folder / "parts" / f"{name}.pt") for name in parts}
    try:
        mc.save(mc.merge(**opened), folder / "whole.pt")
    finally:
        for ckpt in opened.values():
            ckpt.close()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_merge_after_split_is_the_identity(
    tmp_path: Path, layout: Callable[[Trained], dict[str, Any]]
) -> None:
    with opened(tmp_path / "in.pt", layout(Trained())) as ckpt:
        parts = mc.split(ckpt)
        mc.save(ckpt, tmp_path / "same.pt")
        put_together(tmp_path, parts)
    same, whole = (torch.load(tmp_path / f, weights_only=True) for f in ("same.pt", "whole.pt"))
    alike(same, whole)
    with mc.open(tmp_path / "same.pt") as a, mc.open(tmp_path / "whole.pt") as b:
        assert not mc.diff(a, b).differs


def alike(a: Any, b: Any) -> None:
    """The same types, keys in the same order, bits, and metadata."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b)
        assert a.stride() == b.stride()
    elif isinstance(a, dict):
        assert list(a) == list(b)
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
        for key in a:
            alike(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            alike(one, other)
    else:
        assert a == b


def test_each_part_loads_by_itself(tmp_path: Path) -> None:
    trained = Trained()
    with opened(tmp_path / "in.pt", timm(trained)) as ckpt:
        mc.save_parts(mc.split(ckpt), tmp_path / "parts", to="safetensors")
    folder = tmp_path / "parts"
    from safetensors.torch import load_file

    same_tensors(
        dict(sorted(load_file(folder / "model.safetensors").items())),
        dict(sorted(trained.net.state_dict().items())),
    )
    assert (folder / "ema.safetensors").exists()
    fresh = Trained()
    fresh.optimizer.load_state_dict(torch.load(folder / "optimizer.pt", weights_only=True))
    rest = torch.load(folder / "rest.pt", weights_only=True)
    assert list(rest) == ["epoch", "state_dict", "optimizer", "version", "state_dict_ema"]


def test_a_tie_between_parts_is_told(tmp_path: Path) -> None:
    net = Net()
    with opened(tmp_path / "in.pt", {"model": net.state_dict(), "ema": net.state_dict()}) as ckpt:
        notes = mc.split(ckpt)["rest"].notes
    assert any("of ema shares memory with model" in note.text for note in notes)


def test_nothing_to_split(tmp_path: Path) -> None:
    for saved in (Net().state_dict(), Net()):
        with (
            opened(tmp_path / "in.pt", saved) as ckpt,
            pytest.raises(NoMatchError, match="nothing"),
        ):
            mc.split(ckpt)


def test_a_rest_wants_its_parts(tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", imagenet(Trained())) as ckpt:
        parts = mc.split(ckpt)
        with pytest.raises(UsageError, match="a place for the optimizer") as e:
            mc.merge(model=parts["model"], rest=parts["rest"])
        assert "--optimizer" in (e.value.hint or "")
        with pytest.raises(UsageError, match="not in a checkpoint"):
            mc.merge(**{**parts, "model": ckpt})
        with pytest.raises(UsageError, match="no place for a model"):
            mc.merge(**{**parts, "rest": ckpt})
        with pytest.raises(UsageError, match="says itself"):
            mc.merge(**parts, like=ckpt)
        changed = mc.merge(**parts, epoch=7, lr=0.5)
    assert changed.sections.epoch == (("epoch",), 7)
    assert set(changed.sections.lrs()) == {0.5}
    assert changed.sections.models[0].path == ("state_dict",)
