"""Where a checkpoint keeps its models, their copies, optimizers, schedulers, progress, rng, loader.

Found by structure, at any depth; names are hints, and tell which belongs to which.
"""

from .find import Sections, find_sections, state_dicts
from .kinds import (
    StateDict,
    is_model,
    is_nameless,
    is_optimizer,
    is_optimizer_object,
    is_scheduler,
    is_state_dict,
    param_groups,
)

__all__ = [
    "Sections",
    "StateDict",
    "find_sections",
    "is_model",
    "is_nameless",
    "is_optimizer",
    "is_optimizer_object",
    "is_scheduler",
    "is_state_dict",
    "param_groups",
    "state_dicts",
]
