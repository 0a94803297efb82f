"""EMA copies in every layout that is met in the wild stay in step with the model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.optim.swa_utils import AveragedModel

import modelctl as mc
from modelctl.errors import AmbiguousError, RefusedError
from tests.surgery.nets import HEAD, Net, load, opened, same_tensors


def shadow(net: Net) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in net.parameters()]


def stripped(path: Path, saved: dict[str, object]) -> dict[str, object]:
    with opened(path / "in.pt", saved) as ckpt:
        return load(mc.strip_head(ckpt), path / "out.pt")


@pytest.mark.parametrize("nested", [False, True])
def test_a_list_loses_what_the_model_loses(tmp_path: Path, nested: bool) -> None:
    net = Net()
    ema = shadow(net)
    kept = {"decay": 0.9, "shadow_params": ema, "collected_params": None} if nested else ema
    key = "ema" if nested else "shadow_params"
    saved = {"model": net.state_dict(), key: kept}
    out = stripped(tmp_path, saved)
    found = out["ema"]["shadow_params"] if nested else out["shadow_params"]
    trunk = [p for name, p in net.named_parameters() if name not in HEAD]
    assert len(found) == len(trunk)
    assert all(torch.equal(a, b) for a, b in zip(found, trunk, strict=True))
    with opened(tmp_path / "in.pt", saved) as ckpt:
        renamed = mc.rename(ckpt, "layer1=stage")
        assert len(load(renamed, tmp_path / "renamed.pt")[key]) == len(saved[key])


def test_a_list_that_fits_in_several_ways_refuses(tmp_path: Path) -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(4)))
    saved = {"model": net.state_dict(), "shadow_params": [p.detach() for p in net[:2].parameters()]}
    with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(AmbiguousError) as e:
        mc.drop(ckpt, "0")
    assert "EMA copy 'shadow_params'" in e.value.message
    assert "--weights-only" in (e.value.hint or "")
    saved["shadow_params"] = [torch.zeros(7)]
    with opened(tmp_path / "in.pt", saved) as ckpt, pytest.raises(RefusedError, match="don't fit"):
        mc.drop(ckpt, "0")


def test_timm(tmp_path: Path) -> None:
    net = Net()
    out = stripped(
        tmp_path, {"state_dict": net.state_dict(), "state_dict_ema": net.state_dict(), "epoch": 1}
    )
    same_tensors(out["state_dict_ema"], out["state_dict"])
    assert not set(HEAD) & set(out["state_dict"])


def test_mmengine_swaps_the_values(tmp_path: Path) -> None:
    """Its hook saves the averaged weights as ``state_dict``: names tell what belongs together."""
    net = Net()
    trained = {f"module.{name}": value + 1 for name, value in net.state_dict().items()}
    saved = {
        "meta": {"epoch": 3, "mmengine_version": "0.10.4"},
        "state_dict": net.state_dict(),
        "ema_state_dict": {"steps": torch.tensor(7), **trained},
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        assert any("averaged" in note.text for note in mc.convert(ckpt, weights_only=True).notes)
    out = stripped(tmp_path, saved)
    assert list(out["ema_state_dict"]) == ["steps", *(f"module.{n}" for n in out["state_dict"])]
    assert torch.equal(
        out["ema_state_dict"]["module.conv1.weight"], out["state_dict"]["conv1.weight"] + 1
    )


def test_an_averaged_model(tmp_path: Path) -> None:
    net = Net()
    saved = {"model": net.state_dict(), "ema": AveragedModel(net).state_dict()}
    out = stripped(tmp_path, saved)
    assert list(out["ema"]) == ["n_averaged", *(f"module.{name}" for name in out["model"])]


def test_a_pickled_module(tmp_path: Path) -> None:
    """ultralytics pickles the EMA copy whole: its head becomes an Identity."""
    net = Net()
    torch.save({"epoch": 1, "model": net, "ema": Net()}, tmp_path / "in.pt")
    with mc.open(tmp_path / "in.pt") as ckpt:
        mc.save(mc.strip_head(ckpt), tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=False)
    for part in (out["model"], out["ema"]):
        assert isinstance(part.fc, torch.nn.Identity)
        assert part(torch.zeros(1, 3, 4, 4)).shape == (1, 6)
