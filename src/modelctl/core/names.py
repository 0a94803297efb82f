"""Dotted tensor names: patterns, wrapper prefixes, natural order, near misses; and what they say of
which are parameters and which buffers."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from fnmatch import translate
from itertools import pairwise

from ..errors import NoMatchError, UsageError
from .tensors import Role, TensorRef

# What torch.compile, checkpoint_wrapper and FSDP put before (or between) names: none that people
# give. Their own state_dicts hide the last two; a dict of ``named_parameters()`` does not.
CHECKPOINTED = "_checkpoint_wrapped_module"
RESERVED = ("_orig_mod", CHECKPOINTED, "_fsdp_wrapped_module")
# The same with what DataParallel and DistributedDataParallel put before them.
WRAPPERS = ("module", *RESERVED)
# The buffer that torch.optim.swa_utils.AveragedModel has beside the ``module.`` that it wraps.
AVERAGED = "n_averaged"

_WILDCARDS = re.compile(r"[*?\[]")

Patterns = str | Sequence[str]


def as_list(patterns: Patterns) -> list[str]:
    """One pattern or several, as a list.

    Raises:
        UsageError: something else.
    """
    several = [patterns] if isinstance(patterns, str) else patterns
    if not isinstance(several, Iterable) or not all(isinstance(p, str) for p in several):
        raise UsageError(f"{patterns!r:.60} is no pattern: a text, or several", hint="'*' is all")
    return [*several]


def _compile(pattern: str, regex: bool) -> Callable[[str], object]:
    if regex:
        try:
            return re.compile(pattern).search
        except re.error as e:
            raise UsageError(
                f"'{pattern}' is not a regular expression: {e}",
                hint="leave out --regex to use globs: *, ?, [ab]",
            ) from None
    if _WILDCARDS.search(pattern):
        match = re.compile(translate(pattern)).match
        # a name may hold wildcards itself
        return lambda name: name == pattern or match(name)
    return lambda name: name == pattern or name.startswith(pattern + ".")


def select(
    names: Collection[str],
    patterns: Patterns,
    *,
    exclude: Patterns = (),
    regex: bool = False,
    what: str = "tensor",
) -> list[str]:
    """The names that one of ``patterns`` matches and none of ``exclude`` does, in order.

    Globs: ``*`` crosses dots, ``?`` is one character, ``[ab]`` a set; a name without wildcards
    that is a module stands for its subtree. With ``regex``, patterns are searched for.

    Raises:
        NoMatchError: a pattern, or all together, match nothing.
        UsageError: not a regular expression.
    """
    taken: set[str] = set()
    for pattern in as_list(patterns):
        match = _compile(pattern, regex)
        found = [name for name in names if match(name)]
        if not found:
            raise no_match(pattern, names, what)
        taken.update(found)
    for pattern in as_list(exclude):
        match = _compile(pattern, regex)
        found = [name for name in names if match(name)]
        if not found:
            raise no_match(pattern, names, what)
        taken.difference_update(found)
    if not taken:
        raise NoMatchError(
            f"nothing is left: what {', '.join(as_list(patterns))} matches, "
            f"{', '.join(as_list(exclude))} takes away"
        )
    return [name for name in names if name in taken]


def no_match(pattern: str, names: Collection[str], what: str = "tensor") -> NoMatchError:
    """The error for a pattern that matches nothing, with the nearest real names."""
    message = f"no {what} matches '{pattern}'"
    prefix = common_prefix(names)
    near = nearest(pattern, names)
    if near:
        return NoMatchError(message, hint="nearest: " + ", ".join(near))
    if prefix:
        return NoMatchError(f"{message}; all {len(names)} start with '{prefix}'")
    return NoMatchError(message, hint=f"there are {len(names)} {what}s: see 'modelctl ls'")


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """The real names (of tensors and modules) that look most like ``name``."""
    import difflib  # only errors need it

    bare = name.strip("*.?^$")
    known: dict[str, None] = {}
    for full in names:
        parts = full.split(".")
        for end in range(1, len(parts) + 1):
            known[".".join(parts[:end])] = None
            if len(known) > 20_000:  # difflib is quadratic in what it compares
                break
    inside = [full for full in known if bare and bare in full]
    close = difflib.get_close_matches(bare, known, n=most, cutoff=0.6)
    return list(dict.fromkeys([*close, *inside]))[:most]


def common_prefix(names: Iterable[str]) -> str:
    """The dotted prefix (with its dot) that all names share, or ''."""
    shared: list[str] | None = None
    for name in names:
        parts = name.split(".")[:-1]
        if shared is None:
            shared = parts
        else:
            same = 0
            while same < min(len(shared), len(parts)) and shared[same] == parts[same]:
                same += 1
            shared = shared[:same]
        if not shared:
            return ""
    return ".".join(shared or []) + "." if shared else ""


def unwrapped(name: str) -> str:
    """The name without the wrappers' segments: the same tensor's name to a loader.

    Those at its start, and those of ``torch.compile`` and ``checkpoint_wrapper`` wherever they
    stand.
    """
    parts = name.split(".")
    parts = [*(part for part in parts[:-1] if part not in RESERVED), parts[-1]]
    while len(parts) > 1 and parts[0] in WRAPPERS:
        del parts[0]
    return ".".join(parts)


def wrappers(name: str) -> str:
    """The wrappers' segments at the start of a name, with their dots (``module._orig_mod.``)."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts[:-1]) if part not in WRAPPERS), len(parts) - 1)
    return "".join(part + "." for part in parts[:first])


def natural(name: str) -> tuple[tuple[int, int | str], ...]:
    """A sort key under which ``layer.2`` comes before ``layer.10``."""
    return tuple(
        (0, int(part)) if part.isdecimal() and len(part) < 10 else (1, part)
        for part in re.split(r"(\d+)", name)
    )


def alphabetical(names: Sequence[str]) -> bool:
    """Whether the names are sorted (as safetensors does, one dtype or shard after the other), or
    were before some of them were renamed: then the order is not the model's. In a model's own order
    every third name goes back, and ``weight`` stands before ``bias``. Two names that don't may be
    either; nothing is claimed of their order."""
    back = sum(one > other for one, other in pairwise(names))
    return len(names) > 1 and (10 * back < len(names) or _is_sorted_inside(names))


def _is_sorted_inside(names: Sequence[str]) -> bool:
    """Whether in nearly every module what is inside of it comes sorted. A ``weight`` before its
    ``bias``, and numbers that go down, are no sort's; a ``bias`` before its ``weight`` is."""
    modules: dict[tuple[int, str], int] = {}  # by the number of what each is in, and its own name
    inside: list[list[str]] = [[]]
    for name in names:
        module = 0
        for segment in name.split("."):
            below = modules.setdefault((module, segment), len(inside))
            if below == len(inside):
                inside[module].append(segment)
                inside.append([])
            module = below
    count = odd = turned = 0
    for order in inside:
        if len(order) < 2:
            continue
        count += 1
        is_sorted = order in (sorted(order), sorted(order, key=natural))
        if not is_sorted and ("weight" in order or all(map(str.isdecimal, order))):
            return False
        odd += not is_sorted
        turned += "weight" in order and "bias" in order
    return count > 0 and odd <= max(1 if turned else 0, count // 10)


# ---------------------------------------------------------------------- parameters and buffers

# Buffers of torch's, torchvision's and BART's modules that are floating, like parameters.
STATISTICS = frozenset(("running_mean", "running_var", "num_batches_tracked"))
_BUFFERS = STATISTICS | {
    *("inv_freq", "attn_mask", "relative_coords_table", "n_averaged", "final_logits_bias")
}
_INTEGER_WEIGHTS = ("weight", "qweight")


def role_of(name: str, ref: TensorRef) -> tuple[Role, bool]:
    """(role, inferred): whether a tensor is a parameter or a buffer.

    Known where the file says so (a whole module, a ``keep_vars`` state_dict); else running
    statistics and integer tensors that are no weights are taken for buffers.
    """
    if ref.role is not None:
        return ref.role, False
    last = name.rpartition(".")[2]
    if last in _BUFFERS or not (ref.dtype.is_floating or last in _INTEGER_WEIGHTS):
        return "buffer", True
    return "parameter", True


def parameters(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Those that are (or seem to be) parameters, in order."""
    return {name: ref for name, ref in tensors.items() if role_of(name, ref)[0] == "parameter"}
