"""Remove the head: the layer that turns features into classes."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.checkpoint import Checkpoint
from ..core.names import unwrapped
from ..errors import UsageError
from .find_head import Head, find_head
from .remap import OptimizerPolicy, Renaming, remap

__all__ = ["Head", "find_head", "strip_head"]


def strip_head(
    ckpt: Checkpoint,
    head: str | None = None,
    rename_head: str | None = None,
    optimizer: OptimizerPolicy = "keep",
) -> Checkpoint:
    """Remove the head, for transfer: from the model, its EMA copies and the optimizer.

    The head is found (see :func:`find_head`), or is what the pattern ``head`` names. What was
    removed (names, shapes, dtypes) is recorded, so that a loader can tell. With ``rename_head``
    the head is kept under that module name instead, where no new model looks for it.

    Raises:
        NoMatchError, AmbiguousError, RefusedError: as :func:`find_head`; or the optimizer can't
            be kept in step (``optimizer="drop"`` leaves it out).
    """
    found = find_head(ckpt, head)
    gone = {unwrapped(name) for name in found.names}
    if rename_head is None:

        def plan(names: Sequence[str]) -> Renaming:
            return {name: None for name in names if unwrapped(name) in gone}

    else:
        if len(found.modules) != 1:
            raise UsageError(
                f"the head has {len(found.modules)} modules, --rename-head takes one",
                hint=f"name one: --head '{found.modules[-1]}'",
            )
        if not all(rename_head.split(".")):
            raise UsageError(f"--rename-head takes the name of a module, not '{rename_head}'")
        old = unwrapped(found.modules[0])

        def plan(names: Sequence[str]) -> Renaming:
            out: dict[str, str | None] = {}
            for name in names:
                bare = unwrapped(name)
                if bare in gone:
                    wrapper = name[: len(name) - len(bare)]
                    out[name] = f"{wrapper}{rename_head}{bare[len(old) :]}"
            return out

    return remap(ckpt, plan, optimizer=optimizer).noting(f"head: {found}")
