"""Strip and add prefixes of tensor names, in every section."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.checkpoint import Checkpoint
from ..core.names import AVERAGED, RESERVED, WRAPPERS, common_prefix, no_match
from ..core.notes import info, warning
from ..errors import UsageError
from .carry.sections import remap
from .carry.state_dict import Renaming, following


def strip_prefix(ckpt: Checkpoint, prefix: str | None = None) -> Checkpoint:
    """Remove what DataParallel, DistributedDataParallel and torch.compile put before names.

    By default ``module.``, ``_orig_mod.``, ``_fsdp_wrapped_module.`` and
    ``_checkpoint_wrapped_module.``, each where all names have it, until none is left (all but
    ``module.`` also inside names: a compiled or wrapped submodule). With ``prefix`` exactly that
    one, once, from the names that have it. ``_metadata``, EMA copies, the optimizer's
    ``param_names`` and records follow. Where only some names have one, or none, nothing
    changes, and a note says so.

    Raises:
        NoMatchError: no name has ``prefix``.
        CollisionError: two tensors would get one name.
    """
    if prefix is not None:
        wanted = prefix if prefix.endswith(".") else prefix + "."

        def starting(names: Sequence[str]) -> Renaming:
            return {
                name: name[len(wanted) :]
                for name in names
                if name.startswith(wanted) and len(name) > len(wanted)
            }

        names = list(ckpt.sections.model().entries)
        renaming = starting(names)
        if not renaming:
            raise no_match(wanted + "*", names)
        follow = following(names, renaming)
        return remap(ckpt, lambda others: {**starting(others), **follow(others)})
    names = list(ckpt.sections.model().entries)
    out = remap(ckpt, _unwrap, copies=_unwrap_copy)
    if out.root is not ckpt.root:
        return out
    partly = sum(name.startswith("module.") for name in names)
    if partly:  # a wrapper's, or a child that is really called so: not ours to guess
        return ckpt.noting(
            warning(
                f"{partly} of {len(names)} names start with 'module.': not stripped",
                "--prefix module. strips it from those that have it",
            )
        )
    return ckpt.noting(info("no name has a wrapper prefix: nothing to strip"))


def add_prefix(ckpt: Checkpoint, prefix: str) -> Checkpoint:
    """Put a prefix before every name, as a module around the model would: the inverse of
    :func:`strip_prefix` with that prefix.

    Raises:
        UsageError: a prefix that no module can have.
        RefusedError: the model is a whole module, whose names are its class's.
    """
    wanted = prefix if prefix.endswith(".") else prefix + "."
    if not all(wanted[:-1].split(".")):
        raise UsageError(f"'{prefix}' is no prefix: module names joined with dots are")
    names = list(ckpt.sections.model().entries)
    return remap(ckpt, following(names, {name: wanted + name for name in names}))


def _unwrap(names: Sequence[str]) -> Renaming:
    current = dict(zip(names, names, strict=True))
    while True:
        live = [name for name in current.values() if name != AVERAGED]
        first = next(iter(live), "").partition(".")[0]
        if first not in WRAPPERS or not all(
            name.startswith(first + ".") and len(name) > len(first) + 1 for name in live
        ):
            break
        current = {
            old: name if name == AVERAGED else name[len(first) + 1 :]
            for old, name in current.items()
        }
    stripped = any(old != new for old, new in current.items())
    out: dict[str, str | None] = {}
    for old, name in current.items():
        parts = name.split(".")
        # torch.compile's and the like are no names that people give: they go wherever they stand
        new = ".".join([*(part for part in parts[:-1] if part not in RESERVED), parts[-1]])
        if old == AVERAGED and stripped and current[old] == AVERAGED:
            out[old] = None
        elif new != old:
            out[old] = new
    return out


def _unwrap_copy(names: Sequence[str]) -> Renaming:
    """An EMA copy that torch's AveragedModel made keeps that wrapper's own names."""
    if AVERAGED not in names:
        return _unwrap(names)
    inner = {name: name[len("module.") :] for name in names if name.startswith("module.")}
    found = _unwrap(list(inner.values()))
    return {name: f"module.{found[bare]}" for name, bare in inner.items() if bare in found}


def wrapper_prefix(names: Sequence[str]) -> str:
    """The wrapper prefix that all names share (``module.``), or ''."""
    shared = common_prefix([name for name in names if name != AVERAGED])
    parts = []
    for part in shared.rstrip(".").split("."):
        if part not in WRAPPERS:
            break
        parts.append(part)
    return ".".join(parts) + "." if parts else ""
