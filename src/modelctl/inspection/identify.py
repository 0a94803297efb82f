"""Which known architecture a checkpoint's tensors are: the data behind ``modelctl identify``.

The tensors of a file are put into a tree of modules, and every module of it, wherever it stands, is
compared with the root of every architecture. Modules that are alike are compared once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..core.checkpoint import Checkpoint
from ..core.names import WRAPPERS
from ..core.nodes import Composite
from ..core.tensors import TensorRef
from .architectures import Architecture, Shape, index, tensors

# BatchNorm's counter: old files and frozen layers are without it, and its shape says nothing.
COUNTER = "num_batches_tracked"
# Where less than this agrees, nothing is claimed.
LEAST = 0.7
# No model nests so deep: what is below is one name.
_DEEPEST = 50
_FEW = 3


class OtherShape(NamedTuple):
    """A tensor that both have, with other shapes."""

    name: str
    found: Shape
    expected: Shape


class Candidate(NamedTuple):
    """An architecture that the tensors under ``prefix`` may be.

    ``names`` are those of all models with these very tensors. ``score`` is ``matched`` (tensors
    that agree in name and shape) by all that are under the prefix or are missing there. What may
    well be otherwise is not missing: the head (``head`` is False where all of it is), auxiliary
    heads (``aux``), and ``num_batches_tracked``, which doesn't count at all. ``classes`` is the
    number of classes that the head is for. All three are None where the architecture has no such
    thing. Names are without the prefix; ``beside`` counts the tensors that are not under it.
    """

    names: tuple[str, ...]
    score: float
    prefix: str
    classes: int | None
    head: bool | None
    aux: bool | None
    matched: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[OtherShape, ...]
    beside: int
    differences: tuple[str, ...]


def identify(ckpt: Checkpoint) -> list[Candidate]:
    """The architectures that the tensors may belong to, best first; none where too little agrees.

    The model's tensors are looked at, or all in the file where no model is clear. The same tensors
    under several prefixes (two encoders) are several candidates.
    """
    return identify_shapes(shapes_of(ckpt))


def shapes_of(ckpt: Checkpoint) -> dict[str, Shape]:
    """The shapes of the model's tensors by name, or of all in the file where no model is clear."""
    sections = ckpt.sections
    if sections.models and sections.certain:
        entries = sections.models[0].entries.items()
        return {name: v.shape for name, v in entries if isinstance(v, TensorRef | Composite)}
    return {name: ref.shape for name, ref in ckpt.tensors().items()}


def identify_shapes(shapes: Mapping[str, Shape]) -> list[Candidate]:
    """As :func:`identify`, for names and shapes."""
    root = _tree(shapes)
    compare = _Comparison()
    found: list[tuple[int, str, _Module, Architecture]] = []
    known = index().architectures
    least = LEAST * min(one.least for one in known)
    for place, module in _places(root):
        if module.size < least:
            continue
        for one in known:
            if min(module.size, one.most) < LEAST * max(module.size, one.least):
                continue  # too little can agree
            same, absent = compare(module, one)
            if same >= LEAST * (module.size + absent):
                found.append((2 * same - module.size - absent, place, module, one))
    # Of modules inside each other the one that explains most: a backbone is no model of its own
    # where the rest belongs to it, and no model is claimed for what is beside a known backbone.
    found.sort(key=lambda one: -one[0])
    places: list[str] = []
    candidates = []
    for _, place, module, architecture in found:
        if not any(_nested(place, other) for other in places):
            places.append(place)
            details = _Details(module, architecture)
            candidates.append(details.candidate(place, root.size - module.size))
    return sorted(candidates, key=lambda one: (-one.score, -one.matched))


def classes_and_aux(
    shapes: Mapping[str, Shape], architecture: Architecture
) -> tuple[int | None, bool | None]:
    """For how many classes the head of these tensors is, if they are that architecture, and
    whether auxiliary heads are among them."""
    details = _Details(_tree(shapes), architecture)
    return details.classes, details.aux


def _nested(place: str, other: str) -> bool:
    return place != other and (place.startswith(other) or other.startswith(place))


# ---------------------------------------------------------------------- the file's modules


class _Module:
    """A module of a file: its tensors, its modules, and how many tensors are in all of it."""

    __slots__ = ("inner", "size", "tensors")

    def __init__(self, tensors: dict[str, Shape], inner: dict[str, _Module]) -> None:
        self.tensors, self.inner = tensors, inner
        self.size = sum(name != COUNTER for name in tensors)
        self.size += sum(module.size for module in inner.values())


def _tree(shapes: Mapping[str, Shape]) -> _Module:
    """The modules of a file; those that are alike are one."""
    known: dict[tuple[object, ...], _Module] = {}

    def module(below: Sequence[tuple[list[str], Shape]], depth: int) -> _Module:
        own: dict[str, Shape] = {}
        groups: dict[str, list[tuple[list[str], Shape]]] = {}
        for one in below:
            name = one[0][depth]
            if len(one[0]) == depth + 1:
                own[name] = one[1]
            else:
                groups.setdefault(name, []).append(one)
        inner = {name: module(group, depth + 1) for name, group in groups.items()}
        key = (*own.items(), *((name, id(module)) for name, module in inner.items()))
        if key not in known:
            known[key] = _Module(own, inner)
        return known[key]

    return module([(name.split(".", _DEEPEST), shape) for name, shape in shapes.items()], 0)


def _places(root: _Module) -> list[tuple[str, _Module]]:
    """Every module under its prefix; wrappers are left out, what they wrap is not."""
    found = []
    todo = [("", root)]
    while todo:
        prefix, module = todo.pop()
        if _wrapped(module) is None:
            found.append((prefix, module))
        todo += [(f"{prefix}{name}.", inner) for name, inner in module.inner.items()]
    return found


def _wrapped(module: _Module) -> _Module | None:
    """What a module wraps that has nothing of its own: DataParallel's, ``torch.compile``'s."""
    if module.tensors or len(module.inner) != 1:
        return None
    ((name, inner),) = module.inner.items()
    return inner if name in WRAPPERS else None


def _inside(module: _Module, name: str) -> _Module | None:
    """The module of that name in another one, without wrappers."""
    inner = module.inner.get(name)
    while inner is not None and (wrapped := _wrapped(inner)) is not None:
        inner = wrapped
    return inner


# ---------------------------------------------------------------------- comparing


def _is_head(shape: Sequence[int]) -> bool:
    return any(dim < 0 for dim in shape)


def _fits(shape: Shape, expected: Sequence[int]) -> bool:
    return len(shape) == len(expected) and all(
        n == dim or (dim < 0 < n and n % dim == 0) for n, dim in zip(shape, expected, strict=True)
    )


class _Count(NamedTuple):
    """Tensors that agree, tensors that are missing, tensors of the head that are there."""

    same: int
    absent: int
    heads: int


class _Comparison:
    """Compares modules of a file with those of the index, each pair once."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, int], _Count] = {}
        self.sizes: dict[int, tuple[int, int]] = {}

    def __call__(self, module: _Module, architecture: Architecture) -> tuple[int, int]:
        """How many tensors agree, and how many are missing that should be there."""
        same, absent, heads = self.count(module, architecture.root)
        of_head = 0
        root = index().modules[architecture.root]
        aux = architecture.aux.modules if architecture.aux else ()
        with_aux = any(name in module.inner for name in aux)
        for name, value in root.items():
            if isinstance(value, int):
                size, of_it = self.size(value)
                if name not in aux or with_aux:
                    of_head += of_it
                else:
                    absent -= size - of_it
        # no head may well be; a part of one is not
        return same, absent + (of_head - heads if heads else 0)

    def size(self, number: int) -> tuple[int, int]:
        """How many tensors a module of the index has, and how many of them are of the head."""
        if number not in self.sizes:
            size = heads = 0
            for name, value in index().modules[number].items():
                if isinstance(value, int):
                    below = self.size(value)
                    size, heads = size + below[0], heads + below[1]
                elif name != COUNTER:
                    size, heads = size + 1, heads + _is_head(value)
            self.sizes[number] = size, heads
        return self.sizes[number]

    def count(self, module: _Module, number: int) -> _Count:
        key = (id(module), number)
        if key in self.counts:
            return self.counts[key]
        same = absent = heads = 0
        for name, value in index().modules[number].items():
            if isinstance(value, int):
                inner = _inside(module, name)
                if inner is None:
                    size, head = self.size(value)
                    absent += size - head
                else:
                    below = self.count(inner, value)
                    same += below.same
                    absent += below.absent
                    heads += below.heads
            elif name != COUNTER:
                shape = module.tensors.get(name)
                if shape is None:
                    absent += not _is_head(value)
                else:
                    same += _fits(shape, value)
                    heads += _is_head(value)
        self.counts[key] = _Count(same, absent, heads)
        return self.counts[key]


class _Details:
    """What agrees and what differs between a module and an architecture, by name."""

    def __init__(self, module: _Module, architecture: Architecture) -> None:
        self.module, self.architecture = module, architecture
        self.matched = 0
        self.missing: list[str] = []
        self.unexpected: list[str] = []
        self.shapes: list[OtherShape] = []
        self.heads: list[tuple[str, Shape, list[int]]] = []
        self.headless: list[str] = []
        self.counters = Counter[str]()
        aux = architecture.aux.modules if architecture.aux else ()
        self.aux = any(name in module.inner for name in aux) if aux else None
        self.left_out = () if self.aux else aux
        self._walk(module, architecture.root, "")
        votes = Counter(
            n // -dim
            for _, shape, expected in self.heads
            for n, dim in zip(shape, expected, strict=True)
            if dim < 0
        )
        self.classes = max(votes, key=lambda n: votes[n], default=None)
        for name, shape, expected in self.heads:
            wanted = tuple(dim if dim >= 0 else -dim * (self.classes or 0) for dim in expected)
            if shape == wanted:
                self.matched += 1
            else:
                self.shapes.append(OtherShape(name, shape, wanted))
        if self.heads:
            self.missing += self.headless

    def _walk(self, module: _Module, number: int, prefix: str) -> None:
        known = index().modules[number]
        for name, value in known.items():
            if isinstance(value, int):
                inner = _inside(module, name)
                if inner is not None:
                    self._walk(inner, value, f"{prefix}{name}.")
                elif prefix or name not in self.left_out:
                    for below, shape in tensors(value, f"{prefix}{name}."):
                        if not below.endswith(COUNTER):
                            self._lacks(below, shape)
            elif name in module.tensors:
                self._has(prefix + name, module.tensors[name], value)
            else:
                self._lacks(prefix + name, value)
        for name in module.tensors:
            if not isinstance(known.get(name), list):
                self._extra(prefix + name)
        for name, inner in module.inner.items():
            if not isinstance(known.get(name), int):
                found = _names(inner, f"{prefix}{name}.")
                self.unexpected += [below for below in found if not below.endswith(COUNTER)]

    def _has(self, name: str, shape: Shape, expected: list[int]) -> None:
        if name.endswith(COUNTER):
            self.counters["both"] += 1
        elif not _fits(shape, expected):
            self.shapes.append(OtherShape(name, shape, tuple(expected)))
        elif _is_head(expected):
            self.heads.append((name, shape, expected))
        else:
            self.matched += 1

    def _lacks(self, name: str, shape: list[int]) -> None:
        if name.endswith(COUNTER):
            self.counters["lacks"] += 1
        else:
            (self.headless if _is_head(shape) else self.missing).append(name)

    def _extra(self, name: str) -> None:
        if name.endswith(COUNTER):
            self.counters["extra"] += 1
        else:
            self.unexpected.append(name)

    def candidate(self, prefix: str, beside: int) -> Candidate:
        """All of it, and in words."""
        return Candidate(
            names=self.architecture.names,
            score=self.matched / (self.module.size + len(self.missing)),
            prefix=prefix,
            classes=self.classes,
            head=None if self.architecture.classes is None else bool(self.heads),
            aux=self.aux,
            matched=self.matched,
            missing=tuple(self.missing),
            unexpected=tuple(self.unexpected),
            shapes=tuple(self.shapes),
            beside=beside,
            differences=tuple(self._words(prefix, beside)),
        )

    def _words(self, prefix: str, beside: int) -> list[str]:
        known = self.architecture
        words = []
        if prefix:
            words.append(
                f"prefix '{prefix}'" + (f", {beside:,} tensors beside it" if beside else "")
            )
        if known.classes is not None and not self.heads:
            words.append("without head")
        elif self.classes != known.classes:
            words.append(f"head for {self.classes:,} classes")
        if known.aux is not None and self.aux != known.aux.default:
            words.append(f"{'with' if self.aux else 'without'} {', '.join(known.aux.modules)}")
        if self.counters["lacks"]:
            few = self.counters["both"]
            words.append(f"without {self.counters['lacks'] if few else 'any'} {COUNTER}")
        if self.counters["extra"]:
            words.append(f"with {COUNTER}")
        for names, what in ((self.missing, "missing"), (self.unexpected, "unexpected")):
            if names:
                words.append(f"{len(names):,} {what}: {_some(names)}")
        if self.shapes:
            some = [f"{name} ({_text(a)}, not {_text(b)})" for name, a, b in self.shapes]
            words.append(f"{len(some):,} of other shapes: {_some(some)}")
        return words


def _names(module: _Module, prefix: str) -> list[str]:
    found = [prefix + name for name in module.tensors]
    for name, inner in module.inner.items():
        found += _names(inner, f"{prefix}{name}.")
    return found


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_FEW]) + (", …" if len(names) > _FEW else "")


def _text(shape: Shape) -> str:
    return "x".join(map(str, shape)) or "scalar"
