"""What is in a checkpoint, at a glance: the data behind ``modelctl summary``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from math import prod
from shlex import quote
from typing import Any, Literal

from ...core.checkpoint import Checkpoint
from ...core.cutting import wasted
from ...core.modules import class_of, is_training, submodules
from ...core.names import WRAPPERS, common_prefix, natural
from ...core.nodes import Composite, Obj
from ...core.notes import Note, info, warning
from ...core.packed import PackedWeights
from ...core.packed.find import parts_of
from ...core.pages import Progress
from ...core.records import HISTORY, ONLY, REMOVED, read_freeze, read_record, unread_freeze
from ...core.sections.devices import devices_of
from ...core.tensors import TensorRef, announce_all
from ...errors import UnreadableError
from ..dangers import would_run
from ..ls import other_models, trainability
from ..stats import Stats, has_stats, tensor_stats
from .folding import folded
from .quantized import Quantized, pieces
from .report import Summary, Totals
from .rows import Row, Tensor, joined, labelled, makeups, module_rows
from .training import training_of

_WRAPPED_BY = {
    "module": "DataParallel",
    "_orig_mod": "torch.compile",
    "_fsdp_wrapped_module": "FSDP",
    "_checkpoint_wrapped_module": "checkpoint_wrapper",
}
# Rows that are folded unasked, rows that a screen takes, and levels that are tried for them.
_MOST, _FIT, _DEEPEST = 40, 20, 12


def summarize(
    ckpt: Checkpoint,
    depth: int | Literal["auto"] | None = "auto",
    fold: bool | None = None,
    sort: str = "file",
    stats: bool = False,
    progress: Progress | None = None,
) -> Summary:
    """Rows, totals and warnings of a checkpoint's model, and its training panel.

    ``depth`` is how many levels of modules get rows of their own (None: all; "auto": as many as
    give up to 20 rows); whatever it is, the rows sum to the totals. Of several models of which
    none is clearly meant all have rows, each under its path. ``fold`` puts runs of numbered
    modules that are alike into one row; by default when there would be over 40 rows, or over 20
    where the depth is "auto". ``sort`` is ``file`` (the file's order), ``name``, ``params`` or
    ``size`` (the largest first). ``stats`` reads the values, too, and
    tells ``progress`` how far it is.
    """
    sections = ckpt.sections
    above = 0  # levels that lead to the models
    if not sections.models and (sections.optimizers or not ckpt.tensors()):
        tensors: dict[str, Tensor] = {}
    elif not sections.models:
        tensors = {**ckpt.tensors()}
    else:
        tensors = {
            name: ref
            for name, ref in ckpt.shown.items()
            if isinstance(ref, TensorRef) or (isinstance(ref, Composite) and name in ckpt.packed.of)
        }
        if not sections.certain:
            above = max(len(model.path) for model in sections.models)
    grads = trainability(ckpt)
    first: dict[Any, str] = {}
    shared: dict[str, list[str]] = {}
    for name, ref in tensors.items():
        kept = first.setdefault(ref.identity if isinstance(ref, TensorRef) else id(ref), name)
        if kept != name:
            shared.setdefault(kept, [kept]).append(name)
    once = set(first.values())
    clear = sections.models[:1] if sections.certain else ()
    module = next((one.node for one in clear if one.is_module), None)
    try:
        recorded = ckpt.program if tensors else None
        program, unread = recorded.recorded() if recorded is not None else [], None
    except UnreadableError as e:  # its schema changes: the tensors are what counts
        program, unread = [], f"no recorded shapes: {e}"
    inside = makeups(tensors) if fold is not False else {}

    def rows_to(level: int | None, most: int) -> list[Row]:
        levels = None if level is None else level + above
        rows = module_rows(tensors, once, grads, levels, module, program, ckpt.packed)
        if fold or (fold is None and len(rows) > most):
            return folded(rows, lambda row: (inside.get(row.path), row.out_shape), joined)
        return rows

    deepest = max((name.count(".") for name in tensors), default=0) - above
    if depth == "auto":
        depth, rows = _as_deep_as_fits(rows_to, min(deepest, _DEEPEST))
    else:
        rows = rows_to(depth, _MOST)
    rows = labelled(rows, tensors)
    order = {
        "name": lambda row: natural(row.path),
        "params": lambda row: -row.params,
        "size": lambda row: -row.nbytes,
    }.get(sort)
    if order is not None:
        rows.sort(key=order)
    plain = {name: ref for name, ref in tensors.items() if isinstance(ref, TensorRef)}
    values = _values(ckpt, {name: plain[name] for name in plain if name in once and stats},
                     progress)  # fmt: skip
    training = training_of(ckpt)
    totals = _totals(tensors, once, grads, ckpt.packed)._replace(devices=devices_of(ckpt))
    past = read_record(ckpt, HISTORY)
    removed = read_record(ckpt, REMOVED)
    return Summary(
        ckpt,
        rows,
        totals,
        list(shared.values()),
        training,
        None if module is None else f"{class_of(module)}, {_mode(module)}",
        depth,
        values,
        [*([warning(unread)] if unread else []), *_warnings(ckpt, plain, totals)],
        list(map(str, past)) if isinstance(past, list) else [],
        removed if isinstance(removed, list) else [],
        deeper=depth is not None and depth < deepest,
    )


def _values(
    ckpt: Checkpoint, tensors: dict[str, TensorRef], progress: Progress | None
) -> dict[str, Stats]:
    """The statistics of tensors, where they have some."""
    file = os.path.basename(ckpt.origin.path) if ckpt.origin else ""
    read = {name: ref for name, ref in tensors.items() if has_stats(ref)}
    total = sum(ref.nbytes for ref in read.values())
    advance = None if progress is None else lambda more: progress(file, more, total)
    announce_all(read.values())
    values = {name: tensor_stats(ref, advance) for name, ref in read.items()}
    return {name: one for name, one in values.items() if one is not None}


def _as_deep_as_fits(
    rows_to: Callable[[int, int], list[Row]], deepest: int
) -> tuple[int, list[Row]]:
    """How many levels fit on a screen, at least one, and their rows."""
    rows = rows_to(1, _FIT)
    if len(rows) > _FIT:
        return 1, rows_to(1, _MOST)
    level = 1
    while level < deepest and len(deeper := rows_to(level + 1, _FIT)) <= _FIT:
        level, rows = level + 1, deeper
    return level, rows


def _mode(module: Obj) -> str:
    """Train or eval, and how many modules are otherwise."""
    modes = [is_training(node) for _, node in submodules(module)]
    name = {True: "train", False: "eval", None: "unknown"}[modes[0]]
    others = sum(mode != modes[0] for mode in modes)
    return f"in {name} mode" + (f" ({others} of {len(modes)} modules otherwise)" if others else "")


# ---------------------------------------------------------------------- totals


def _totals(
    tensors: Mapping[str, Tensor], once: set[str], grads: Any, packed: PackedWeights
) -> Totals:
    params = unique = buffers = nbytes = param_bytes = 0
    trainable = frozen = 0
    unknown = False
    by_dtype: dict[str, int] = {}
    stored: dict[int, int] = {}
    for name, ref in tensors.items():
        weight = packed.of.get(name)
        parts = [ref] if isinstance(ref, TensorRef) else [one for _, one in parts_of(ref)]
        role = packed.role(name, ref)[0] if isinstance(ref, TensorRef) else "packed"
        numel = weight.numel if weight and role == "packed" else prod(ref.shape)
        if role in ("parameter", "packed"):
            params += numel
        stored.update((id(one.storage), one.storage.nbytes) for one in parts)
        if name not in once:
            continue
        size = ref.nbytes if isinstance(ref, TensorRef) else packed.of[name].nbytes
        nbytes += size
        for one in parts:
            by_dtype[one.dtype.name] = by_dtype.get(one.dtype.name, 0) + one.numel
        if role == "buffer":
            buffers += numel
            continue
        param_bytes += size
        if role not in ("parameter", "packed"):
            continue
        unique += numel
        grad = grads.get(name)
        unknown |= grad is None
        if grad:
            trainable += numel
        else:
            frozen += numel
    return Totals(
        tensors=len(tensors),
        params=params,
        params_unique=unique,
        buffers=buffers,
        trainable=None if unknown else trainable,
        frozen=None if unknown else frozen,
        nbytes=nbytes,
        bytes_stored=sum(stored.values()),
        by_dtype=by_dtype,
        param_bytes=param_bytes,
        quantized=Quantized.of(packed.weights.values()),
        pieces=pieces(packed, tensors),
    )


# ---------------------------------------------------------------------- warnings


def _warnings(ckpt: Checkpoint, tensors: dict[str, TensorRef], totals: Totals) -> Iterable[Note]:
    """All that is worth a word, with the next step."""
    path = ckpt.origin.path if ckpt.origin else "FILE"
    yield from would_run(ckpt)
    yield from ckpt.warnings
    yield from other_models(ckpt)
    composites = [
        node
        for name, node in ckpt.shown.items()
        if isinstance(node, Composite) and name not in ckpt.packed.of
    ]
    if composites:
        kinds = ", ".join(sorted({node.layout for node in composites}))
        yield warning(
            f"{len(composites)} tensors ({kinds}) are not in the totals: no plain tensors"
        )
    names = list(tensors)
    prefix = common_prefix(names)
    first = prefix.partition(".")[0]
    if first in WRAPPERS:
        yield warning(
            f"all {len(names)} names start with '{first}.': saved under a wrapper "
            f"({_WRAPPED_BY[first]})",
            f"modelctl strip-prefix {quote(str(path))} -o NEW.pt",
        )
    yield from wasted(tensors)
    if read_record(ckpt, ONLY) is not None:
        yield info(
            "only what trains is in it, not the frozen base",
            "modelctl.nn.load_into(model, path) puts it into a model that has its base",
        )
    unread = unread_freeze(ckpt)
    if unread is not None:
        yield unread
    if read_freeze(ckpt) is not None and totals.trainable == 0:
        yield warning(
            "every parameter is frozen: the loss will not move",
            f"modelctl unfreeze {quote(str(path))} -o NEW.pt",
        )
