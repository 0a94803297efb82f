"""However a checkpoint is laid out, an edit takes the model's optimizer and copies along, leaves
those of other models, or is refused."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import modelctl as mc
from modelctl.core.tree import path_text
from modelctl.errors import AmbiguousError, RefusedError

from .nets import opened


def net(inputs: int = 4, outputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, 8), nn.ReLU(), nn.Linear(8, outputs))


def trained(*models: nn.Module, kind: Any = torch.optim.AdamW) -> Any:
    optimizer = kind([p for model in models for p in model.parameters()])
    for model in models:
        model(torch.randn(2, model[0].in_features)).sum().backward()  # type: ignore[index, operator]
    optimizer.step()
    return optimizer


class One:
    """A model, its average and its optimizer."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.net = net()
        self.optim = trained(self.net)
        self.model = self.net.state_dict()
        self.state = self.optim.state_dict()
        self.average = OrderedDict((name, value * 0.5) for name, value in self.model.items())


def under(prefix: str, state: Any, write: Callable[[str], str] = str) -> dict[str, Any]:
    return {prefix + write(name): value for name, value in state.items()}


def fastai(p: One) -> dict[str, Any]:
    states = [
        {"grad_avg": one["exp_avg"], "sqr_avg": one["exp_avg_sq"], "step": 1}
        for one in p.state["state"].values()
    ]
    return {"model": p.model, "opt": {"hypers": [{"lr": 0.1, "mom": 0.9}], "state": states}}


# By name: how a checkpoint is laid out.
LAYOUTS: dict[str, Callable[[One], Any]] = {
    "usual": lambda p: {"model": p.model, "optimizer": p.state},
    "any key": lambda p: {"model": p.model, "adam": p.state},
    "nested": lambda p: {
        "model": p.model,
        "trainer": {"inner": {"optimizer": p.state}, "epoch": 3},
    },
    "tuple": lambda p: (p.model, p.state),
    "list": lambda p: [p.model, p.state, 3],
    "beside the tensors": lambda p: {**p.model, "optimizer": p.state},
    "fastai": fastai,
    "pickled optimizer": lambda p: {"model": p.net, "optimizer": p.optim},
    "pickled optimizer, state_dict": lambda p: {"model": p.model, "optimizer": p.optim},
    "an average": lambda p: {"model": p.model, "model_avg": p.average},
    "an average, deep": lambda p: {"model": p.model, "averaging": {"swa": {"weights": p.average}}},
    "a target": lambda p: {"net": p.model, "target_net": p.average, "optimizer": p.state},
    "the best so far": lambda p: {"model": p.model, "best": p.average, "optimizer": p.state},
    "ema-pytorch": lambda p: {
        "model": p.model,
        "ema": {
            "initted": torch.tensor(True),
            "step": torch.tensor(3),
            **under("online_model.", p.model),
            **under("ema_model.", p.average),
        },
        "opt": p.state,
    },
    "flattened": lambda p: {
        "model": p.model,
        "ema": under("", p.average, lambda name: name.replace(".", "_")),
    },
    "LitEma": lambda p: {
        "state_dict": {
            **under("model.diffusion.", p.model),
            "model_ema.decay": torch.tensor(0.9),
            **under("model_ema.", under("diffusion.", p.average), lambda n: n.replace(".", "")),
        },
        "optimizer_states": [p.state],
    },
    "mmcv": lambda p: {
        "state_dict": {**p.model, **under("ema_", p.average, lambda name: name.replace(".", "_"))},
        "optimizer": p.state,
    },
    "mmagic": lambda p: {
        "state_dict": {**under("generator.", p.model), **under("generator_ema.", p.average)},
        "optimizer": {"generator": p.state},
    },
    "a callback's": lambda p: {
        "state_dict": p.model,
        "callbacks": {"EMACallback": {"ema_state_dict": p.average, "ready": True}},
        "optimizer_states": [p.state],
    },
    "beside its numbers": lambda p: {
        "model": p.model,
        "optimizer": p.state,
        "ema_state": {"decay": 0.9, "state": p.average},
    },
    "running": lambda p: {"generator": p.model, "g_running": p.average, "g_optim": p.state},
    "the optimizer's own": lambda p: {
        "model": p.model,
        "optimizer": {"opt": p.state, "ema": tuple(p.average.values()), "decay": 0.9},
    },
    "Lookahead": lambda p: {
        "model": p.model,
        "optimizer": {
            **p.state,
            "slow_state": {i: {"slow": v} for i, v in enumerate(p.average.values())},
        },
    },
    "shadow_params": lambda p: {
        "model": p.model,
        "ema": {"decay": 0.9, "shadow_params": [*p.average.values()], "collected_params": None},
    },
    "masters": lambda p: {"model": p.model, "fp32": {"groups": [[*p.average.values()]]}},
    "Lightning's averaging": lambda p: {
        "state_dict": p.average,
        "current_model_state": p.model,
        "averaging_state": {"n_averaged": torch.tensor(8)},
        "optimizer_states": [p.state],
    },
    "mmengine": lambda p: {
        "state_dict": p.average,
        "ema_state_dict": {"steps": torch.tensor(8), **under("module.", p.model)},
        "optimizer": p.state,
        "message_hub": {},
    },
}
# Names that go, and how many of something of each tensor stay.
GONE = "2"


def holdings(node: Any) -> list[int]:
    """How many parameters each state_dict, optimizer and list of tensors in it has; as torch reads
    it, not as modelctl does."""
    if isinstance(node, torch.optim.Optimizer):
        held = [p for group in node.param_groups for p in group["params"]]
        assert all(any(key is p for p in held) for key in node.state)
        return [len(node.state)]
    if isinstance(node, nn.Module):
        return [len(node.state_dict())]
    if isinstance(node, dict):
        if "param_groups" in node or "hypers" in node:
            ids = [i for group in node.get("param_groups", ()) for i in group["params"]]
            assert not ids or ids == [*range(len(node["state"]))]
            kept = [value for key, value in node.items() if key in ("state", "slow_state")]
            return [len(value) for value in kept]
        own = [key for key, value in node.items() if torch.is_tensor(value) and value.dim()]
        starts = {"": own}
        for start in ("online_model.", "ema_model.", "model_ema.", "ema_", "generator_ema."):
            starts[start] = [key for key in starts[""] if key.startswith(start)]
            starts[""] = [key for key in starts[""] if not key.startswith(start)]
        found = [len(names) for names in starts.values() if names]
        return found + [n for value in node.values() for n in holdings(value)]
    if isinstance(node, list | tuple):
        if node and all(torch.is_tensor(value) for value in node):
            return [len(node)]
        return [n for value in node for n in holdings(value)]
    return []


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_removed_goes_everywhere(name: str, tmp_path: Path) -> None:
    saved = LAYOUTS[name](One())
    before = holdings(saved)
    assert set(before) == {4}, before
    with opened(tmp_path / "in.pt", saved) as ckpt:
        names = [n for n in ckpt.state_dict() if ".2." in f".{n}" and "ema" not in n]
        mc.save(mc.drop(ckpt, names), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    after = holdings(found)
    # an nn.Module keeps its layer as an Identity
    assert after == [2] * len(before)


@pytest.mark.parametrize("name", LAYOUTS)
def test_what_is_renamed_is_renamed_everywhere(name: str, tmp_path: Path) -> None:
    saved = LAYOUTS[name](One())
    if name == "pickled optimizer":
        pytest.skip("a whole module's names are its class's")
    with opened(tmp_path / "in.pt", saved) as ckpt:
        first = next(iter(ckpt.state_dict()))
        before = first.removesuffix("0.weight")
        mc.save(mc.rename(ckpt, f"{before}0={before}trunk"), tmp_path / "out.pt")
    with mc.open(tmp_path / "out.pt") as out:
        texts = [path for path in out.tensors() if "state." not in path]
        lists = [path for path in texts if path.rpartition(".")[2].isdigit()]
        named = [path for path in texts if path not in lists]
        flat = [path.replace("_", "").replace(".", "") for path in named]
        assert not any(one.endswith(("0weight", "0bias")) for one in flat)
        assert sum(one.endswith(("trunkweight", "trunkbias")) for one in flat) == len(
            [one for one in flat if one.endswith(("2weight", "2bias"))]
        )


@pytest.mark.parametrize("name", [name for name in LAYOUTS if "optim" in str(LAYOUTS[name])])
def test_every_optimizer_can_be_left_out(name: str, tmp_path: Path) -> None:
    with opened(tmp_path / "in.pt", LAYOUTS[name](One())) as ckpt:
        out = mc.keep(ckpt, "*", optimizer="drop")
        assert out.sections.optimizers == out.sections.optimizer_objects == ()


# ---------------------------------------------------------------------- several models


class Two:
    """Two models of unlike shapes, an optimizer each, and one over both."""

    def __init__(self, twins: bool = False) -> None:
        torch.manual_seed(0)
        self.g, self.d = net(4, 4 if twins else 6), net(4 if twins else 6, 4 if twins else 1)
        self.og, self.od = trained(self.g), trained(self.d)
        self.both = trained(self.g, self.d)


def pair(g: str, d: str, og: str, od: str, twins: bool = False) -> Callable[[], dict[str, Any]]:
    def make() -> dict[str, Any]:
        p = Two(twins)
        return {
            g: p.g.state_dict(),
            d: p.d.state_dict(),
            og: p.og.state_dict(),
            od: p.od.state_dict(),
        }

    return make


PAIRS = [
    ("netG_state_dict", "netD_state_dict", "optimizerG_state_dict", "optimizerD_state_dict"),
    ("generator", "discriminator", "opt_gen", "opt_disc"),
    ("g", "d", "g_optim", "d_optim"),
    ("G", "D", "optimG", "optimD"),
    ("critic1", "critic2", "critic1_optimizer", "critic2_optimizer"),
    ("q1", "q2", "optimizer_q1", "optimizer_q2"),
    ("netG_A", "netG_B", "optimizer_G_A", "optimizer_G_B"),
    ("actor_state_dict", "critic_state_dict", "actor_optimizer", "critic_optimizer"),
]


@pytest.mark.parametrize("twins", [False, True], ids=["unlike", "twins"])
@pytest.mark.parametrize("keys", PAIRS, ids=[keys[0] for keys in PAIRS])
def test_each_model_has_its_own_optimizer(
    keys: tuple[str, str, str, str], twins: bool, tmp_path: Path
) -> None:
    saved = pair(*keys, twins=twins)()
    for chosen in (0, 1):
        with opened(tmp_path / "in.pt", saved) as ckpt:
            assert not ckpt.sections.certain
            mc.save(mc.drop(ckpt.replace(key=(keys[chosen],)), GONE), tmp_path / f"out{chosen}.pt")
        found = torch.load(tmp_path / f"out{chosen}.pt", weights_only=True)
        counts = [len(found[key]["state"] if i > 1 else found[key]) for i, key in enumerate(keys)]
        assert counts == ([2, 4, 2, 4] if chosen == 0 else [4, 2, 4, 2])


class WithNorm(nn.Sequential):
    """A net with statistics, which an optimizer has not, nor have some averages."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 3))


def test_an_average_of_parameters_alone_follows(tmp_path: Path) -> None:
    model = WithNorm()
    shadow = {name: p.detach() * 0.5 for name, p in model.named_parameters()}
    saved = {"net": model.state_dict(), "ema_state": {"decay": 0.9, "shadow": shadow}}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.rename(mc.drop(ckpt, GONE), "0=stem"), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    names = ["stem.weight", "stem.bias", "1.weight", "1.bias"]
    assert list(found["ema_state"]["shadow"]) == names
    assert found["ema_state"]["decay"] == 0.9


def test_an_average_without_names_may_have_the_buffers(tmp_path: Path) -> None:
    model = WithNorm().state_dict()
    lists = [value.clone() for value in model.values()]
    saved = {"state_dict": model, "callbacks": {"EMA": {"ema_weights": lists}}}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.drop(ckpt, "1"), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    kept = found["callbacks"]["EMA"]["ema_weights"]
    assert len(kept) == len(found["state_dict"]) == 4
    assert all(map(torch.equal, kept, found["state_dict"].values()))


def test_another_training_in_the_file_is_left(tmp_path: Path) -> None:
    """The best and the last, each with an optimizer: the one is no copy of the other."""
    p, q = One(), One()
    saved = {
        "best": {"model": p.model, "optimizer": p.state, "ema": p.average},
        "last": {"model": q.model, "optimizer": q.state, "ema": q.average},
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.drop(ckpt.replace(key=("last", "model")), GONE), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert [holdings(found[key]) for key in saved] == [[4, 4, 4], [2, 2, 2]]


def test_lists_of_models_targets_and_optimizers_go_by_place(tmp_path: Path) -> None:
    p = Two(twins=True)
    saved = {
        "qs": [p.g.state_dict(), p.d.state_dict()],
        "q_targets": [copy.deepcopy(p.g).state_dict(), copy.deepcopy(p.d).state_dict()],
        "q_optims": [p.og.state_dict(), p.od.state_dict()],
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.drop(ckpt.replace(key=("qs", 1)), GONE), tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    assert {key: holdings(part) for key, part in found.items()} == {key: [4, 2] for key in saved}


def test_what_is_kept_of_each_parameter_is_no_other_model(tmp_path: Path) -> None:
    model = WithNorm()
    fisher = {name: p.detach() ** 2 for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    saved = {"model": model.state_dict(), "fisher": fisher, "optimizer": optimizer.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = mc.drop(ckpt, GONE)
    assert [*out.root["fisher"]] == ["0.weight", "0.bias", "1.weight", "1.bias"]
    assert "copy 'fisher': 0 renamed, 2 removed" in [note.text for note in out.notes]


def test_an_optimizer_over_twins_is_not_cut_by_a_guess(tmp_path: Path) -> None:
    p = Two(twins=True)
    saved = {"net_A": p.g.state_dict(), "net_B": p.d.state_dict(), "optim": p.both.state_dict()}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        chosen = ckpt.replace(key=("net_B",))
        with pytest.raises(AmbiguousError, match="over net_A, net_B; in which order is not clear"):
            mc.drop(chosen, GONE)
        out = mc.keep(chosen, "*", optimizer="drop")
        assert out.sections.optimizers == ()


@pytest.mark.parametrize("key", ["first", "second"])
def test_one_over_several_has_them_in_the_files_order(key: str, tmp_path: Path) -> None:
    p = Two()
    state = p.both.state_dict()
    saved = {"first": p.g.state_dict(), "second": p.d.state_dict(), "optimizer": state}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = mc.drop(ckpt.replace(key=(key,)), GONE)
        mc.save(out, tmp_path / "out.pt")
    left = [0, 1, 4, 5, 6, 7] if key == "first" else [0, 1, 2, 3, 4, 5]
    found = torch.load(tmp_path / "out.pt", weights_only=True)["optimizer"]["state"]
    assert [*found] == [*range(6)]
    for i, old in enumerate(left):
        assert torch.equal(found[i]["exp_avg"], state["state"][old]["exp_avg"])


@pytest.mark.parametrize("logged", [True, False], ids=["its tensor beside it", "alone"])
def test_an_optimizer_of_no_model_is_left(logged: bool, tmp_path: Path) -> None:
    """SAC's temperature: its shape is that of the critic's last bias, too."""
    actor, critic = net(4, 2), net(6, 1)
    alpha = nn.Parameter(torch.zeros(1))
    tuned = torch.optim.Adam([alpha])
    alpha.grad = torch.ones(1)
    tuned.step()
    saved = {
        "actor": actor.state_dict(),
        "critic": critic.state_dict(),
        "critic_target": copy.deepcopy(critic).state_dict(),
        **({"log_alpha": alpha.detach()} if logged else {}),
        "actor_optimizer": trained(actor).state_dict(),
        "critic_optimizer": trained(critic).state_dict(),
        "alpha_optimizer": tuned.state_dict(),
    }
    for edit in ("drop", "optimizer drop"):
        with opened(tmp_path / "in.pt", saved) as ckpt:
            chosen = ckpt.replace(key=("critic",))
            out = (
                mc.drop(chosen, GONE) if edit == "drop" else mc.keep(chosen, "*", optimizer="drop")
            )
            mc.save(out, tmp_path / "out.pt", overwrite=True)
        if edit == "drop":
            told = "'alpha_optimizer' is over none of the models: it stays as it was"
            assert told in [note.text for note in out.notes]
        found = torch.load(tmp_path / "out.pt", weights_only=True)
        assert found["alpha_optimizer"] == saved["alpha_optimizer"]
        assert len(found["actor_optimizer"]["state"]) == 4
        assert ("critic_optimizer" in found) == (edit == "drop")


def test_pickled_optimizers_of_several_models(tmp_path: Path) -> None:
    p = Two(twins=True)
    saved = {"netG": p.g, "netD": p.d, "optimG": p.og, "optimD": p.od}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        chosen = ckpt.replace(key=("netD",))
        mc.save(mc.drop(chosen, GONE), tmp_path / "cut.pt")
        mc.save(mc.keep(chosen, "*", optimizer="drop"), tmp_path / "dropped.pt")
    cut = torch.load(tmp_path / "cut.pt", weights_only=False)
    assert holdings([cut["optimG"], cut["optimD"]]) == [4, 2]
    dropped = torch.load(tmp_path / "dropped.pt", weights_only=False)
    assert [*dropped] == ["netG", "netD", "optimG"]


def test_where_names_say_nothing_shapes_do(tmp_path: Path) -> None:
    keys = ("encoder", "decoder", "first", "second")
    with opened(tmp_path / "in.pt", pair(*keys)()) as ckpt:
        out = mc.drop(ckpt.replace(key=("decoder",)), GONE)
        counts = {path_text(at): len(node["state"]) for at, node in out.sections.optimizers}
    assert counts == {"first": 4, "second": 2}


def test_where_nothing_says_whose_it_is_an_edit_is_refused(tmp_path: Path) -> None:
    keys = ("left", "right", "first", "second")
    with opened(tmp_path / "in.pt", pair(*keys, twins=True)()) as ckpt:
        chosen = ckpt.replace(key=("left",))
        with pytest.raises(AmbiguousError, match="whose optimizer 'first' is, is not clear") as e:
            mc.drop(chosen, GONE)
        assert "--optimizer drop" in (e.value.hint or "")
        out = mc.drop(chosen, GONE, optimizer="drop")
        assert len(out.state_dict()) == 2
        renamed = mc.rename(chosen, "2=head")  # what has no names needs no change
        assert "head.weight" in renamed.state_dict()


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("named", [False, True], ids=["numbers", "names"])
def test_one_optimizer_over_two_models_is_cut_with_both_in_view(
    named: bool, order: int, tmp_path: Path
) -> None:
    p = Two()
    models = {"encoder": p.g, "decoder": p.d}
    parameters: Any = [
        (f"{key}.{name}" if named else "", parameter)
        for key in [*models][::order]
        for name, parameter in models[key].named_parameters()
    ]
    optimizer = torch.optim.Adam([parameter for _, parameter in parameters])
    optimizer.step()
    state = optimizer.state_dict()
    if named:
        state["param_groups"][0]["param_names"] = [name for name, _ in parameters]
    for i, (_, parameter) in enumerate(parameters):
        state["state"][i] = {"exp_avg": parameter.detach().clone()}
    saved = {**{key: model.state_dict() for key, model in models.items()}, "optimizer": state}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        mc.save(mc.drop(ckpt.replace(key=("encoder",)), GONE), tmp_path / "out.pt")
    out = torch.load(tmp_path / "out.pt", weights_only=True)
    kept = [
        value
        for key in [*models][::order]
        for name, value in models[key].state_dict().items()
        if not (key == "encoder" and name.startswith(GONE))
    ]
    assert len(out["optimizer"]["state"]) == 6
    for i, value in enumerate(kept):
        assert torch.equal(out["optimizer"]["state"][i]["exp_avg"], value)
    assert len(out["decoder"]) == 4


def test_a_copy_follows_its_own_model(tmp_path: Path) -> None:
    p = Two(twins=True)
    saved = {
        "critic1": p.g.state_dict(),
        "critic2": p.d.state_dict(),
        "critic1_target": copy.deepcopy(p.g).state_dict(),
        "critic2_target": copy.deepcopy(p.d).state_dict(),
        "critic1_optim": p.og.state_dict(),
        "critic2_optim": p.od.state_dict(),
    }
    with opened(tmp_path / "in.pt", saved) as ckpt:
        out = mc.drop(ckpt.replace(key=("critic2",)), GONE)
        mc.save(out, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=True)
    sizes = {key: len(node.get("state", node)) for key, node in found.items()}
    assert sizes == {key: 2 if "2" in key else 4 for key in saved}


# ---------------------------------------------------------------------- what is not known


@pytest.mark.parametrize("at", ["optimizer", "trainer.optim_g", "run.parts.1.optimizer_state"])
def test_what_is_called_an_optimizer_and_is_none_is_named(at: str, tmp_path: Path) -> None:
    p = One()
    inner: Any = {"moments": {"0.weight": torch.ones(8, 4)}}
    for label in reversed(at.split(".")):
        inner = [3, inner] if label == "1" else {label: inner}
    saved = {"model": p.model, "known": {"optimizer": p.state}, **inner}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        texts = [note.text for note in mc.drop(ckpt, GONE).notes if "called like" in note.text]
    assert [text.partition(" is ")[0] for text in texts] == [f"'{at}'"]


def test_a_copy_that_does_not_follow_is_named(tmp_path: Path) -> None:
    p = One()
    saved = {"model": p.model, "ema": {"a.weight": torch.ones(3, 3), "b.weight": torch.ones(2)}}
    with opened(tmp_path / "in.pt", saved) as ckpt:
        notes = mc.drop(ckpt, GONE).notes
    assert any("'ema' has none of these names: it stays as it was" in n.text for n in notes)


def test_a_copy_that_cannot_follow_is_refused(tmp_path: Path) -> None:
    p = One()
    layout = LAYOUTS["LitEma"](p)
    with (
        opened(tmp_path / "in.pt", layout) as ckpt,
        pytest.raises(RefusedError, match=r"is a copy of 'model\.diffusion"),
    ):
        mc.rename(ckpt, "model.diffusion.0=other.0")


def test_an_optimizer_of_other_tensors_is_refused(tmp_path: Path) -> None:
    p = One()
    saved = {"model": net(), "optimizer": p.optim}  # pickled, and over another model
    with (
        opened(tmp_path / "in.pt", saved) as ckpt,
        pytest.raises(RefusedError, match="not the model's own"),
    ):
        mc.drop(ckpt, GONE)


@pytest.mark.parametrize("trains", [True, False])
def test_a_pickled_optimizer_keeps_the_models_parameters(trains: bool, tmp_path: Path) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 4)).sum().backward()
    optimizer.step()
    for parameter in model[0].parameters():
        parameter.requires_grad = not trains
    with opened(tmp_path / "in.pt", {"model": model, "optimizer": optimizer}) as ckpt:
        out = mc.unfreeze(ckpt, "0") if trains else mc.freeze(ckpt, "0")
        mc.save(out, tmp_path / "out.pt")
    found = torch.load(tmp_path / "out.pt", weights_only=False)
    held = found["optimizer"].param_groups[0]["params"]
    own = [*found["model"].parameters()]
    assert all(a is b for a, b in zip(held, own, strict=True))
    assert {id(key) for key in found["optimizer"].state} == {id(p) for p in own}
    assert [p.requires_grad for p in own] == [trains, trains, True, True]
