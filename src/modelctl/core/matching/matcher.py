"""The one matcher of names and shapes: which tensor of a file is which of a model.

Wrappers (DataParallel, ``torch.compile``) on either side don't matter. What one side has before
its names and the other lacks (Lightning's ``model.``) is found where names and shapes show it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any, NamedTuple

from ...errors import CollisionError, NoMatchError
from ..names import WRAPPERS, unwrapped
from ..text import some

Shape = tuple[int, ...]
# None for what is no tensor (extra state, numbers), or has no shape yet.
Shapes = Mapping[str, "Shape | None"]

# BatchNorm's counter: it goes where its module goes, and says nothing by itself.
COUNTER = "num_batches_tracked"
# A prefix has no more segments.
_DEEPEST = 50


def fits(found: Shape | None, expected: Shape | None) -> bool:
    """Whether a tensor can be copied into another one: torch takes one element for a scalar, as
    files before 0.4 have it. What has no shape takes anything."""
    return expected is None or found == expected or (found, expected) == ((1,), ())


def counts(version: Any) -> bool:
    """Whether a BatchNorm of that version has a counter; torch makes the one that is not there."""
    return isinstance(version, int) and version >= 2


# ---------------------------------------------------------------------- names


class Names:
    """The names of a model, found by what others call them."""

    def __init__(self, names: Iterable[str]) -> None:
        self._own = {*names} if not isinstance(names, Mapping) else names.keys()
        self._bare: dict[str, str] = {}
        for name in names:
            self._bare.setdefault(unwrapped(name), name)

    def meant(self, name: str) -> str | None:
        """The one that a name from elsewhere means: the same, else the first of it without one
        wrapper, without two …, else the one that is the same without any; None where none is."""
        peeled = name
        while peeled not in self._own:
            head, dot, rest = peeled.partition(".")
            if not dot or head not in WRAPPERS:
                return self._bare.get(unwrapped(name))
            peeled = rest
        return peeled


def match_names(foreign: Iterable[str], own: Iterable[str]) -> dict[str, str]:
    """For names from elsewhere the model's own that each means; what means none is left out.

    Raises:
        CollisionError: two of them mean the same.
    """
    known = Names(own)
    found: dict[str, str] = {}
    taken: dict[str, str] = {}
    for name in foreign:
        meant = known.meant(name)
        if meant is None:
            continue
        if taken.setdefault(meant, name) != name:
            raise CollisionError(f"'{taken[meant]}' and '{name}' both mean the model's '{meant}'")
        found[name] = meant
    return found


# ---------------------------------------------------------------------- prefixes


class Prefixes(NamedTuple):
    """What the names of a file, or those of the model, have before them and the other's have not,
    wrappers left out; ``tensors`` of the model fit so. Of several prefixes that would do none is
    taken: they are ``rivals``, all of one side. Nor is ``weak``, of the file, by which too little
    fits, but more than without."""

    found: str = ""
    expected: str = ""
    tensors: int = 0
    rivals: tuple[str, ...] = ()
    of_model: bool = False  # whose the rivals are
    weak: str = ""

    @property
    def of_parts(self) -> tuple[str, ...]:
        """What the model's names begin with where the file has a part of it, or what they may."""
        return self.rivals if self.of_model else (self.expected,) if self.expected else ()


def find_prefixes(found: Shapes, expected: Shapes) -> Prefixes:
    """The prefix of either side without which most names and shapes are the other side's.

    The names as they are count where half of the other side's fit by them, and a prefix where
    half of the smaller side's do: of one within another (``net.``, and ``net.ema.`` for a copy in
    it) the outer one, where half fit by it. One by which less fits is no rival, but where it is
    more than half as good and has something that the best one lacks.
    """
    s, t = _told(found), _told(expected)
    equal = sum(name in t and fits(shape, t[name]) for name, shape in s.items())
    weak = ""
    for of_model, inner, outer in ((False, s, t), (True, t, s)):
        if 2 * equal >= len(outer):
            continue
        under = _under(inner, outer, of_model)
        best = max(under, key=lambda prefix: (len(under[prefix]), -len(prefix)), default="")
        most = len(under.get(best, ()))
        if most <= equal:
            continue
        if 2 * most < min(len(s), len(t)):
            weak = weak if of_model else best
            continue
        around = (p for p in under if best.startswith(p) and 2 * len(under[p]) >= len(outer))
        best = min(around, key=len, default=best)
        likely = tuple(
            prefix
            for prefix, names in under.items()
            if prefix == best
            or (
                not (_nested(prefix, best) or 2 * len(names) <= most)
                and (len(names) == most or not under[best].issuperset(names))
            )
        )
        if len(likely) > 1:
            return Prefixes("", "", most, likely, of_model)
        tensors = len(under[best])
        return Prefixes("", best, tensors) if of_model else Prefixes(best, "", tensors)
    return Prefixes(tensors=equal, weak=weak)


def _told(names: Shapes) -> dict[str, Shape | None]:
    """By their bare names those that say something."""
    return {
        unwrapped(name): shape
        for name, shape in names.items()
        if name.rpartition(".")[2] not in (COUNTER, "_extra_state")
    }


def _under(inner: Shapes, outer: Shapes, of_model: bool) -> dict[str, set[str]]:
    """For each prefix the names that are the other side's, in name and shape, without it."""
    under: dict[str, set[str]] = {}
    for name, shape in inner.items():
        at = name.find(".") + 1
        for _ in range(_DEEPEST):
            if not at:
                break
            bare = name[at:]
            if bare in outer:
                pair = (outer[bare], shape) if of_model else (shape, outer[bare])
                if fits(*pair):
                    under.setdefault(name[:at], set()).add(bare)
            at = name.find(".", at) + 1
    return under


def _nested(prefix: str, other: str) -> bool:
    return prefix.startswith(other) or other.startswith(prefix)


def as_written(names: Iterable[str], prefix: str) -> str:
    """A prefix with the wrappers that names have before it (``module.model.`` of ``model.``)."""
    written: Counter[str] = Counter()
    for name in names:
        bare = unwrapped(name)
        if bare.startswith(prefix) and name.endswith(bare[len(prefix) :]):
            written[name[: len(name) - len(bare) + len(prefix)]] += 1
    return max(written, key=written.__getitem__, default=prefix)


def without(name: str, prefix: str, alone: bool = False) -> str | None:
    """A name without wrappers and prefix; one that does not begin with the prefix as it is, or,
    with ``alone``, None."""
    bare = unwrapped(name) if prefix else ""
    if not prefix or not bare.startswith(prefix):
        return None if prefix and alone else name
    return bare[len(prefix) :]


def given_prefix(names: Collection[str], prefix: str) -> str:
    """A prefix as the caller wrote it, with its dot and without wrappers.

    Raises:
        NoMatchError: none of the names begins with it.
    """
    wanted = unwrapped(prefix.rstrip(".") + ".x")[:-1] if prefix else ""
    if not any(without(name, wanted, alone=True) for name in names):
        firsts = [*dict.fromkeys(unwrapped(name).partition(".")[0] + "." for name in names)]
        raise NoMatchError(
            f"no name in the file begins with '{wanted}'", hint=f"they begin with {some(firsts)}"
        )
    return wanted
