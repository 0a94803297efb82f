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


class Buffered(torch.nn.Module):
    """A buffer with a name of its own, as many have: from its name nothing tells that it is none
    of the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(5, 4)
        self.register_buffer("scale", torch.ones(4))
        self.head = torch.nn.Linear(4, 3)


def trained() -> tuple[Buffered, dict[str, object], dict[str, torch.Tensor]]:
    net = Buffered()
    optimizer = torch.optim.Adam(net.parameters())
    net.head(net.body(torch.randn(2, 5)) * net.scale).sum().backward()
    optimizer.step()
    grads = {name: parameter.grad for name, parameter in net.named_parameters()}
    return net, {"model": net.state_dict(), "optimizer": optimizer.state_dict()}, grads


@pytest.mark.parametrize("key", ["grads", "target"])
def test_what_has_the_parameters_alone_follows(tmp_path: Path, key: str) -> None:
    """Gradients, a copy made of ``named_parameters()``: and the optimizer stays the model's."""
    _, saved, grads = trained()
    nested = {key: {"a": grads}} if key == "grads" else {key: grads}
    with opened(tmp_path / "in.pt", {**saved, **nested}) as ckpt:
        cut = load(mc.drop(ckpt, "head"), tmp_path / "cut.pt")
        renamed = load(mc.rename(ckpt, "body=trunk"), tmp_path / "renamed.pt")
    assert cut["optimizer"]["param_groups"][0]["params"] == [0, 1]
    for out, names in ((cut, ["body.weight", "body.bias"]), (renamed, None)):
        found = out[key]["a"] if key == "grads" else out[key]
        assert [*found] == (names or [name.replace("body", "trunk") for name in grads])


def test_a_list_of_the_parameters_alone_is_cut(tmp_path: Path) -> None:
    _, saved, grads = trained()
    with opened(tmp_path / "in.pt", {**saved, "mine": [*grads.values()]}) as ckpt:
        out = load(mc.drop(ckpt, "body"), tmp_path / "out.pt")
    assert [one.shape for one in out["mine"]] == [(3, 4), (3,)]


def test_flattened_names_of_the_parameters_alone_follow(tmp_path: Path) -> None:
    """In a state_dict of its own, and in the model's (LitEma), where it counts its updates."""
    _, saved, grads = trained()
    flat = {name.replace(".", ""): grad for name, grad in grads.items()}
    inner = {f"model_ema.{name}": grad for name, grad in flat.items()}
    inner |= {"model_ema.decay": torch.tensor(0.9), "model_ema.num_updates": torch.tensor(2)}
    model = {f"model.{name}": value for name, value in saved["model"].items()}
    with opened(tmp_path / "in.pt", {**saved, "shadow": flat}) as ckpt:
        out = load(mc.drop(ckpt, "head"), tmp_path / "out.pt")
    assert [*out["shadow"]] == ["bodyweight", "bodybias"]
    with opened(tmp_path / "in.pt", {**saved, "model": {**model, **inner}}) as ckpt:
        out = load(mc.drop(ckpt, "model.head"), tmp_path / "out.pt")
    left = [name for name in out["model"] if name.startswith("model_ema.")]
    assert left == [name for name in inner if "head" not in name]


def test_a_few_of_the_models_tensors_are_named(tmp_path: Path) -> None:
    """Whose the optimizer is they don't change, though it has just as many parameters."""
    net, saved, grads = trained()
    optimizer = torch.optim.Adam(net.head.parameters())
    optimizer.step()
    few = {name: grad for name, grad in grads.items() if "head" in name}
    saved = {"model": saved["model"], "optimizer": optimizer.state_dict(), "grads": few}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        cut = mc.drop(ckpt, "head.bias")
        out = load(cut, tmp_path / "out.pt")
    assert out["optimizer"]["param_groups"][0]["params"] == [0]
    assert [*out["grads"]] == [*few]
    assert any("'grads' has some of these names" in note.text for note in cut.notes)
    with opened(tmp_path / "in.pt", saved) as ckpt:
        assert not any("'grads'" in note.text for note in mc.drop(ckpt, "body").notes)


def test_several_copies_in_one_with_their_counts_follow(tmp_path: Path) -> None:
    """A copy for each of several rates, under a key that says nothing (PostHocEMA)."""
    _, saved, _ = trained()
    several = {
        f"ema_models.{i}.{name}": value
        for i in range(2)
        for name, value in (
            ("initted", torch.tensor(True)),
            *((f"ema_model.{name}", value + i) for name, value in saved["model"].items()),
        )
    }
    with opened(tmp_path / "in.pt", {**saved, "post": several}) as ckpt:
        out = load(mc.drop(ckpt, "head"), tmp_path / "out.pt")
    assert [*out["post"]] == [name for name in several if "head" not in name]
