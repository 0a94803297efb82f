"""Which tensor of a file is which of a model where their names differ: the evidence for a rename.

Names come first: what has its name, or has it under another prefix, is what it is. Then modules
inside modules that belong together, by their shapes. Then, where both are in the order of a model,
what stands in the same place. What is alike and side by side (``q``, ``k``, ``v``) is told apart by
words and numbers in its names, or not at all: it is unclear then.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Hashable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

from ..core.names import alphabetical, common_prefix, unwrapped
from .alike import aligned, ascending, likeness, numbers, rising, tell_apart

Shape = tuple[int, ...]

# BatchNorm's counter: it goes where its module goes, and says nothing by itself.
COUNTER = "num_batches_tracked"
_DEEPEST = 50


class Unclear(NamedTuple):
    """Modules or prefixes of the file and of the model, alike, and which is which is not clear."""

    found: tuple[str, ...]
    expected: tuple[str, ...]


class Pairing(NamedTuple):
    """For names of the file the model's names that they belong to, and why (``name``, ``prefix``,
    ``shape``, ``order``); only what is sure."""

    pairs: dict[str, str]
    why: dict[str, str]
    unclear: list[Unclear]


def pair(found: Mapping[str, Shape | None], expected: Mapping[str, Shape | None]) -> Pairing:
    """Pair the tensors of a file with those of a model, equal names included.

    Tensors are paired with tensors of the same shape only. Where all in all little agrees, only
    equal names are.
    """
    left, right = _Side(found), _Side(expected)
    unclear = _find_prefix(left, right)
    work = _Work(left.shapes(), right.shapes())
    work.by_name()
    named = dict(work.pairs)
    work.by_structure(work.left, work.right)
    if not (alphabetical(list(found)) or alphabetical(list(expected))):
        work.by_order()
    work.by_shape()
    work.check_runs()
    smaller = min(len(work.s), len(work.t))
    pairs = work.pairs if 2 * len(work.pairs) >= smaller else named
    if not named and pairs is named:
        unclear = []
    unclear += [
        Unclear(tuple(map(left.path, a)), tuple(map(right.path, b)))
        for a, b in work.unclear
        if pairs is work.pairs and work.is_open(a)
    ]
    real, why = {}, {}
    for s, t in pairs.items():
        name = left.real[s]
        real[name] = right.real[t]
        why[name] = "name" if name == right.real[t] else work.why[s]
    return Pairing(*_with_counters(real, why, found, expected), unclear)


def _with_counters(
    pairs: dict[str, str], why: dict[str, str], found: Iterable[str], expected: Container[str]
) -> tuple[dict[str, str], dict[str, str]]:
    """Counters go where the other tensors of their modules go."""
    modules = {}
    for name, new in pairs.items():
        module, _, last = name.rpartition(".")
        if new.rpartition(".")[2] == last:
            modules[module] = new.rpartition(".")[0], why[name]
    for name in found:
        module = name.rpartition(".")[0]
        if _counts(name):
            to, reason = modules.get(module, (module, "name"))
            new = f"{to}.{COUNTER}" if to else COUNTER
            if new in expected:
                pairs[name], why[name] = new, reason
    return pairs, why


class _Side:
    """The names of one side as they are compared: without wrappers, and without a prefix."""

    def __init__(self, names: Mapping[str, Shape | None]) -> None:
        self.given = names
        plain = {unwrapped(name): name for name in names}
        self.real = plain if len(plain) == len(names) else {name: name for name in names}
        self.prefix = ""

    def shapes(self) -> dict[str, Shape]:
        """The shapes by name; what is no tensor, or says nothing, left out."""
        found = {key: self.given[name] for key, name in self.real.items()}
        return {key: s for key, s in found.items() if s is not None and not _counts(key)}

    def without(self, prefix: str) -> bool:
        """Take a prefix from the names that have it; False where that would make two names one."""
        renamed = {key.removeprefix(prefix): name for key, name in self.real.items()}
        if len(renamed) < len(self.real):
            return False
        self.real, self.prefix = renamed, prefix
        return True

    def path(self, key: str) -> str:
        """What a module is really called."""
        inside = key + "."
        for full, name in self.real.items():
            if full.startswith(inside):
                return name.removesuffix(full[len(key) :])
        return self.real.get(key, key)


def _counts(name: str) -> bool:
    return name.rpartition(".")[2] == COUNTER


# ---------------------------------------------------------------------- prefixes


def _find_prefix(left: _Side, right: _Side) -> list[Unclear]:
    """Take the prefix away under which most names and shapes of one side are those of the other."""
    s, t = left.shapes(), right.shapes()
    equal = sum(t.get(name) == shape for name, shape in s.items())
    options = []
    for side, inner, outer in ((left, s, t), (right, t, s)):
        votes = _votes(inner, outer)
        if not votes:
            continue
        best = max(votes, key=lambda prefix: votes[prefix])
        if votes[best] > equal and 2 * votes[best] >= min(len(inner), len(outer)):
            rivals = [
                prefix
                for prefix, n in votes.items()
                if 2 * n > votes[best] and not (prefix.startswith(best) or best.startswith(prefix))
            ]
            options.append((votes[best], side, best, rivals))
    if options:
        _, side, best, rivals = max(options, key=lambda option: option[0])
        if not rivals:
            side.without(best)
            return []
        some = tuple(dict.fromkeys((best, *rivals)))
        return [Unclear(some, ("",)) if side is left else Unclear(("",), some)]
    if not equal:
        prefixes = common_prefix(s), common_prefix(t)
        if prefixes[0] != prefixes[1]:
            left.without(prefixes[0])
            right.without(prefixes[1])
    return []


def _votes(inner: Mapping[str, Shape], outer: Mapping[str, Shape]) -> Counter[str]:
    """For each prefix how many names and shapes are the other side's without it."""
    votes: Counter[str] = Counter()
    for name, shape in inner.items():
        at = name.find(".") + 1
        while at:
            if outer.get(name[at:]) == shape:
                votes[name[:at]] += 1
            at = name.find(".", at) + 1
    return votes


# ---------------------------------------------------------------------- modules


def _last(node: _Node) -> str:
    return node.path.rpartition(".")[2]


class _Node:
    """A module: its own tensors (by last segment: full name), its modules, and a number that is
    the same for modules that are alike but for the names of modules."""

    __slots__ = ("inner", "kind", "names", "path", "tensors")

    def __init__(self, path: str) -> None:
        self.path, self.kind = path, -1
        self.tensors: dict[str, str] = {}
        self.inner: dict[str, _Node] = {}
        self.names: list[str] = []  # of all tensors in it, in order


class _Work:
    """Two sides, and what is paired so far."""

    def __init__(self, s: dict[str, Shape], t: dict[str, Shape]) -> None:
        self.s, self.t = s, t
        self.kinds: dict[Hashable, int] = {}
        self.left, self.right = self._tree(s), self._tree(t)
        self.pairs: dict[str, str] = {}
        self.taken: dict[str, str] = {}
        self.why: dict[str, str] = {}
        self.unclear: list[tuple[list[str], list[str]]] = []

    def _tree(self, shapes: dict[str, Shape]) -> _Node:
        root = _Node("")
        nodes = [root]
        for name in shapes:
            *parts, last = name.split(".", _DEEPEST)
            node = root
            node.names.append(name)
            for part in parts:
                if part not in node.inner:
                    node.inner[part] = _Node(f"{node.path}.{part}" if node.path else part)
                    nodes.append(node.inner[part])
                node = node.inner[part]
                node.names.append(name)
            node.tensors[last] = name
        for node in reversed(nodes):  # those inside first
            own = sorted((last, shapes[name]) for last, name in node.tensors.items())
            inner = sorted(child.kind for child in node.inner.values())
            node.kind = self.kinds.setdefault((*own, *inner), len(self.kinds))
        return root

    def add(self, s: str, t: str, why: str) -> None:
        """Pair two tensors, if their shapes allow it and neither has another one."""
        if s not in self.pairs and t not in self.taken and self.s[s] == self.t[t]:
            self.pairs[s], self.taken[t], self.why[s] = t, s, why

    def remove(self, s: str) -> None:
        del self.taken[self.pairs.pop(s)], self.why[s]

    def is_open(self, paths: Iterable[str]) -> bool:
        """Whether a tensor in these modules has no pair."""
        inside = tuple(f"{path}." for path in paths)
        return any(name.startswith(inside) and name not in self.pairs for name in self.s)

    def by_name(self) -> None:
        for name in self.s:
            if name in self.t:
                self.add(name, name, "prefix")

    # ------------------------------------------------------------------ by what is inside

    def by_structure(self, left: _Node, right: _Node) -> None:
        """Pair what is in two modules that belong together: what has the same name, then modules
        that only one other is like, then those that share most of their tensors."""
        self._own(left, right)
        together = [
            (left.inner[name], right.inner[name])
            for name in left.inner
            if name in right.inner and self._agree(left.inner[name], right.inner[name])
        ]
        done = {id(node) for both in together for node in both}
        some = [node for node in left.inner.values() if id(node) not in done]
        others = [node for node in right.inner.values() if id(node) not in done]
        for kind in dict.fromkeys(node.kind for node in some):
            a = [node for node in some if node.kind == kind]
            b = [node for node in others if node.kind == kind]
            alone = len(a) == sum(node.kind == kind for node in left.inner.values())
            alone &= len(b) == sum(node.kind == kind for node in right.inner.values())
            together += self._told_apart(a, b, alone)
        done.update(id(node) for both in together for node in both)
        together += self._alike(
            [node for node in some if id(node) not in done],
            [node for node in others if id(node) not in done],
        )
        for both in together:
            self.by_structure(*both)

    def _own(self, left: _Node, right: _Node) -> None:
        """Tensors by their last segment, else by a shape that no other one has there."""
        for last, name in left.tensors.items():
            if last in right.tensors:
                self.add(name, right.tensors[last], "shape")
        for name in left.tensors.values():
            shape = self.s[name]
            same = [one for one in left.tensors.values() if self.s[one] == shape]
            there = [one for one in right.tensors.values() if self.t[one] == shape]
            if len(same) == len(there) == 1:
                self.add(name, there[0], "shape")

    def _agree(self, a: _Node, b: _Node) -> bool:
        inside = f"{b.path}."
        return a.kind == b.kind or any(
            self.pairs.get(name, "").startswith(inside) for name in a.names
        )

    def _told_apart(self, a: list[_Node], b: list[_Node], alone: bool) -> list[tuple[_Node, _Node]]:
        """Modules that are all alike, by their names where there are several."""
        if not b:
            return []
        if len(a) == len(b) == 1 and alone:
            return [(a[0], b[0])]
        if len(a) == len(b):
            names = [_last(node) for node in a], [_last(node) for node in b]
            by_number = [sorted(nodes, key=lambda one: numbers(_last(one))) for nodes in (a, b)]
            if alone and all(ascending([_last(one) for one in nodes]) for nodes in by_number):
                return list(zip(*by_number, strict=True))
            scores = [[likeness(one, other) for other in names[1]] for one in names[0]]
            best = [max(range(len(b)), key=row.__getitem__) for row in scores]
            if len(set(best)) == len(best) and all(
                row[k] > 0 and sum(score >= row[k] for score in row) == 1
                for row, k in zip(scores, best, strict=True)
            ):
                return [(node, b[k]) for node, k in zip(a, best, strict=True)]
        self.unclear.append(([node.path for node in a], [node.path for node in b]))
        return []

    def _alike(self, a: list[_Node], b: list[_Node]) -> list[tuple[_Node, _Node]]:
        """Modules that share at least half of their tensors, and more than with any other."""
        bags = {
            id(node): Counter((name.rpartition(".")[2], shapes[name]) for name in node.names)
            for nodes, shapes in ((a, self.s), (b, self.t))
            for node in nodes
        }

        def best(one: _Node, others: list[_Node]) -> _Node | None:
            shared = [
                (bags[id(one)] & bags[id(other)]).total() / max(len(one.names), len(other.names))
                for other in others
            ]
            most = max(shared, default=0.0)
            return others[shared.index(most)] if most >= 0.5 and shared.count(most) == 1 else None

        found = [(one, other) for one in a if (other := best(one, b)) is not None]
        return [(one, other) for one, other in found if best(other, a) is one]

    # ------------------------------------------------------------------ by place

    def by_order(self) -> None:
        """Pair what stands in the same place between tensors that have a pair: modules as they
        are, then single tensors, whatever they are called in there."""
        for items in (self._groups, self._singles):
            left, right = items(self.left, self.s), items(self.right, self.t)
            place = {name: i for i, (_, names) in enumerate(right) for name in names}
            fixed = [
                (i, place[self.pairs[name]])
                for i, (_, names) in enumerate(left)
                for name in [one for one in names if one in self.pairs][:1]
            ]
            for (i, j), (k, m) in pairwise([(-1, -1), *rising(fixed), (len(left), len(right))]):
                a = [one for one in left[i + 1 : k] if not self.pairs.keys() & one[1]]
                b = [one for one in right[j + 1 : m] if not self.taken.keys() & one[1]]
                for x, y in aligned([key for key, _ in a], [key for key, _ in b]):
                    for one, other in zip(a[x][1], b[y][1], strict=True):
                        self.add(one, other, "order")

    def _groups(self, root: _Node, shapes: dict[str, Shape]) -> list[tuple[Hashable, list[str]]]:
        """The modules with tensors of their own, in order: what they have, and its names."""
        groups: dict[str, list[str]] = {}
        for name in root.names:
            groups.setdefault(name.rpartition(".")[0], []).append(name)
        return [
            (
                tuple((name.rpartition(".")[2], shapes[name]) for name in sorted(names)),
                sorted(names),
            )
            for names in groups.values()
        ]

    def _singles(self, root: _Node, shapes: dict[str, Shape]) -> list[tuple[Hashable, list[str]]]:
        return [(shapes[name], [name]) for name in root.names]

    def by_shape(self) -> None:
        """Pair tensors whose shape no other one has anywhere, if their names are alike."""
        counts = Counter(self.s.values()), Counter(self.t.values())
        only = {shape: name for name, shape in self.t.items() if counts[1][shape] == 1}
        for name, shape in self.s.items():
            other = only.get(shape)
            if other is not None and counts[0][shape] == 1:
                if likeness(name.rpartition(".")[2], other.rpartition(".")[2]):
                    self.add(name, other, "shape")

    def check_runs(self) -> None:
        """Unpair what was paired by its place where like stands beside like, and names don't tell
        which is which."""
        for root, mirrored in ((self.left, False), (self.right, True)):
            for run in _runs(root, self.t if mirrored else self.s):
                back = {t: s for s, t in self.pairs.items()}
                image = back if mirrored else self.pairs
                by_place = [
                    (path, [image[name] for name in names if name in image])
                    for path, names in run
                    if any(
                        self.why[image[name] if mirrored else name] == "order"
                        for name in names
                        if name in image
                    )
                ]
                paths = [path for path, _ in by_place]
                images = [_above(names) for _, names in by_place]
                if len(paths) < 2 or tell_apart(paths, images):
                    continue
                for _, names in by_place:
                    for name in names:
                        s = name if mirrored else back[name]
                        if self.why[s] == "order":
                            self.remove(s)
                self.unclear.append((images, paths) if mirrored else (paths, images))


# ---------------------------------------------------------------------- like beside like


def _runs(root: _Node, shapes: Mapping[str, Shape]) -> Iterator[list[tuple[str, list[str]]]]:
    """Tensors, and modules, that are alike and side by side: paths, with the tensors in them."""
    todo = [root]
    while todo:
        node = todo.pop(0)
        todo += node.inner.values()
        own = [(shapes[name], name, [name]) for name in node.tensors.values()]
        inner = [(child.kind, child.path, child.names) for child in node.inner.values()]
        for entries in (own, inner):
            for _, run in groupby(entries, key=lambda entry: entry[0]):
                yield [(path, names) for _, path, names in run]


def _above(names: Sequence[str]) -> str:
    """The module that all names are in; a single tensor by itself."""
    return names[0] if len(names) == 1 else common_prefix(names).rstrip(".")
