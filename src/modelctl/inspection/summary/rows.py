"""A row a module: what is in it, and what it is by its class, or by names and shapes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...core.checkpoint import Recorded
from ...core.modules import class_name, hyperparameters, submodules
from ...core.names import STATISTICS, WRAPPERS
from ...core.nodes import Composite, Obj, attributes, mapping
from ...core.packed import PackedWeights, Weight
from ...core.tensors import TensorRef
from ...core.text import shape
from .quantized import Quantized

# A composite one only where it is a quantized weight of a known kind.
Tensor = TensorRef | Composite
_NOTHING = PackedWeights()


class Row(NamedTuple):
    """A module, or several alike (``repeat``) in one row. Counts are of elements; each tensor is
    counted once, where it first occurs. ``out_shape`` is what an exported program recorded,
    ``param_bytes`` what the parameters are stored in, with the scales of quantized ones."""

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
    out_shape: tuple[int | str, ...] | None = None
    param_bytes: int = 0
    quantized: Quantized | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "level": self.level,
            "type": self.type,
            "kind": self.kind,
            "inferred": self.inferred,
            "repeat": self.repeat,
            "tensors": self.tensors,
            "params": self.params,
            "buffers": self.buffers,
            "bytes": self.nbytes,
            "trainable": self.trainable,
            "out_shape": None if self.out_shape is None else list(self.out_shape),
            "macs": None,
            "quantization": None if self.quantized is None else self.quantized.as_dict(),
        }


def module_rows(
    tensors: Mapping[str, Tensor],
    once: set[str],
    grads: Any,
    depth: int | None,
    module: Obj | None,
    program: Sequence[Recorded] = (),
    packed: PackedWeights = _NOTHING,
) -> list[Row]:
    """The modules down to ``depth``, each tensor in exactly one of them; of a whole module and of
    an exported program those without tensors, too."""
    groups: dict[str, list[str]] = {}
    classes = dict(submodules(module)) if module is not None else {}
    for path, node in classes.items():
        parts = path.split(".") if path else []
        level = len(parts) - _wrapped(parts)
        has_inner = bool(mapping(attributes(node).get("_modules")))
        if path and (level == depth or (not has_inner and (depth is None or level < depth))):
            groups[path] = []
    inner = {path[:at] for path in (one.module for one in program) for at in _dots(path)}
    for one in program:
        level = one.module.count(".") + 1
        is_leaf = one.module not in inner and (depth is None or level < depth)
        if one.module and (is_leaf or level == depth):
            groups[one.module] = []
    for name in tensors:
        weight = packed.of.get(name)  # a piece belongs where its weight does
        parts = (weight.name if weight else name).split(".")[:-1]
        cut = parts if depth is None else parts[: depth + _wrapped(parts)]
        groups.setdefault(".".join(cut), []).append(name)
    rows = [_row(path, names, tensors, once, grads, packed) for path, names in groups.items()]
    rows = [_with_class(row, classes[row.path]) if row.path in classes else row for row in rows]
    recorded = {one.module: one for one in program}
    return [_as_recorded(row, recorded.get(row.path)) for row in rows]


def _dots(path: str) -> list[int]:
    return [i for i, letter in enumerate(path) if letter == "."]


def _as_recorded(row: Row, found: Recorded | None) -> Row:
    """A row of an exported program: its class is known; the kernel is its weight's."""
    if found is None:
        return row
    kernel = (row.kind or "").removeprefix("conv") if (row.kind or "").startswith("conv") else ""
    return row._replace(
        type=found.type, kind=found.type + kernel, inferred=False, out_shape=found.out_shape
    )


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
    return shape(_ints(value))


def _wrapped(parts: list[str]) -> int:
    """Wrapper segments don't count as levels."""
    n = 0
    while n < len(parts) and parts[n] in WRAPPERS:
        n += 1
    return n


def _row(
    path: str,
    names: list[str],
    tensors: Mapping[str, Tensor],
    once: set[str],
    grads: Any,
    packed: PackedWeights,
) -> Row:
    params = buffers = nbytes = param_bytes = 0
    trainable: int | None = 0
    dtypes: dict[str, None] = {}
    own: dict[str, tuple[int, ...]] = {}  # shapes by the names in the module
    inside: dict[str, Weight] = {}
    leaf, inferred = True, True
    for name in names:
        ref, weight = tensors[name], packed.of.get(name)
        role = _role(name, ref, packed)
        called = weight.name if weight else name
        leaf = leaf and called.rpartition(".")[0] == path
        inferred = inferred and getattr(ref, "role", None) is None
        if weight or role in ("parameter", "buffer"):
            own[called.rpartition(".")[2]] = weight.shape if weight else ref.shape
            dtypes[weight.layout.element if weight else ref.dtype.short] = None
        if weight:
            inside[weight.name] = weight
        if name not in once:
            continue
        size = _bytes_of(name, ref, packed)
        nbytes += size
        if role == "buffer":
            buffers += prod(ref.shape)
            continue
        param_bytes += size
        if role not in ("parameter", "packed"):
            continue  # a piece of a weight: its elements are no parameters
        numel = weight.numel if weight else prod(ref.shape)
        params += numel
        grad = grads.get(name)
        if grad is None:
            trainable = None
        elif trainable is not None and grad:
            trainable += numel
    kind = _kind(path, own if leaf else {}) if leaf else _blocks(path, names)
    labels = dict.fromkeys(one.label for one in inside.values())
    if leaf and labels:
        kind = " ".join((kind or "", *labels)).strip()
    shape = own.get("weight") if leaf else None
    if leaf and shape is None and len(own) == 1:
        shape = next(iter(own.values()))
    return Row(
        *(path, path.count(".") + bool(path), None, kind, inferred, 1, len(names)),
        *(params, buffers, nbytes, trainable, shape, tuple(dtypes)),
        param_bytes=param_bytes,
        quantized=Quantized.of(inside.values()),
    )


def _role(name: str, ref: Tensor, packed: PackedWeights) -> str:
    return "packed" if isinstance(ref, Composite) else packed.role(name, ref)[0]


def _bytes_of(name: str, ref: Tensor, packed: PackedWeights) -> int:
    return packed.of[name].nbytes if isinstance(ref, Composite) else ref.nbytes


def _kind(path: str, own: Mapping[str, tuple[int, ...]]) -> str | None:
    """What a module is, by the names and shapes of its own tensors."""
    if "in_proj_weight" in own or "in_proj_bias" in own:
        return "attention"
    if "weight_ih_l0" in own:
        sizes = [own[name] for name in ("weight_ih_l0", "weight_hh_l0") if name in own]
        whole = len(sizes) == 2 and all(len(size) == 2 for size in sizes)
        gates = sizes[0][0] // max(sizes[1][1], 1) if whole else 0
        return {4: "lstm", 3: "gru"}.get(gates, "rnn")
    if own.keys() & STATISTICS:
        return "norm"
    weight = own.get("weight")
    if weight is None:
        return "tensor" if len(own) == 1 else None
    dims = len(weight)
    last = path.rpartition(".")[2].lower()
    if dims >= 3:
        return "conv " + shape(weight[2:])
    if dims == 2:
        embeds = "emb" in last or last in ("wte", "wpe")
        return "embedding" if embeds and "bias" not in own else "linear"
    return "norm" if dims == 1 else None


def _blocks(path: str, names: list[str]) -> str:
    start = len(path) + 1 if path else 0
    inner = {name[start:].partition(".")[0] for name in names if "." in name[start:]}
    if inner and all(part.isdecimal() for part in inner):
        return f"{len(inner)} block{'s' * (len(inner) > 1)}"
    return f"{len(inner)} module{'s' * (len(inner) != 1)}"


def labelled(rows: list[Row], tensors: Collection[str]) -> list[Row]:
    """Rows whose module is a list of blocks, under the numbers of its blocks: ``layer1.{0-2}``."""
    out = []
    for row in rows:
        start = row.path + "." if row.path else ""
        if row.repeat == 1 and (row.kind or "").endswith("blocks"):
            inside = {n[len(start) :].partition(".")[0] for n in tensors if n.startswith(start)}
            numbers = sorted(map(int, inside))
            if numbers == list(range(numbers[0], numbers[-1] + 1)):
                row = row._replace(path=f"{start}{{{numbers[0]}-{numbers[-1]}}}")
        out.append(row)
    return out


def makeups(tensors: Mapping[str, Tensor]) -> dict[str, list[Any]]:
    """For each module the tensors in it, by their names there: what is the same in blocks that
    are alike."""
    found: dict[str, list[Any]] = {}
    for name, ref in tensors.items():
        at = 0
        while at >= 0:
            module, inner = (name[: at - 1], name[at:]) if at else ("", name)
            found.setdefault(module, []).append((inner, ref.shape, ref.dtype))
            at = name.find(".", at) + 1 or -1
    return found


def joined(path: str, rows: list[Row]) -> Row:
    """One row for several that are alike."""
    trainable = [row.trainable for row in rows]
    return rows[0]._replace(
        path=path,
        repeat=len(rows),
        tensors=sum(row.tensors for row in rows),
        params=sum(row.params for row in rows),
        buffers=sum(row.buffers for row in rows),
        nbytes=sum(row.nbytes for row in rows),
        trainable=None if None in trainable else sum(n or 0 for n in trainable),
        param_bytes=sum(row.param_bytes for row in rows),
        quantized=Quantized.sum(row.quantized for row in rows),
    )
