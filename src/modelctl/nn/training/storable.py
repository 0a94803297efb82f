"""Values of a training script as plain ``torch.load(weights_only=True)`` takes them, or a refusal
that names the place."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ...core.text import some
from ...errors import RefusedError, UnsupportedError
from ..loading.sharded import check_kind, is_sharded
from ..loading.tensors import SPARSE, is_declared
from ..model_names import is_lazy

_ATOMS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device, torch.Size)


def storable(value: Any, where: str, *, sharded: bool = False) -> Any:
    """The value as ``torch.load(weights_only=True)`` will read it; ``where`` is its key. DTensors
    only pass where it is ``sharded``: they go to torch.distributed.checkpoint.

    numpy scalars become Python's, and a subclass of dict other than OrderedDict and Counter
    becomes a dict.

    Raises:
        RefusedError: something that torch would refuse to load; names its key.
    """
    try:
        return _storable(value, where, sharded)
    except RecursionError:
        raise RefusedError(f"'{where}' holds itself, or is nested too deeply") from None


def _storable(value: Any, where: str, sharded: bool) -> Any:
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _storable(value.item(), where, sharded)
    if is_sharded(value):
        return _part(value, where, sharded)
    if isinstance(value, Tensor):
        return _plain_tensor(value, where)
    if type(value) in _ATOMS:
        return value
    if isinstance(value, Mapping):
        items = {
            _storable(key, f"{where} (a key)", False): _storable(inner, f"{where}.{key}", sharded)
            for key, inner in value.items()
        }
        if type(value) is Counter:
            return Counter(items)
        if type(value) is not OrderedDict:
            return items
        made = OrderedDict(items)
        if "_metadata" in value.__dict__:  # a state_dict's
            metadata = value.__dict__["_metadata"]
            made.__dict__["_metadata"] = _storable(metadata, f"{where}._metadata", False)
        return made
    if type(value) in (list, tuple):
        return type(value)(
            _storable(inner, f"{where}.{i}", sharded) for i, inner in enumerate(value)
        )
    raise RefusedError(
        f"'{where}' is a {type(value).__module__}.{type(value).__qualname__}, which "
        "torch.load(weights_only=True) refuses",
        hint=_advice(value),
    )


def _part(value: Tensor, where: str, sharded: bool) -> Tensor:
    """A DTensor, where it can be saved: of a sharded model."""
    if not sharded:
        raise RefusedError(
            f"'{where}' is a DTensor, and the model is not sharded: it can't be saved alone",
            hint="save value.full_tensor(), on every rank",
        )
    try:
        check_kind(where, value, None)
    except UnsupportedError as e:
        raise RefusedError(e.message, hint=e.hint) from None
    return value


def _plain_tensor(value: Tensor, where: str) -> Tensor:
    """The tensor itself, where plain torch can load it and it has something to load."""
    reason, hint = None, "save a plain tensor of its values"
    if is_lazy(value):
        reason, hint = "has no shape yet", "save after the first batch went through the model"
    elif value.is_meta:
        reason, hint = "is on meta, without values", "load_into(model, path) gives it some"
    elif is_declared(type(value)) and not value.is_nested:
        _storable(vars(value), where, False)  # the tensors that it wraps
        return value
    elif type(value) not in (Tensor, nn.Parameter):
        reason = f"is a {type(value).__module__}.{type(value).__qualname__}"
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
