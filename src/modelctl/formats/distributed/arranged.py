"""How a state_dict stands in a folder, and as what kind of tree it is read.

torchtitan puts the model's tensors at the top, beside everything else, and an optimizer flat, as
``torch.distributed.checkpoint.state_dict`` does with ``flatten_optimizer_state_dict``
(``state.NAME.exp_avg``, ``param_groups.NAME.lr``). Megatron puts all tensors at the top,
``optimizer.state.exp_avg.NAME`` among them (megatron/core/dist_checkpointing), and what each of
its ranks keeps under ``KEY/shard_OFFSET_SHAPE``. Both become what other trainings save, a model
and an optimizer by themselves, and are laid out again as they were.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Hashable, Iterator, Mapping
from typing import Any, NamedTuple

from ...core.nodes import Composite, mapping
from ...core.sections.kinds import is_extra_state, is_state_dict, like_layers
from ...core.tensors import TensorRef
from ...core.tree import Path, is_leaf

MODEL = "model"
# 'chained_0.' is of the experts' or the dense part's optimizer, where Megatron has several.
_OF_MEGATRON = re.compile(r"((?:chained_\d+\.)?optimizer)\.state\.([^.]+)\.(.+)", re.DOTALL)
_SHARD_OBJECT = re.compile(r"/shard_[\d.]+_[\d.]+$", re.ASCII)


class Arrangement(NamedTuple):
    """What of a tree stands elsewhere in its folder.

    Attributes:
        model: whether the model's entries stand at the top.
        flat: the keys of optimizers that torch has flattened.
        megatron: the keys of optimizers whose state is among the model's tensors.
        whole: whether each entry at the top is one tensor or one object, whatever is in it: saved
            with ``flatten_state_dict=False``.
    """

    model: bool = False
    flat: tuple[str, ...] = ()
    megatron: tuple[str, ...] = ()
    whole: bool = False


def gather(saved: dict[str, Any], *, whole: bool) -> tuple[dict[str, Any], Arrangement]:
    """A state_dict as a folder has it as a tree with a model and optimizers."""
    root = dict(saved)
    flat = {key: made for key, node in root.items() if (made := _unflattened(node)) is not None}
    root.update(flat)
    states = {key: found for key in root if (found := _OF_MEGATRON.fullmatch(key))}
    states = {key: found for key, found in states.items() if found[1] not in root}
    megatron: dict[str, Any] = {}
    for key, found in states.items():
        optimizer = megatron.setdefault(found[1], {"state": {}})
        optimizer["state"].setdefault(found[3], {})[found[2]] = root.pop(key)
    for optimizer in megatron.values():  # its groups are in common.pt, and name no parameter
        optimizer["param_groups"] = [{"params": [*optimizer["state"]]}]
    model = _model_at_the_top(root) if MODEL not in root else {}
    if model and not (megatron or _has_others(root)):
        model = {}
    if model:
        rest = {key: node for key, node in root.items() if key not in model}
        root = {MODEL: model, **rest}
    root.update(megatron)
    return root, Arrangement(bool(model), tuple(flat), tuple(megatron), whole)


def scatter(root: Any, arranged: Arrangement) -> dict[str, Any]:
    """The state_dict as the folder is to have it: what :func:`gather` was given."""
    entries = mapping(root) or {}
    saved: dict[str, Any] = {}
    for key, node in entries.items():
        inner = mapping(node)
        if key == MODEL and arranged.model and inner is not None:
            saved.update(inner)
        elif key in arranged.flat and inner is not None:
            saved[key] = dict(_flattened(inner))
        elif key in arranged.megatron and inner is not None:
            for name, state in (mapping(inner.get("state")) or {}).items():
                for kind, value in (mapping(state) or {}).items():
                    saved[f"{key}.state.{kind}.{name}"] = value
        else:
            saved[key] = node
    return saved


def entries_of(saved: dict[str, Any]) -> Iterator[tuple[Path, Any]]:
    """The entries of a state_dict that is not taken apart."""
    return (((str(key),), node) for key, node in saved.items())


# ---------------------------------------------------------------------- the model


def _model_at_the_top(root: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors at the top, with what modules keep beside theirs, where they are a model's."""
    found = {
        key: node
        for key, node in root.items()
        if isinstance(node, TensorRef | Composite) or is_extra_state(key)
    }
    named = (key for key, node in found.items() if isinstance(node, TensorRef | Composite))
    return found if like_layers(named) else {}


def _has_others(root: Mapping[str, Any]) -> bool:
    """Whether there are other parts of a training beside them, and no model among those."""
    others = [
        (key, node)
        for key, node in root.items()
        if not is_leaf(node) and not is_extra_state(key) and not isinstance(node, Composite)
    ]
    parts = [node for key, node in others if "." not in key or _SHARD_OBJECT.search(key)]
    return bool(parts) and not any(
        is_state_dict(node) and any("." in str(name) for name in mapping(node) or ())
        for node in parts
    )


# ---------------------------------------------------------------------- flat optimizers


def _unflattened(node: Any) -> dict[str, Any] | None:
    """An optimizer that torch has flattened, as it was, with names for ids; None for what is none.
    Groups of the same settings are one: where it had two, nothing says so."""
    entries = mapping(node)
    if not entries:
        return None
    settings: dict[str, dict[str, Any]] = {}
    states: dict[str, Any] = {}
    for key, value in entries.items():
        kind, _, rest = key.partition(".") if isinstance(key, str) else ("", "", "")
        name, _, what = rest.rpartition(".")
        if not name or kind not in ("state", "param_groups"):
            return None
        if kind == "state":
            states[rest] = value
        else:
            settings.setdefault(name, {})[what] = value
    state: dict[str, dict[str, Any]] = {}
    for rest, value in states.items():
        name, what = _split(rest, settings)
        state.setdefault(name, {})[what] = value
    groups: dict[Any, dict[str, Any]] = {}
    for name, values in settings.items():
        same = tuple((what, _compared(value)) for what, value in sorted(values.items()))
        group = groups.setdefault(same, {"params": [], **values})
        group["params"].append(name)
    if not groups:
        groups[()] = {"params": [*state]}
    return {"state": state, "param_groups": [*groups.values()]}


def _split(rest: str, names: Collection[str]) -> tuple[str, str]:
    """A parameter's name, and what is kept of it: a state may have dots, too."""
    end = rest.rfind(".")
    while end > 0:
        if rest[:end] in names:
            return rest[:end], rest[end + 1 :]
        end = rest.rfind(".", 0, end)
    name, _, what = rest.rpartition(".")
    return name, what


def _flattened(optimizer: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """As torch flattens it: ``_flatten_optim_state_dict`` of its checkpoint/state_dict.py."""
    for name, state in (mapping(optimizer.get("state")) or {}).items():
        for kind, value in (mapping(state) or {}).items():
            yield f"state.{name}.{kind}", value
    for group in optimizer.get("param_groups") or ():
        entries = mapping(group) or {}
        for name in entries.get("params", ()):
            for what, value in entries.items():
                if what != "params":
                    yield f"param_groups.{name}.{what}", value


def _compared(value: Any) -> Hashable:
    """What tells whether two settings are the same."""
    if isinstance(value, TensorRef):
        return value.identity
    if isinstance(value, tuple | list):
        return (type(value), *map(_compared, value))
    return (type(value), value) if isinstance(value, Hashable) else id(value)
