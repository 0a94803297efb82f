"""Values between a training script and a checkpoint that plain ``torch.load`` can read.

Out: what ``torch.load(weights_only=True)`` takes, or a refusal that names the place. In: the
inert tree of a file as Python and torch values, without running what it names.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..core.dtypes import BY_NAME
from ..core.nodes import ORDERED_DICT, Composite, Global, Obj
from ..core.tensors import TensorRef
from ..core.tree import walk
from ..errors import RefusedError, UnsupportedError
from .naming import is_lazy
from .tensors import SPARSE, sparse_tensor, to_tensors
from .text import some

_ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)
_DICTS: dict[Any, Callable[[], Any]] = {
    ORDERED_DICT: OrderedDict,
    Global("collections", "Counter"): Counter,
    Global("collections", "defaultdict"): dict,
}
_SIZE = Global("torch", "Size")
_DEVICE = Global("torch", "device")


def storable(value: Any, where: str) -> Any:
    """The value as ``torch.load(weights_only=True)`` will read it; ``where`` is its key.

    numpy scalars become Python's, and a subclass of dict other than OrderedDict and Counter
    becomes a dict.

    Raises:
        RefusedError: something that torch would refuse to load; names its key.
    """
    try:
        return _storable(value, where)
    except RecursionError:
        raise RefusedError(f"'{where}' holds itself, or is nested too deeply") from None


def _storable(value: Any, where: str) -> Any:
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _storable(value.item(), where)
    if isinstance(value, Tensor):
        return _plain_tensor(value, where)
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Mapping):
        items = {
            _storable(key, f"{where} (a key)"): _storable(inner, f"{where}.{key}")
            for key, inner in value.items()
        }
        if type(value) is Counter:
            return Counter(items)
        if type(value) is not OrderedDict:
            return items
        made = OrderedDict(items)
        if "_metadata" in value.__dict__:  # a state_dict's
            metadata = value.__dict__["_metadata"]
            made.__dict__["_metadata"] = _storable(metadata, f"{where}._metadata")
        return made
    if type(value) in (list, tuple):
        return type(value)(_storable(inner, f"{where}.{i}") for i, inner in enumerate(value))
    raise RefusedError(
        f"'{where}' is a {type(value).__module__}.{type(value).__qualname__}, which "
        "torch.load(weights_only=True) refuses",
        hint=_advice(value),
    )


def _plain_tensor(value: Tensor, where: str) -> Tensor:
    """The tensor itself, where plain torch can load it and it has something to load."""
    reason, hint = None, "save a plain tensor of its values"
    if is_lazy(value):
        reason, hint = "has no shape yet", "save after the first batch went through the model"
    elif value.is_meta:
        reason, hint = "is on meta, without values", "load_into(model, path) gives it some"
    elif type(value) not in (Tensor, nn.Parameter):
        reason = f"is a {type(value).__module__}.{type(value).__qualname__}"
        hint = f"{hint}; torch.distributed.checkpoint is for sharded ones"
    elif value.is_nested:
        reason = "is a nested tensor"
    elif value.is_quantized:
        reason, hint = "is quantized", "save value.int_repr(), with its scale and zero point"
    elif value.layout not in (torch.strided, *SPARSE.values()):
        reason, hint = f"has the layout {value.layout}", "save value.to_dense()"
    elif vars(value):
        raise RefusedError(
            f"'{where}' has attributes of its own ({some([*vars(value)], 3)}), which get lost",
            hint="save value.detach(), which has none, and beside it what they say",
        )
    if reason is not None:
        raise RefusedError(f"'{where}' {reason}: nothing that torch.load can bring back", hint=hint)
    return value


def _advice(value: Any) -> str:
    if isinstance(value, np.generic):
        return "save float(it)"
    if isinstance(value, Enum):
        return "save its .value"
    if isinstance(value, np.ndarray):
        return "save torch.from_numpy(array)"
    if isinstance(value, set | frozenset):
        return "save sorted(the_set)"
    if hasattr(value, "__fspath__"):
        return "save str(path)"
    if hasattr(value, "state_dict"):
        return "save its state_dict()"
    if hasattr(value, "__dict__"):
        return "save vars(it), or its numbers, texts and tensors"
    return "save it as numbers, texts, tensors, lists and dicts"


def live(node: Any, where: str) -> Any:
    """The tree of a file as values: tensors (on the CPU, tied ones one), containers, atoms.

    Raises:
        UnsupportedError: something else, which would have to be run or imported; names its key.
    """
    refs = {id(found): found for _, found in walk(node) if isinstance(found, TensorRef)}
    tensors = to_tensors(refs)
    # by identity: what is shared stays shared, and a few shared lists can't spell out billions
    made: dict[int, Any] = {}

    def fill(shell: Any, items: Mapping[Any, Any], where: str) -> None:
        for key, inner in items.items():  # update() of a Counter would count
            shell[key] = of(inner, f"{where}.{key}")

    def of(node: Any, where: str) -> Any:
        if isinstance(node, bool | int | float | str | bytes | None):
            return node
        if isinstance(node, TensorRef):
            return tensors[id(node)]
        if isinstance(node, Composite) and node.layout in SPARSE and id(node) not in made:
            made[id(node)] = sparse_tensor(node, {k: tensors[id(p)] for k, p in node.parts.items()})
        if id(node) not in made:
            made[id(node)] = _named(node)
            if made[id(node)] is None:
                build(node, where)
        return made[id(node)]

    def build(node: Any, where: str) -> None:
        if isinstance(node, dict):
            made[id(node)] = {}
            fill(made[id(node)], node, where)
        elif type(node) is list:
            made[id(node)] = filled = []
            filled += [of(inner, f"{where}.{i}") for i, inner in enumerate(node)]
        elif type(node) is tuple:
            made[id(node)] = tuple(of(inner, f"{where}.{i}") for i, inner in enumerate(node))
        elif isinstance(node, Obj) and isinstance(node.func, Global) and node.func in _DICTS:
            made[id(node)] = _DICTS[node.func]()
            counted = node.args[0] if node.args and isinstance(node.args[0], dict) else {}
            fill(made[id(node)], {**counted, **node.entries}, where)
        else:
            what = node.func if isinstance(node, Obj) else node
            raise UnsupportedError(
                f"'{where}' is a {what}, which is not made from a file",
                hint="save it as numbers, texts, tensors, lists and dicts",
            )

    return of(node, where)


def _named(node: Any) -> Any:
    """A dtype, a device or a size."""
    if isinstance(node, Global) and node.module == "torch" and node.name in BY_NAME:
        return getattr(torch, node.name, None)
    if isinstance(node, Obj) and len(node.args) in (1, 2):
        if node.func == _SIZE and isinstance(node.args[0], tuple | list):
            return torch.Size(node.args[0])
        if node.func == _DEVICE and isinstance(node.args[0], str):
            return torch.device(*node.args)
    return None
