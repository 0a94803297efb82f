"""The rows and totals of a live model: what each module holds, and what a forward did there."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...inspection.summary.folding import folded
from ..model_names import kind_of, numel
from .said import Shapes
from .trace import Trace

# A table that is longer is folded, and shows fewer levels.
_MOST = 60


class Layer(NamedTuple):
    """A module, or several alike (``repeat``) in one row.

    Attributes:
        path, level, type: its name, how deep it is, its class.
        kernel, stride: those of a convolution or pooling, or None.
        calls: how often a forward called it; None where no forward was run.
        out_shape: of what it returned first: a shape, or a mapping of shapes where it returned
            several tensors; None where it was not called.
        params, trainable, buffers: elements; a tied tensor counts where it first is.
        nbytes: bytes of both.
        macs: multiply-accumulates of all its calls; None where they are not known.
        uncounted: the operators that could not be counted.
        touched: whether some operator got one of its tensors: a module that was not called may
            have lent them to another.
        tied: whether all its tensors are counted in rows before.
    """

    path: str
    level: int
    type: str
    kernel: tuple[int, ...] | None
    stride: tuple[int, ...] | None
    repeat: int
    tensors: int
    calls: int | None
    out_shape: Shapes | None
    params: int
    trainable: int
    buffers: int
    nbytes: int
    macs: int | None
    uncounted: tuple[str, ...]
    touched: bool
    tied: bool


class _Own(NamedTuple):
    """What a module holds itself."""

    tensors: int
    params: int
    trainable: int
    buffers: int
    nbytes: int
    ids: frozenset[int]


def layers(model: nn.Module, trace: Trace | None, depth: int | None) -> list[Layer]:
    """Modules down to ``depth`` (None: all), each tensor and operator in exactly one of them."""
    own = _own(model)
    return _rows(dict(model.named_modules()), own, trace, _groups(own, trace, depth))


def _groups(
    own: Mapping[str, _Own], trace: Trace | None, depth: int | None
) -> dict[str, list[str]]:
    """The modules that get a row, and those that it is of."""
    uncounted = {module for _, module in trace.uncounted} if trace is not None else ()
    has_inner = {_home(name.rpartition(".")[0]) for name in own if name and _home(name) == name}
    groups: dict[str, list[str]] = {}
    for name in own:
        home = _home(name)
        parts = home.split(".") if home else []
        if depth is not None and len(parts) > depth:
            groups.setdefault(".".join(parts[:depth]), []).append(name)
            continue
        counts = trace.modules.get(name) if trace is not None else None
        holds = own[name].tensors or (counts is not None and counts.macs) or name in uncounted
        if home != name or holds or home not in has_inner or len(parts) == depth:
            groups.setdefault(home, []).append(name)
    return groups


def _rows(
    modules: Mapping[str, nn.Module],
    own: Mapping[str, _Own],
    trace: Trace | None,
    groups: Mapping[str, list[str]],
) -> list[Layer]:
    uncounted: dict[str, list[str]] = {}
    for op, module in trace.uncounted if trace is not None else ():
        uncounted.setdefault(module, []).append(op)
    return [
        _layer(path, modules[path], names, own, trace, uncounted) for path, names in groups.items()
    ]


def _home(name: str) -> str:
    """The module that one is a part of: a parametrization is part of what it parametrizes."""
    head, found, _ = f".{name}.".partition(".parametrizations.")
    return head[1:] if found else name


def _own(model: nn.Module) -> dict[str, _Own]:
    """What each module holds, tied tensors where they first are."""
    seen: dict[int, Tensor] = {}  # TorchScript's are made when asked for
    found = {}
    for name, module in model.named_modules():
        counts = [0] * 5
        params, buffers = _held(module)
        for i, tensor in enumerate((*params, *buffers)):
            if id(tensor) in seen:
                continue
            seen[id(tensor)] = tensor
            n, is_parameter = numel(tensor), i < len(params)
            counts[0] += 1
            counts[1] += n * is_parameter
            counts[2] += n * (is_parameter and tensor.requires_grad)
            counts[3] += n * (not is_parameter)
            counts[4] += n * tensor.element_size() if n else 0
        ids = frozenset(map(id, (*params, *buffers)))
        found[name] = _Own(counts[0], counts[1], counts[2], counts[3], counts[4], ids)
    return found


def _held(module: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """The parameters and the buffers of a module itself."""
    if isinstance(module, torch.jit.ScriptModule):
        return list(module.parameters(recurse=False)), list(module.buffers(recurse=False))
    params = [one for one in module._parameters.values() if one is not None]
    return list(params), [one for one in module._buffers.values() if one is not None]


def _layer(
    path: str,
    module: nn.Module,
    names: list[str],
    own: Mapping[str, _Own],
    trace: Trace | None,
    uncounted: Mapping[str, list[str]],
) -> Layer:
    holds = [own[name] for name in names]
    ops = tuple(dict.fromkeys(op for name in names for op in uncounted.get(name, ())))
    macs: int | None = None
    calls: int | None = None
    shape: Shapes | None = None
    if trace is not None:
        inside = [trace.modules[name] for name in names if name in trace.modules]
        macs = sum(one.macs for one in inside)
        if ops and not macs:
            macs = None
        head = trace.modules.get(path)
        calls = head.calls if head is not None else 0
        shape = head.output if head is not None else None
        if not calls and (inside or path in trace.unseen):
            calls = None  # a list of modules: what is in it was called
    kernel, stride = _dims(module, "kernel_size"), _dims(module, "stride")
    return Layer(
        path,
        path.count(".") + bool(path),
        kind_of(module),
        kernel,
        stride if kernel else None,
        1,
        sum(one.tensors for one in holds),
        calls,
        shape,
        sum(one.params for one in holds),
        sum(one.trainable for one in holds),
        sum(one.buffers for one in holds),
        sum(one.nbytes for one in holds),
        macs,
        ops,
        trace is not None and any(own[name].ids & trace.touched for name in names),
        any(one.ids for one in holds) and not any(one.tensors for one in holds),
    )


def _dims(module: nn.Module, name: str) -> tuple[int, ...] | None:
    value: Any = getattr(module, name, None)
    dims = value if isinstance(value, tuple) else (value,)
    return dims if dims and all(type(dim) is int for dim in dims) else None


def fitting(model: nn.Module, trace: Trace | None, fold: bool | None) -> tuple[list[Layer], int]:
    """The rows of as many levels as a screen takes, and how many levels that are."""
    modules, own = dict(model.named_modules()), _own(model)
    levels = max(deepest(model), 1)

    def rows(groups: Mapping[str, list[str]]) -> list[Layer]:
        return folded_if(_rows(modules, own, trace, groups), fold)

    best: Mapping[str, list[str]] = _groups(own, trace, 1)
    for depth in range(2, levels + 1):
        groups = _groups(own, trace, depth)
        if len(groups) > _MOST and len(rows(groups)) > _MOST:
            return rows(best), depth - 1
        best = groups
    return rows(best), levels


def deepest(model: nn.Module) -> int:
    """How many levels of modules there are: none in one without children."""
    return max(_home(name).count(".") + bool(name) for name, _ in model.named_modules())


def folded_if(rows: list[Layer], fold: bool | None) -> list[Layer]:
    """Rows with blocks that are alike in one: if told to, or where there are many."""
    if fold or (fold is None and len(rows) > _MOST):
        return folded(rows, lambda row: row._replace(path=""), _joined)
    return rows


def _joined(path: str, rows: list[Layer]) -> Layer:
    first = rows[0]
    n = len(rows)
    return first._replace(
        path=path,
        repeat=sum(row.repeat for row in rows),
        tensors=first.tensors * n,
        params=first.params * n,
        trainable=first.trainable * n,
        buffers=first.buffers * n,
        nbytes=first.nbytes * n,
        macs=None if first.macs is None else first.macs * n,
    )


class Totals(NamedTuple):
    """Of a whole model. Counts are of elements, memory is in bytes.

    Attributes:
        params: of all names, tied ones again; ``params_unique``: each once, as
            ``sum(p.numel() for p in model.parameters())``.
        macs: multiply-accumulates of one forward: a lower bound where something is uncounted;
            None where no forward was run. ``flops`` are two for each.
        activations: the most that is alive at once in a forward that keeps nothing.
        saved: what a forward keeps for its backward. Of both, inputs and weights are no part.
        gradients: of the trainable parameters; ``optimizer``: two states for each, as Adam has.
    """

    tensors: int
    params: int
    params_unique: int
    buffers: int
    trainable: int
    frozen: int
    param_bytes: int
    buffer_bytes: int
    by_dtype: dict[str, int]
    macs: int | None
    activations: int | None
    saved: int | None
    gradients: int
    optimizer: int

    @property
    def flops(self) -> int | None:
        return None if self.macs is None else 2 * self.macs

    @property
    def training(self) -> int | None:
        """Bytes of a training step: weights, buffers, gradients, optimizer, saved activations."""
        if self.saved is None:
            return None
        weights = self.param_bytes + self.buffer_bytes
        return weights + self.gradients + self.optimizer + self.saved


def totals(model: nn.Module, trace: Trace | None) -> Totals:
    params = [*model.parameters()]
    trainable = [p for p in params if p.requires_grad]
    buffers = [*model.buffers()]
    named = list(model.named_parameters(remove_duplicate=False))
    by_dtype: dict[str, int] = {}
    for tensor in (*params, *buffers):
        name = str(tensor.dtype).removeprefix("torch.")
        by_dtype[name] = by_dtype.get(name, 0) + numel(tensor)
    grads = _nbytes(trainable)
    return Totals(
        tensors=len(named) + len(list(model.named_buffers(remove_duplicate=False))),
        params=sum(numel(p) for _, p in named),
        params_unique=sum(map(numel, params)),
        buffers=sum(map(numel, buffers)),
        trainable=sum(map(numel, trainable)),
        frozen=sum(numel(p) for p in params if not p.requires_grad),
        param_bytes=_nbytes(params),
        buffer_bytes=_nbytes(buffers),
        by_dtype=by_dtype,
        macs=None if trace is None else trace.macs,
        activations=None if trace is None else trace.peak,
        saved=None if trace is None else trace.saved,
        gradients=grads,
        optimizer=2 * grads,
    )


def _nbytes(tensors: Iterable[Tensor]) -> int:
    return sum(numel(one) * one.element_size() for one in tensors if numel(one))
