"""Which known architecture a checkpoint's tensors are: the data behind ``modelctl identify``.

The tensors of a file are put into a tree of modules, and every module of it, wherever it stands, is
compared with the root of every architecture. Modules that are alike are compared once.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ...core.checkpoint import Checkpoint
from ...core.matching.matcher import COUNTER
from ...core.names import WRAPPERS
from ...core.nodes import Composite
from ...core.tensors import TensorRef
from ...core.text import shape, some
from .candidates import Candidate, Candidates, OtherShape
from .index import Architecture, Shape, index, tensors

# Where less than this agrees, nothing is claimed.
LEAST = 0.7
# Names in the files of densenets that torchvision offers to this day; it renames them itself.
_OLD_NAME = re.compile(r"(denselayer\d+\.(?:norm|conv))\.([12]\.)")
# Nobody has so many classes.
_HUGE = 1 << 31
# No model nests so deep: what is below is one name.
_DEEPEST = 30
_FEW, _LONG = 3, 100
# The largest known model has 1,548 tensors: no answer for more is certain.
_MOST_KNOWN = 2_000
# More are not looked at: a file of thousands of small models.
_MOST = 200


def identify(ckpt: Checkpoint) -> Candidates:
    """The architectures that the tensors may belong to, best first; none where too little agrees.

    The model's tensors are looked at, or all in the file where no model is clear. The same tensors
    under several prefixes (two encoders) are several candidates.
    """
    found = identify_shapes(shapes_of(ckpt))
    found.source = ckpt.origin.path if ckpt.origin else None
    return found


def certain_of(ckpt: Checkpoint) -> Candidate | None:
    """The architecture that the tensors certainly are; files that are too large for any known
    one are not looked at."""
    return identify(ckpt).certain if len(shapes_of(ckpt)) <= _MOST_KNOWN else None


def shapes_of(ckpt: Checkpoint) -> dict[str, Shape]:
    """The shapes of the model's tensors by name, or of all in the file where no model is clear."""
    sections = ckpt.sections
    if sections.models and sections.certain:
        entries = ckpt.packed.unpacked(sections.models[0].entries).items()
        return {name: v.shape for name, v in entries if isinstance(v, TensorRef | Composite)}
    return {name: ref.shape for name, ref in ckpt.tensors().items()}


def identify_shapes(shapes: Mapping[str, Shape]) -> Candidates:
    """As :func:`identify`, for names and shapes."""
    now = {_OLD_NAME.sub(r"\1\2", name): shape for name, shape in shapes.items()}
    old = now.keys() != shapes.keys()
    root = _tree(now)
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
    taken: set[str] = set()
    around: set[str] = set()
    candidates = []
    for _, place, module, architecture in found[:_MOST]:
        above = {place[: at + 1] for at, c in enumerate(place[:-1]) if c == "."} | {""} - {place}
        if place not in around and not above & taken:
            taken.add(place)
            around |= above
            beside = root.size - module.size
            candidates.append(_candidate(module, architecture, place, beside, old))
    return Candidates(sorted(candidates, key=lambda one: (-one.score, -one.matched)))


def compared(shapes: Mapping[str, Shape], architecture: Architecture) -> Candidate:
    """What agrees and what differs between tensors and one architecture."""
    return _candidate(_tree(shapes), architecture)


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
        inside = [(f"{prefix}{name}.", inner) for name, inner in module.inner.items()]
        todo += inside[::-1]
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
        n == dim or (dim < 0 < n < _HUGE and n % dim == 0)
        for n, dim in zip(shape, expected, strict=True)
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


def _candidate(
    module: _Module,
    architecture: Architecture,
    prefix: str = "",
    beside: int = 0,
    old: bool = False,
) -> Candidate:
    have = dict(_flat(module))
    modules = architecture.aux.modules if architecture.aux else ()
    aux = any(name in module.inner for name in modules)
    want = {
        name: shape
        for name, shape in tensors(architecture.root)
        if aux or name.partition(".")[0] not in modules
    }
    heads = [name for name, dims in want.items() if _is_head(dims) and name in have]
    classes = _classes((have[name], want[name]) for name in heads)
    matched, missing, shapes = 0, [], []
    for name, dims in want.items():
        expected = tuple(dim if dim >= 0 else -dim * (classes or 0) for dim in dims)
        if name.endswith(COUNTER):
            continue
        if name not in have:
            if heads or not _is_head(dims):
                missing.append(name)
        elif have[name] == expected:
            matched += 1
        else:
            shapes.append(OtherShape(name, have[name], expected))
    unexpected = [name for name in have if name not in want and not name.endswith(COUNTER)]
    known = architecture.classes
    args = [f"num_classes={classes}"] if classes is not None and classes != known else []
    words = [f"prefix '{prefix}'" + (f", {beside:,} tensors beside it" if beside else "")]
    words = words if prefix else []
    if old:
        words.append("names that torchvision has given up: norm.1 for norm1")
    if known is not None and not heads:
        words.append("without head")
    elif args:
        words.append(f"head for {classes:,} classes")
    if architecture.aux is not None and aux != architecture.aux.default:
        args.append(f"{architecture.aux.option}={str(aux).lower()}")
        words.append(f"{'with' if aux else 'without'} {', '.join(modules)}")
    counters = [{name for name in some if name.endswith(COUNTER)} for some in (have, want)]
    if counters[1] - counters[0]:
        n = f"{len(counters[1] - counters[0]):,}" if counters[0] & counters[1] else "any"
        words.append(f"without {n} {COUNTER}")
    if counters[0] - counters[1]:
        words.append(f"with {len(counters[0] - counters[1]):,} {COUNTER}")
    for names, what in ((missing, "missing"), (unexpected, "unexpected")):
        if names:
            words.append(f"{len(names):,} {what}: {some(_cut(names), _FEW)}")
    if shapes:
        other = [f"{name} ({shape(a)}, not {shape(b)})" for name, a, b in shapes]
        words.append(f"{len(other):,} of other shapes: {some(_cut(other), _FEW)}")
    return Candidate(
        names=architecture.names,
        score=matched / (module.size + len(missing)),
        prefix=prefix,
        classes=classes,
        head=None if known is None else bool(heads),
        aux=aux if modules else None,
        matched=matched,
        missing=tuple(missing),
        unexpected=tuple(unexpected),
        shapes=tuple(shapes),
        beside=beside,
        old=old,
        args=tuple(args),
        differences=tuple(words),
    )


def _classes(heads: Iterable[tuple[Shape, list[int]]]) -> int | None:
    """The number of classes that most dimensions of a head tell."""
    votes = Counter(
        n // -dim
        for shape, expected in heads
        if _fits(shape, expected)
        for n, dim in zip(shape, expected, strict=True)
        if dim < 0
    )
    return max(votes, key=lambda n: votes[n], default=None)


def _flat(module: _Module, prefix: str = "") -> Iterator[tuple[str, Shape]]:
    """All tensors of a module by their names without wrappers."""
    for name, dims in module.tensors.items():
        yield prefix + name, dims
    for name in module.inner:
        inner = _inside(module, name)
        if inner is not None:
            yield from _flat(inner, f"{prefix}{name}.")


def _cut(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= _LONG else f"{name[:_LONG]}…" for name in names]
