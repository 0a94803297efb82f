"""Remove the head: the layer that turns features into classes."""

from __future__ import annotations

from ..core.checkpoint import Checkpoint
from ..core.names import wrappers
from ..core.notes import info
from ..errors import UsageError
from .carry.sections import OptimizerPolicy, remap
from .carry.state_dict import following
from .find_head import Head, find_head

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
    renaming: dict[str, str | None] = dict.fromkeys(found.names)
    if rename_head is not None:
        if len(found.modules) != 1:
            raise UsageError(
                f"the head has {len(found.modules)} modules, --rename-head takes one",
                hint=f"name one: --head '{found.modules[-1]}'",
            )
        if not all(rename_head.split(".")):
            raise UsageError(f"--rename-head takes the name of a module, not '{rename_head}'")
        old = found.modules[0]
        new = wrappers(found.names[0]) + rename_head
        renaming = {name: new + name[len(old) :] for name in found.names}
    plan = following(ckpt.sections.model().entries, renaming)
    return remap(ckpt, plan, optimizer=optimizer, record=True).noting(info(f"head: {found}"))
