"""Which parameters of a live model train: freeze, the freeze record, and a table of it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ...core.freeze_record import FreezeRecord
from ...core.matching.matcher import match_names
from ...core.names import Patterns, as_list
from ...core.records import FREEZE, read_record
from ...core.text import shape, some, table
from ...errors import NoMatchError, RefusedError, UsageError
from ...files import open as open_checkpoint
from ..model_names import Parameters, is_lazy, numel, unwrap
from .batchnorm import all_frozen, bare_batchnorms, held_batchnorms, keep_all_eval, lost_batchnorms

# On the bare model: the patterns that froze it, for the record. That it is there says that the
# model's freezing is known, also when nothing is frozen any more.
_PATTERNS = "_modelctl_frozen_by"
_LOST = (
    "BatchNorm no longer kept in eval, as it was rebuilt since (convert_sync_batchnorm?): {}; "
    "freeze it again with bn_eval=True"
)


@dataclass(frozen=True)
class Frozen:
    """What freezing or thawing changed.

    Attributes:
        names: the parameters that the patterns mean.
        changed: those of them whose ``requires_grad`` changed.
        before, after: trainable elements of the whole model.
        total: all elements of its parameters.
        batchnorms: the BatchNorms that were put in lasting eval mode, or let go of it.
        joined: the parameters that an optimizer got, in a group of their own.
    """

    names: tuple[str, ...]
    changed: tuple[str, ...]
    before: int
    after: int
    total: int
    batchnorms: tuple[str, ...] = ()
    joined: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [
            f"{len(self.changed)} of {len(self.names)} parameters changed; "
            f"trainable {self.before:,} -> {self.after:,} of {self.total:,}"
        ]
        if self.batchnorms:
            lines.append(f"{len(self.batchnorms)} BatchNorms: {some(self.batchnorms)}")
        if self.joined:
            lines.append(f"{len(self.joined)} joined the optimizer: {some(self.joined)}")
        return "\n".join(lines)


def freeze(
    model: nn.Module,
    patterns: Patterns,
    *,
    exclude: Patterns = (),
    regex: bool = False,
    bn_eval: bool = False,
) -> Frozen:
    """Stop parameters from training, by name: ``requires_grad`` off, their gradient dropped.

    The gradient goes because an optimizer that holds the parameter would move it by weight decay
    and momentum as long as there is one. Wrapper prefixes (``module.``, ``_orig_mod.``) don't
    matter; a parametrized ``fc.weight`` goes by that name too; of tied parameters any name does.
    Freeze before wrapping in DistributedDataParallel, which looks at ``requires_grad`` once, and
    would wait for the gradients. ``fully_shard`` (FSDP2) takes notice.

    Args:
        patterns: globs over dotted names (``*`` crosses dots; a module's name means its
            subtree), one or several; ``exclude`` takes away. With ``regex``, regular expressions.
        bn_eval: also keep the BatchNorms that are meant in eval mode, through ``model.train()``,
            until :func:`unfreeze`: else their running statistics go on moving. Meant are those
            that the patterns touch and whose parameters are all frozen then, and those without
            parameters whose own name the patterns match. Their own ``train`` and ``eval`` do
            nothing meanwhile (and don't return the module). ``convert_sync_batchnorm`` makes new
            ones, without this: convert first. :func:`trainable` shows what was lost.

    Raises:
        NoMatchError: a pattern, or all together, match nothing.
        UsageError: not a regular expression.
        RefusedError: something would freeze inside DistributedDataParallel.
    """
    params = Parameters(model)
    batchnorms = bare_batchnorms(model) if bn_eval else {}
    names, bare = select_with(params, batchnorms, patterns, exclude, regex)
    check_wrapped(model, params, names)
    before = count_trainable(params)
    changed = set_grad(params, names, False)
    kept = [*bare, *(all_frozen(model, params, names) if bn_eval else ())]
    pinned = keep_all_eval(model, kept)
    remember(model, as_list(patterns))
    return _finish(params, names, changed, before, pinned)


def _finish(
    params: Parameters,
    names: Iterable[str],
    changed: Iterable[str],
    before: int,
    batchnorms: Iterable[str],
) -> Frozen:
    after = count_trainable(params)
    if not any(p.requires_grad for p in params.by_name.values()):
        warnings.warn("every parameter is frozen: the loss will not move", stacklevel=3)
    total = sum(numel(p) for p in params.by_name.values())
    return Frozen(tuple(names), tuple(changed), before, after, total, tuple(batchnorms))


def check_wrapped(model: nn.Module, params: Parameters, names: Iterable[str]) -> None:
    """Raises RefusedError where one of these trains inside DistributedDataParallel, which would
    wait for its gradient; not where that looks for unused ones in each step."""
    inside = {
        id(p)
        for module in model.modules()
        if isinstance(module, DistributedDataParallel) and not module.find_unused_parameters
        for p in module.parameters()
    }
    held = [n for n in names if params.by_name[n].requires_grad and id(params.by_name[n]) in inside]
    if held:
        raise RefusedError(
            "DistributedDataParallel looks at what trains only when it is built: it would wait for "
            f"the gradients of {some(held, 3)}, and fail in the next step",
            hint="freeze the bare model (modelctl.nn.unwrap), then wrap it anew",
        )


def count_trainable(params: Parameters) -> int:
    """Elements of the parameters with ``requires_grad``."""
    return sum(numel(p) for p in params.by_name.values() if p.requires_grad)


def can_train(parameter: nn.Parameter) -> bool:
    """Whether a tensor can have a gradient: integers can't."""
    return parameter.dtype.is_floating_point or parameter.dtype.is_complex


def set_grad(params: Parameters, names: Iterable[str], requires_grad: bool) -> list[str]:
    """Set ``requires_grad`` of parameters, by first name; gives those that changed.

    Thawing passes over tensors that can't have a gradient.
    """
    changed = []
    for name in names:
        parameter = params.by_name[name]
        if requires_grad and not can_train(parameter):
            continue
        if parameter.requires_grad != requires_grad:
            parameter.requires_grad = requires_grad  # the method refuses lazy ones
            changed.append(name)
        if not requires_grad:
            parameter.grad = None
    return changed


def select_with(
    params: Parameters,
    modules: Mapping[str, nn.Module],
    patterns: Patterns,
    exclude: Patterns,
    regex: bool,
) -> tuple[list[str], list[str]]:
    """Names of parameters, and of ``modules`` that have none, that the patterns mean."""
    both = Parameters.__new__(Parameters)
    both.by_name = {**params.by_name, **dict.fromkeys(modules)}  # type: ignore[dict-item]
    both.called = {**params.called, **{name: [name] for name in modules}}
    found = both.select(patterns, exclude=exclude, regex=regex)
    return [n for n in found if n in params.by_name], [n for n in found if n in modules]


# ------------------------------------------------------------------ the record


def remember(model: nn.Module, patterns: Iterable[str]) -> None:
    """Note the patterns that froze something, for the record; those that mean nothing frozen
    any more are dropped."""
    bare = unwrap(model)
    known = [*bare.__dict__.get(_PATTERNS, ()), *patterns]
    params = Parameters(model)
    bare.__dict__[_PATTERNS] = [
        pattern for pattern in dict.fromkeys(known) if _means_frozen(params, pattern)
    ]


def _means_frozen(params: Parameters, pattern: str) -> bool:
    for regex in (False, True):  # which of the two it was is not recorded
        try:
            found = params.select(pattern, regex=regex)
        except (NoMatchError, UsageError):
            continue
        return any(not params.by_name[name].requires_grad for name in found)
    return False


def freeze_record(model: nn.Module) -> dict[str, Any]:
    """What of a live model is frozen, as the freeze record that files carry (version 1).

    ``{"version": 1, "frozen": [names], "bn_eval": bool, "patterns": [as given]}``; names are
    those of the bare model's state_dict, tied ones by their first; ``patterns`` are those given
    to :func:`freeze` that still mean something frozen. The record can only say of all frozen
    BatchNorms that they stay in eval, or of none: where the model has both, this warns.
    """
    return record_of(model).node()


def record_of(model: nn.Module) -> FreezeRecord:
    """As :func:`freeze_record`, the record itself."""
    params = Parameters(model)
    frozen = [name for name, p in params.by_name.items() if not p.requires_grad]
    held = held_batchnorms(model)
    loose = [name for name in all_frozen(model, params, frozen) if name not in held]
    if held and loose:
        warnings.warn(
            f"some frozen BatchNorms stay in eval, others ({some(loose, 3)}) don't: "
            "the freeze record can't tell them apart, and says that all do",
            stacklevel=3,
        )
    lost = lost_batchnorms(model)
    if lost:
        warnings.warn(_LOST.format(some(lost, 3)), stacklevel=3)
    patterns = unwrap(model).__dict__.get(_PATTERNS, ())
    return FreezeRecord(tuple(frozen), bool(held), tuple(patterns))


def apply_freeze(
    model: nn.Module, path_or_record: str | os.PathLike[str] | Mapping[str, Any]
) -> Frozen:
    """Freeze what a freeze record names: a file's, or one that is at hand.

    Thaws nothing. Wrappers on either side don't matter. Recorded names that the model lacks (a
    head that was replaced) are warned about.

    Raises:
        NoMatchError: the file has no freeze record, or the model has none of the names in it.
        UsageError: not a freeze record of version 1.
        RefusedError: something would freeze inside DistributedDataParallel.
    """
    if isinstance(path_or_record, Mapping):
        record: Any = path_or_record
    else:
        with open_checkpoint(path_or_record) as ckpt:
            record = read_record(ckpt, FREEZE)
        if record is None:
            raise NoMatchError(
                f"{os.fspath(path_or_record)}: no freeze record in it",
                hint="'modelctl freeze' writes one, and save_checkpoint of a frozen model does",
            )
    return apply_record(model, FreezeRecord.parse(record))


def apply_record(model: nn.Module, record: FreezeRecord, *, strict: bool = True) -> Frozen:
    """Apply a freeze record.

    Raises:
        NoMatchError: with ``strict``, when the model has none of the names (else a warning).
        RefusedError: something would freeze inside DistributedDataParallel.
    """
    params = Parameters(model)
    found = match_names(record.frozen, params.called)
    lacking = [name for name in record.frozen if name not in found]
    if lacking:
        if strict and not found:
            raise NoMatchError(
                f"none of the {len(lacking)} names in the freeze record is in the model: "
                f"{some(lacking, 3)}",
                hint=f"the model has {some(list(params.by_name), 3)}",
            )
        warnings.warn(
            f"the freeze record names {len(lacking)} parameters that the model lacks: "
            f"{some(lacking)}",
            stacklevel=3,
        )
    names = _meant(params, found)
    check_wrapped(model, params, names)
    before = count_trainable(params)
    changed = set_grad(params, names, False)
    batchnorms: list[str] = []
    if record.bn_eval:
        bare = []
        for pattern in record.patterns:
            try:
                bare += select_with(params, bare_batchnorms(model), pattern, (), False)[1]
            except NoMatchError:
                continue
        batchnorms = keep_all_eval(model, [*bare, *all_frozen(model, params, names)])
    remember(model, record.patterns)
    return _finish(params, names, changed, before, batchnorms)


def check_record(model: nn.Module, record: FreezeRecord) -> None:
    """Raises RefusedError where the record can't be applied; see :func:`check_wrapped`."""
    params = Parameters(model)
    check_wrapped(model, params, _meant(params, match_names(record.frozen, params.called)))


def _meant(params: Parameters, found: Mapping[str, str]) -> list[str]:
    """The first names of the parameters that names of a record stand for, in the model's order."""
    meant = {first for name in found.values() for first in params.called[name]}
    return [name for name in params.by_name if name in meant]


# ------------------------------------------------------------------ the table


@dataclass(frozen=True)
class Trainable:
    """Each parameter with its shape and whether it trains; ``str()`` is a table of it.

    Attributes:
        rows: (name, shape, requires_grad), tied parameters once; the shape is None where a
            lazy module does not know it yet.
        eval_batchnorms: the BatchNorms that are kept in eval.
        trainable, total: elements.
        lost_batchnorms: those that were, and lost it when something rebuilt them
            (``convert_sync_batchnorm`` does): freeze them again.
    """

    rows: tuple[tuple[str, tuple[int, ...] | None, bool], ...]
    eval_batchnorms: tuple[str, ...]
    trainable: int
    total: int
    lost_batchnorms: tuple[str, ...] = ()

    @property
    def frozen(self) -> tuple[str, ...]:
        """Names of the parameters that don't train."""
        return tuple(name for name, _, grad in self.rows if not grad)

    def __str__(self) -> str:
        lines = [
            (name, "?" if dims is None else shape(dims), "yes" if grad else "no")
            for name, dims, grad in self.rows
        ]
        text = table(("name", "shape", "grad"), lines)
        text += f"\ntrainable {self.trainable:,} of {self.total:,} in {len(self.rows)} parameters"
        if self.eval_batchnorms:
            text += f"\nBatchNorm kept in eval: {some(self.eval_batchnorms)}"
        if self.lost_batchnorms:
            text += "\n" + _LOST.format(some(self.lost_batchnorms))
        return text


def trainable(model: nn.Module) -> Trainable:
    """Which parameters of a model train: name, shape and ``requires_grad`` of each.

    Names are without wrapper prefixes.
    """
    params = Parameters(model)
    rows = tuple(
        (name, None if is_lazy(p) else tuple(p.shape), p.requires_grad)
        for name, p in params.by_name.items()
    )
    total = sum(numel(p) for p in params.by_name.values())
    held, lost = tuple(held_batchnorms(model)), tuple(lost_batchnorms(model))
    return Trainable(rows, held, count_trainable(params), total, lost)
