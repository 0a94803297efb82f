"""What is in a checkpoint, at a glance: the data behind ``modelctl summary``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.modules import class_name, hyperparameters, is_training, submodules
from ..core.names import WRAPPERS, common_prefix
from ..core.records import FREEZE, HISTORY, REMOVED, read_record
from ..core.roles import STATISTICS, role_of
from ..core.sections import param_groups
from ..core.tensors import StorageRef, TensorRef
from ..core.tree import Obj, attributes, mapping, walk
from .listing import trainability

# A view this much smaller than the storage that it keeps alive is worth a word.
_WASTE_RATIO, _WASTE_BYTES = 4, 1 << 20


class Row(NamedTuple):
    """A module, or several alike (``repeat``) in one row. Counts are of elements; each tensor is
    counted once, where it first occurs."""

    path: str
    level: int
    type: str | None
    kind: str | None
    inferred: bool
    repeat: int
    tensors: int
    params: int
    buffers: int
    nbytes: int
    trainable: int | None
    weight: tuple[int, ...] | None
    dtypes: tuple[str, ...]


class Totals(NamedTuple):
    """``params`` counts by name, ``params_unique`` tied ones once (rows sum to that one);
    ``trainable`` and ``frozen`` are None where the file doesn't say."""

    tensors: int
    params: int
    params_unique: int
    buffers: int
    trainable: int | None
    frozen: int | None
    nbytes: int
    bytes_stored: int
    by_dtype: dict[str, int]


class Training(NamedTuple):
    """The training panel: progress, and what the optimizer is and takes."""

    epoch: int | None
    step: int | None
    lr: list[float]
    optimizer: str | None
    groups: int
    states: int
    optimizer_bytes: int
    scheduler: bool
    ema: list[str]


@dataclass(frozen=True)
class Summary:
    """All of it. ``module`` is a whole module's class and mode."""

    kind: str
    rows: list[Row]
    totals: Totals
    tied: list[list[str]]
    training: Training | None
    module: str | None = None
    warnings: list[tuple[str, str | None]] = field(default_factory=list)
    history: list[str] = field(default_factory=list)
    removed: list[Any] = field(default_factory=list)


def summarize(ckpt: Checkpoint, depth: int | None = 1, fold: bool | None = None) -> Summary:
    """Rows, totals and warnings of a checkpoint's model, and its training panel.

    ``depth`` is how many levels of modules get rows of their own (None: all); whatever it is,
    the rows sum to the totals. ``fold`` puts runs of numbered modules that are alike into one
    row; by default when there would be over 40 rows.

    Raises:
        NoMatchError, AmbiguousError: there are tensors, but no state_dict is clearly the model's.
    """
    sections = ckpt.sections
    if not sections.models and (sections.optimizers or not ckpt.tensors()):
        tensors: dict[str, TensorRef] = {}
    elif not sections.models:
        tensors = ckpt.tensors()
    else:
        tensors = ckpt.state_dict()
    grads = trainability(ckpt)
    first: dict[Any, str] = {}
    shared: dict[str, list[str]] = {}
    for name, ref in tensors.items():
        kept = first.setdefault(ref.identity, name)
        if kept != name:
            shared.setdefault(kept, [kept]).append(name)
    once = set(first.values())
    module = sections.models[0].node if sections.models and sections.models[0].is_module else None
    rows = _rows(tensors, once, grads, depth, module)
    if fold or (fold is None and len(rows) > 40):
        rows = _folded(rows, tensors)
    training = _training(ckpt)
    totals = _totals(tensors, once, grads)
    past = read_record(ckpt, HISTORY)
    removed = read_record(ckpt, REMOVED)
    return Summary(
        sections.kind,
        rows,
        totals,
        list(shared.values()),
        training,
        None if module is None else f"{module.func}, {_mode(module)}",
        list(_warnings(ckpt, tensors, totals)),
        list(map(str, past)) if isinstance(past, list) else [],
        removed if isinstance(removed, list) else [],
    )


# ---------------------------------------------------------------------- rows


def _rows(
    tensors: dict[str, TensorRef],
    once: set[str],
    grads: Any,
    depth: int | None,
    module: Obj | None,
) -> list[Row]:
    """The modules down to ``depth``, each tensor in exactly one of them; of a whole module those
    without tensors, too."""
    groups: dict[str, list[str]] = {}
    classes = dict(submodules(module)) if module is not None else {}
    for path, node in classes.items():
        parts = path.split(".") if path else []
        level = len(parts) - _wrapped(parts)
        has_inner = bool(mapping(attributes(node).get("_modules")))
        if path and (level == depth or (not has_inner and (depth is None or level < depth))):
            groups[path] = []
    for name in tensors:
        parts = name.split(".")[:-1]
        cut = parts if depth is None else parts[: depth + _wrapped(parts)]
        groups.setdefault(".".join(cut), []).append(name)
    rows = [_row(path, names, tensors, once, grads) for path, names in groups.items()]
    return [_with_class(row, classes[row.path]) if row.path in classes else row for row in rows]


def _with_class(row: Row, module: Obj) -> Row:
    """A row of a whole module: its class is known, nothing about it is a guess."""
    name = class_name(module)
    values = hyperparameters(module)
    words = [name]
    kernel, stride = values.get("kernel_size"), values.get("stride")
    if kernel is not None:
        words.append(_dims(kernel))
        if stride not in (None, 1) and set(_ints(stride)) != {1} and stride != kernel:
            words.append("/" + _dims(stride))
    return row._replace(type=name, kind=" ".join(words), inferred=False)


def _ints(value: Any) -> tuple[Any, ...]:
    return value if isinstance(value, tuple) else (value,)


def _dims(value: Any) -> str:
    return "x".join(map(str, _ints(value)))


def _mode(module: Obj) -> str:
    """Train or eval, and how many modules are otherwise."""
    modes = [is_training(node) for _, node in submodules(module)]
    name = {True: "train", False: "eval", None: "unknown"}[modes[0]]
    others = sum(mode != modes[0] for mode in modes)
    return f"in {name} mode" + (f" ({others} of {len(modes)} modules otherwise)" if others else "")


def _wrapped(parts: list[str]) -> int:
    """Wrapper segments don't count as levels."""
    n = 0
    while n < len(parts) and parts[n] in WRAPPERS:
        n += 1
    return n


def _row(
    path: str, names: list[str], tensors: dict[str, TensorRef], once: set[str], grads: Any
) -> Row:
    params = buffers = nbytes = 0
    trainable: int | None = 0
    dtypes: dict[str, None] = {}
    leaf = all(name.rpartition(".")[0] == path for name in names)
    for name in names:
        ref = tensors[name]
        dtypes[ref.dtype.short] = None
        if name not in once:
            continue
        nbytes += ref.nbytes
        if role_of(name, ref)[0] == "buffer":
            buffers += ref.numel
        else:
            params += ref.numel
            grad = grads.get(name)
            if grad is None:
                trainable = None
            elif trainable is not None and grad:
                trainable += ref.numel
    own = {name.rpartition(".")[2]: tensors[name] for name in names} if leaf else {}
    kind = _kind(path, own) if leaf else _blocks(path, names)
    weight = own.get("weight")
    shape = weight.shape if weight is not None else None
    if shape is None and len(own) == 1:
        shape = next(iter(own.values())).shape
    inferred = all(ref.role is None for ref in own.values())
    return Row(
        *(path, path.count(".") + bool(path), None, kind, inferred, 1, len(names)),
        *(params, buffers, nbytes, trainable, shape, tuple(dtypes)),
    )


def _kind(path: str, own: dict[str, TensorRef]) -> str | None:
    """What a module is, by the names and shapes of its own tensors."""
    if "in_proj_weight" in own or "in_proj_bias" in own:
        return "attention"
    if "weight_ih_l0" in own:
        gates = own["weight_ih_l0"].shape[0] // max(own["weight_hh_l0"].shape[-1], 1)
        return {4: "lstm", 3: "gru"}.get(gates, "rnn")
    if own.keys() & STATISTICS:
        return "norm"
    weight = own.get("weight")
    if weight is None:
        return "tensor" if len(own) == 1 else None
    dims = len(weight.shape)
    last = path.rpartition(".")[2].lower()
    if dims >= 3:
        return "conv " + "x".join(map(str, weight.shape[2:]))
    if dims == 2:
        embeds = "emb" in last or last in ("wte", "wpe")
        return "embedding" if embeds and "bias" not in own else "linear"
    return "norm" if dims == 1 else None


def _blocks(path: str, names: list[str]) -> str:
    start = len(path) + 1 if path else 0
    inner = {name[start:].partition(".")[0] for name in names if "." in name[start:]}
    if inner and all(part.isdecimal() for part in inner):
        return f"{len(inner)} block{'s' * (len(inner) > 1)}"
    return f"{len(inner)} modules"


def _folded(rows: list[Row], tensors: dict[str, TensorRef]) -> list[Row]:
    """Runs of numbered modules with the same tensors in one row: ``layers.{0-31}``."""
    makeup = {row.path: _makeup(row.path, tensors) for row in rows}
    blocks: dict[str, list[Row]] = {}
    for row in rows:
        blocks.setdefault(_block(row.path), []).append(row)
    out: list[Row] = []
    run: list[list[Row]] = []
    numbers: list[str] = []
    above = ""

    def flush() -> None:
        if not run:
            return
        if len(run) == 1:
            out.extend(run[0])
        else:
            label = f"{above}.{{{numbers[0]}-{numbers[-1]}}}".lstrip(".")
            for alike in zip(*run, strict=True):
                tail = alike[0].path[len(_block(alike[0].path)) :]
                out.append(_sum(label + tail, alike))
        run.clear()
        numbers.clear()

    for block, inside in blocks.items():
        parent, _, number = block.rpartition(".")
        same = (
            run
            and number.isdecimal()
            and parent == above
            and [makeup[row.path] for row in inside] == [makeup[row.path] for row in run[0]]
        )
        if not same:
            flush()
        above = parent
        if number.isdecimal():
            run.append(inside)
            numbers.append(number)
        else:
            flush()
            out.extend(inside)
    flush()
    return out


def _block(path: str) -> str:
    """The path down to its first number: the block that may be one of many."""
    parts = path.split(".")
    for i, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: i + 1])
    return path


def _makeup(path: str, tensors: dict[str, TensorRef]) -> tuple[Any, ...]:
    start = path + "." if path else ""
    tail = path[len(_block(path)) :]
    inside = [
        (n[len(start) :], r.shape, r.dtype) for n, r in tensors.items() if n.startswith(start)
    ]
    return (tail, *inside)


def _sum(path: str, rows: Iterable[Row]) -> Row:
    rows = list(rows)
    trainable = [row.trainable for row in rows]
    return rows[0]._replace(
        path=path,
        repeat=len(rows),
        tensors=sum(row.tensors for row in rows),
        params=sum(row.params for row in rows),
        buffers=sum(row.buffers for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        trainable=None if None in trainable else sum(n or 0 for n in trainable),
    )


# ---------------------------------------------------------------------- totals, training


def _totals(tensors: dict[str, TensorRef], once: set[str], grads: Any) -> Totals:
    params = unique = buffers = nbytes = 0
    trainable = frozen = 0
    unknown = False
    by_dtype: dict[str, int] = {}
    stored: dict[int, int] = {}
    for name, ref in tensors.items():
        role = role_of(name, ref)[0]
        if role == "parameter":
            params += ref.numel
        stored[id(ref.storage)] = ref.storage.nbytes
        if name not in once:
            continue
        nbytes += ref.nbytes
        by_dtype[ref.dtype.name] = by_dtype.get(ref.dtype.name, 0) + ref.numel
        if role == "buffer":
            buffers += ref.numel
            continue
        unique += ref.numel
        grad = grads.get(name)
        unknown |= grad is None
        if grad:
            trainable += ref.numel
        else:
            frozen += ref.numel
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
    )


def _training(ckpt: Checkpoint) -> Training | None:
    sections = ckpt.sections
    if not any((sections.optimizers, sections.epoch, sections.step, sections.schedulers)):
        return None
    kinds = [kind for _, node in sections.optimizers if (kind := optimizer_kind(node))]
    states = sum(
        len(mapping((mapping(node) or {}).get("state")) or {}) for _, node in sections.optimizers
    )
    storages: dict[int, int] = {}
    for _, node in sections.optimizers:
        for _, value in walk(node):
            if isinstance(value, TensorRef | StorageRef):
                storages[id(value.storage)] = value.storage.nbytes
    return Training(
        sections.epoch[1] if sections.epoch else None,
        sections.step[1] if sections.step else None,
        list(dict.fromkeys(sections.lrs())),
        ", ".join(dict.fromkeys(kinds)) or None,
        sum(len(param_groups(node)) for _, node in sections.optimizers),
        states,
        sum(storages.values()),
        bool(sections.schedulers),
        [".".join(map(str, copy.path)) for copy in sections.ema],
    )


# Which optimizers leave these keys in their state or groups (torch.optim, 2.x).
_BY_STATE = (
    ("row_var", "Adafactor"),
    ("mu_product", "NAdam"),
    ("exp_inf", "Adamax"),
    ("exp_avg_sq", "Adam"),
    ("acc_delta", "Adadelta"),
    ("square_avg", "RMSprop"),
    ("ax", "ASGD"),
    ("prev", "Rprop"),
    ("sum", "Adagrad"),
    ("momentum_buffer", "SGD"),
    ("func_evals", "LBFGS"),
)


def optimizer_kind(optimizer: Any) -> str | None:
    """Which optimizer a state_dict is of, as far as the keys of its state and groups tell."""
    state = mapping((mapping(optimizer) or {}).get("state")) or {}
    groups = param_groups(optimizer)
    keys = {key for value in state.values() for key in (mapping(value) or {})}
    for key, kind in _BY_STATE:
        if key in keys:
            if kind == "Adam" and groups:
                decoupled = groups[0].get("decoupled_weight_decay")
                return "Adam or AdamW" if decoupled is None else "AdamW" if decoupled else "Adam"
            return kind
    if groups and "nesterov" in groups[0]:
        return "SGD"
    return None


# ---------------------------------------------------------------------- warnings


def _warnings(
    ckpt: Checkpoint, tensors: dict[str, TensorRef], totals: Totals
) -> Iterable[tuple[str, str | None]]:
    """(what, the next step) of all that is worth a word."""
    dangerous = [finding for finding in ckpt.findings if finding.level == "dangerous"]
    if dangerous:
        named = ", ".join(dict.fromkeys(finding.name for finding in dangerous))
        yield (
            f"unpickling this file would run code: {named}. modelctl did not.",
            "don't load it with torch.load(weights_only=False)",
        )
    for warning in ckpt.warnings:
        yield warning, None
    names = list(tensors)
    prefix = common_prefix(names)
    first = prefix.partition(".")[0]
    if first in WRAPPERS:
        yield (
            f"all {len(names)} names start with '{first}.': saved under a wrapper "
            f"({'DataParallel' if first == 'module' else 'torch.compile'})",
            "modelctl strip-prefix",
        )
    for name, ref in tensors.items():
        kept = ref.storage.nbytes
        if kept > _WASTE_RATIO * ref.nbytes and kept - ref.nbytes > _WASTE_BYTES:
            used = sum(
                {
                    r.identity: r.nbytes for r in tensors.values() if r.storage is ref.storage
                }.values()
            )
            if kept > _WASTE_RATIO * used:
                yield f"'{name}' uses {used:,} of the {kept:,} bytes that it keeps alive", None
    record = mapping(read_record(ckpt, FREEZE))
    if record is not None and totals.trainable == 0:
        yield "every parameter is frozen: the loss will not move", "modelctl unfreeze"
