"""A state_dict that stands otherwise in a folder than in a file: gathered, and scattered again."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
from hypothesis import given

from modelctl.core.dtypes import BY_NAME
from modelctl.core.storages import MemoryStorage
from modelctl.core.tensors import TensorRef
from modelctl.formats.distributed.arranged import gather, scatter

# ---------------------------------------------------------------------- the trees alone

_DTYPE = BY_NAME["float32"]


def a_tensor(number: float = 0) -> TensorRef:
    return TensorRef(_DTYPE, (), MemoryStorage(int(number).to_bytes(4, "little")))


_NAMES = st.sampled_from(("0.weight", "0.bias", "head.weight", "a.b.c", "weight"))
_MODELS = st.lists(_NAMES, unique=True, min_size=1, max_size=4)
_LRS = st.sampled_from((0.1, 0.2, (0.9, 0.99), None))


@st.composite
def torchtitan(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(_MODELS)
    root: dict[str, Any] = {name: a_tensor(i) for i, name in enumerate(names)}
    optimizer: dict[str, Any] = {}
    for name in draw(st.lists(st.sampled_from(names), unique=True)):
        optimizer[f"state.{name}.exp_avg"] = a_tensor()
        if draw(st.booleans()):
            optimizer[f"state.{name}.factors.0"] = a_tensor()
    for name in names:
        optimizer[f"param_groups.{name}.lr"] = draw(_LRS)
    return {**root, "optimizer": optimizer, "train_state": {"step": a_tensor(3)}, "epoch": 2}


@st.composite
def megatron(draw: st.DrawFn) -> dict[str, Any]:
    names = draw(_MODELS)
    root: dict[str, Any] = {name: a_tensor(i) for i, name in enumerate(names)}
    root |= {f"a._extra_state/shard_{i}_2": object() for i in range(draw(st.integers(0, 2)))}
    for chain in draw(st.sampled_from((("",), ("chained_0.", "chained_1."), ()))):
        for kind in ("exp_avg", "fp32_param"):
            root |= {f"{chain}optimizer.state.{kind}.{name}": a_tensor() for name in names}
    return {**root, "rng_state/shard_0.0_1.1": [{"x": a_tensor()}]}


_ANY = st.recursive(
    st.one_of(st.integers(), st.builds(a_tensor)),
    lambda inner: st.dictionaries(
        st.one_of(
            _NAMES,
            st.sampled_from(("model", "optimizer", "common", "state.a.x", "param_groups.a.lr")),
            st.sampled_from(("optimizer.state.exp_avg.a.b", "optimizer.state.x", "step")),
        ),
        inner,
        max_size=4,
    ),
    max_leaves=12,
)


@given(st.one_of(torchtitan(), megatron(), _ANY.filter(lambda one: isinstance(one, dict))))
def test_what_is_gathered_is_scattered_again(saved: dict[str, Any]) -> None:
    root, arranged = gather(saved, whole=False)
    assert scatter(root, arranged) == saved


@given(torchtitan())
def test_groups_have_the_settings_of_their_parameters(saved: dict[str, Any]) -> None:
    root, _ = gather(saved, whole=False)
    groups = root["optimizer"]["param_groups"]
    assert {name: group["lr"] for group in groups for name in group["params"]} == {
        key.removeprefix("param_groups.").removesuffix(".lr"): value
        for key, value in saved["optimizer"].items()
        if key.startswith("param_groups.")
    }
    settings = [repr(group["lr"]) for group in groups]
    assert len(set(settings)) == len(settings)


def test_a_state_dict_stays_one() -> None:
    saved = {"0.weight": a_tensor(), "0._extra_state": {"x": a_tensor()}, "0.steps": 3}
    assert gather(saved, whole=False)[0] == saved


def test_a_checkpoint_with_a_tensor_beside_its_model_stays_one() -> None:
    model = {"0.weight": a_tensor(), "0.bias": a_tensor()}
    saved = {"net": model, "loss.weight": a_tensor(), "epoch": 3}
    assert gather(saved, whole=False)[0] == saved
