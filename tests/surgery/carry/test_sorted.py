"""A Trainer's folder, whose names are sorted: each moment stays its parameter's, or not cut."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import modelctl as mc
import modelctl.nn as mnn
from modelctl.core.matching import module_order
from modelctl.core.matching.decay import decay_groups
from modelctl.core.matching.module_order import possible_orders, table
from modelctl.errors import AmbiguousError

WIDTH = 4  # the vocabulary, too: shapes tell as little as they can


class Norm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))


class Part(nn.Module):
    """A module with linear layers, a norm or whatever else under these names, in this order."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


def linears(*names: str) -> Part:
    return Part(**{name: nn.Linear(WIDTH, WIDTH, bias=False) for name in names})


def llama(q: str = "q_proj") -> Part:
    """As transformers' LlamaForCausalLM has them; 11 layers, so that ``10`` comes before ``2``."""
    layers = [
        Part(
            self_attn=linears(q, "k_proj", "v_proj", "o_proj"),
            mlp=linears("gate_proj", "up_proj", "down_proj"),
            input_layernorm=Norm(),
            post_attention_layernorm=Norm(),
        )
        for _ in range(11)
    ]
    embedding = nn.Embedding(WIDTH, WIDTH)
    model = Part(embed_tokens=embedding, layers=nn.ModuleList(layers), norm=Norm())
    return Part(model=model, lm_head=nn.Linear(WIDTH, WIDTH, bias=False))


def trainer(model: nn.Module, folder: Path) -> torch.optim.Optimizer:
    """What the Trainer saves after a step: two groups, and names sorted."""
    named = dict(model.named_parameters())
    decay = [p for name, p in named.items() if "norm" not in name and "bias" not in name]
    other = [p for name, p in named.items() if "norm" in name or "bias" in name]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups)
    for i, parameter in enumerate(named.values()):
        parameter.grad = torch.full_like(parameter, i + 1.0)
    optimizer.step()
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors", metadata={"format": "pt"})
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    state = {"epoch": 0.5, "global_step": 1, "log_history": []}
    (folder / "trainer_state.json").write_text(json.dumps(state))
    return optimizer


def assert_in_step(model: nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """The folder's optimizer has the state of just the model's own parameters, in their order."""
    saved = torch.load(folder / "optimizer.pt", weights_only=True)
    mine = set(model.parameters())
    groups = [[p for p in group["params"] if p in mine] for group in optimizer.param_groups]
    assert [len(group["params"]) for group in saved["param_groups"]] == [*map(len, groups)]
    assert len(saved["state"]) == sum(map(len, groups))
    for group, own in zip(saved["param_groups"], groups, strict=True):
        for number, parameter in zip(group["params"], own, strict=True):
            for key, value in optimizer.state[parameter].items():
                assert torch.equal(saved["state"][number][key], value)


@pytest.mark.parametrize(
    ("edit", "gone"),
    [
        ({"do": "drop", "pattern": "model.layers.10"}, "model.layers.10"),
        ({"do": "drop", "pattern": "*.k_proj.weight"}, "*.k_proj"),
        ({"do": "keep", "pattern": "model"}, "lm_head"),
        ({"do": "strip-head"}, "lm_head"),
    ],
)
def test_what_is_cut(tmp_path: Path, edit: dict[str, Any], gone: str) -> None:
    model = llama()
    optimizer = trainer(model, tmp_path / "in")
    mc.edit(tmp_path / "in", edit, output=f"{tmp_path}/out/")
    layers = [f"model.layers.{i}.self_attn.k_proj" for i in range(11)]
    for path in layers if "*" in gone else [gone]:
        owner, _, name = path.rpartition(".")
        delattr(model.get_submodule(owner), name)
    assert_in_step(model, optimizer, tmp_path / "out")


def test_under_another_prefix(tmp_path: Path) -> None:
    model = llama()
    optimizer = trainer(model, tmp_path / "in")
    recipe: list[dict[str, Any]] = [
        {"do": "add-prefix", "prefix": "net."},
        {"do": "drop", "pattern": "net.lm_head"},
        {"do": "rename", "map": "net.model=backbone"},
    ]
    mc.edit(tmp_path / "in", recipe, output=f"{tmp_path}/out/")
    del model.lm_head
    assert_in_step(model, optimizer, tmp_path / "out")
    with mc.open(tmp_path / "out") as ckpt:
        assert all(name.startswith("backbone.") for name in ckpt.state_dict())


def test_names_that_change_places(tmp_path: Path) -> None:
    """The live model has its parameters where it had them: the moments move."""
    model = llama()
    optimizer = trainer(model, tmp_path / "in")
    layer = "model.layers.10.self_attn"
    swap = [f"{layer}.q_proj=x", f"{layer}.v_proj={layer}.q_proj", f"x={layer}.v_proj"]
    mc.edit(tmp_path / "in", {"do": "rename", "map": swap}, output=f"{tmp_path}/out/")
    saved = torch.load(tmp_path / "out" / "optimizer.pt", weights_only=True)
    names = [name for name, _ in model.named_parameters() if "norm" not in name]
    for name, other in (("q_proj", "v_proj"), ("v_proj", "q_proj"), ("k_proj", "k_proj")):
        was = model.get_parameter(f"{layer}.{other}.weight")
        now = saved["state"][names.index(f"{layer}.{name}.weight")]
        assert torch.equal(now["exp_avg"], optimizer.state[was]["exp_avg"])


def test_it_is_resumed(tmp_path: Path) -> None:
    """After a layer was dropped: each parameter that stayed has its own state."""
    model = llama()
    optimizer = trainer(model, tmp_path / "in")
    mc.edit(tmp_path / "in", {"do": "drop", "pattern": "model.layers.1"}, output=f"{tmp_path}/out/")
    fresh = llama()
    kept = {n: p for n, p in fresh.named_parameters() if not n.startswith("model.layers.1.")}
    other = torch.optim.AdamW(
        [
            {"params": [(n, p) for n, p in kept.items() if "norm" not in n], "weight_decay": 0.1},
            {"params": [(n, p) for n, p in kept.items() if "norm" in n], "weight_decay": 0.0},
        ]
    )
    mnn.resume(tmp_path / "out", model=fresh, optimizer=other, on_mismatch="skip")
    for name, parameter in kept.items():
        was = model.get_parameter(name)
        assert torch.equal(parameter, was)
        assert torch.equal(other.state[parameter]["exp_avg"], optimizer.state[was]["exp_avg"])


@pytest.mark.parametrize("edit", ["drop", "keep"])
def test_an_unknown_architecture_is_refused(tmp_path: Path, edit: str) -> None:
    trainer(llama(q="query_of_mine"), tmp_path / "in")
    with pytest.raises(AmbiguousError) as caught:
        mc.edit(
            tmp_path / "in",
            {"do": edit, "pattern": "lm_head" if edit == "drop" else "model"},
            output=f"{tmp_path}/out/",
        )
    text = "no known architecture has k_proj, o_proj, query_of_mine, v_proj in a 'self_attn'"
    assert text in str(caught.value)
    assert "--optimizer drop" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("others", ["one", "two"])
def test_orders_that_architectures_do_not_share_prove_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, others: str
) -> None:
    """q, k, v in one, k, v, q in another, or both in one, and nothing else to tell them by."""
    names = frozenset(("q_proj", "k_proj", "v_proj"))
    both = [["q_proj", "k_proj", "v_proj"], ["k_proj", "v_proj", "q_proj"]]
    known = {"a": {("", names): both}}
    if others == "two":
        known = {"a": {("", names): both[:1]}, "b": {("", names): both[1:]}}
    monkeypatch.setattr(module_order, "table", lambda: module_order.Table({}, known))
    trainer(linears("q_proj", "k_proj", "v_proj"), tmp_path / "in")
    with pytest.raises(AmbiguousError, match="several orders"):
        mc.edit(tmp_path / "in", {"do": "drop", "pattern": "q_proj"}, output=f"{tmp_path}/out/")
    known["a"][("", names)] = both[:1]
    known.pop("b", None)
    mc.edit(tmp_path / "in", {"do": "drop", "pattern": "q_proj"}, output=f"{tmp_path}/out/")


def test_state_of_another_shape_or_of_some_alone_proves_nothing(tmp_path: Path) -> None:
    trainer(llama(), tmp_path / "in")
    whole = torch.load(tmp_path / "in" / "optimizer.pt", weights_only=True)
    del whole["state"][5]
    torch.save(whole, tmp_path / "in" / "optimizer.pt")
    with pytest.raises(AmbiguousError, match="some have no state"):
        mc.edit(tmp_path / "in", {"do": "strip-head"}, output=f"{tmp_path}/out/")


def test_a_frozen_part_is_refused(tmp_path: Path) -> None:
    model = llama()
    trainer(model, tmp_path / "in")
    saved = torch.load(tmp_path / "in" / "optimizer.pt", weights_only=True)
    saved["param_groups"][0]["params"].remove(7)
    del saved["state"][7]
    torch.save(saved, tmp_path / "in" / "optimizer.pt")
    with pytest.raises(AmbiguousError, match="some of them are not in it"):
        mc.edit(tmp_path / "in", {"do": "strip-head"}, output=f"{tmp_path}/out/")


# ---------------------------------------------------------------------- which group decays


def test_which_of_two_groups_decays() -> None:
    shapes = {"a.weight": (3, 2), "a.bias": (3,), "norm.weight": (3,), "scale": (3,)}
    first = [(0,), (1,), (1,), (0, 1)]
    assert decay_groups(shapes, [0.1, 0.0]) == first
    assert decay_groups(shapes, [0.0, 0.0]) == first
    assert decay_groups(shapes, [0.0, 0.1]) == [(1,), (0,), (0,), (0, 1)]
    for unknown in ([0.1, 0.2], [0.1], [None, 0.0], [0.1, 0.0, 0.0]):
        assert decay_groups(shapes, unknown) is None


# ---------------------------------------------------------------------- the table


def test_what_the_table_says_is_what_models_have() -> None:
    """The table is as good as the models that are installed."""
    pytest.importorskip("transformers")
    pytest.importorskip("torchvision")
    pytest.importorskip("timm")
    sys.path.insert(0, str(Path(__file__).parents[3] / "docs"))
    try:
        import make_orders
    finally:
        sys.path.pop(0)
    models = [
        *make_orders.of_transformers(["llama", "bert", "gpt2", "bart", "vit", "clip", "t5"]),
        *make_orders.of_torchvision(["resnet18", "vit_b_16", "swin_t", "fcos_resnet50_fpn"]),
        *make_orders.of_timm(["vision_transformer", "efficientnet"]),
    ]
    made = make_orders.make(models)
    assert len(made["architectures"]) == 13
    for name, numbers in made["architectures"].items():
        known = table().architectures[name]
        for label, *order in map(made["orders"].__getitem__, numbers):
            assert order in known[label, frozenset(order)], "run: python docs/make_orders.py"
    for _, model in models:
        names = [name for name, _ in model.named_parameters()]
        assert names in possible_orders(sorted(names))
