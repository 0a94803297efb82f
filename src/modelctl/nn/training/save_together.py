"""A training whose model is sharded over ranks, as one folder of torch.distributed.checkpoint (DCP)
into which each of them writes its own parts. Imported by who saves such a one: it takes a while."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save

from ...core.text import some
from ...core.tree import Path
from ...errors import RefusedError, WriteError
from ...files import open as open_checkpoint
from ...formats.distributed.metadata import RECORDS
from ...storage.staging import staged_folder
from ...storage.targets import made_folder
from ..loading.sharded import is_sharded
from ..loading.together import Together
from .rows.rotation import Row


def save_together(
    row: Row,
    content: Mapping[str, Any],
    records: Mapping[str, Any],
    ranks: Together,
    *,
    overwrite: bool,
) -> None:
    """Write a training's folder; every rank calls this. It appears whole or not at all.

    Of what is no DTensor (buffers, progress, generators) rank 0's counts. ``records`` are those
    of the model.

    Raises:
        RefusedError: another rank was refused; or the model is not sharded over all of them.
        WriteError: it can't be written; what stood there is intact.
        DurabilityError: it was written whole, but its directory could not be synced.
    """
    members = ranks.members()
    world = dist.get_world_size() if dist.is_initialized() else 1
    if len(members) < world:
        raise RefusedError(
            f"the model is sharded over {len(members)} of {world} ranks: all write a folder",
            hint="torch.distributed.checkpoint.save(..., process_group=) writes one of these alone",
        )
    names = _tensors(content)
    known = ranks.of_first(names)
    with ranks.agreeing("before anything was written"):
        if names != known:
            odd = some(sorted({*names} ^ {*known}) or names, 3)
            raise RefusedError(
                f"rank {dist.get_rank()} has other tensors than the first rank ({odd}): those that "
                "are no DTensors would be lost",
                hint="make them DTensors, or save with torch.distributed.checkpoint",
            )
    first = 0 if world == 1 else min(members)
    writes = world == 1 or dist.get_rank() == first
    with ranks.agreeing("while it saved"):
        with ExitStack() as stack:
            with ranks.agreeing("before anything was written"):
                name = ""
                if writes:
                    stack.enter_context(made_folder(os.path.dirname(os.path.abspath(row.path))))
                    name = stack.enter_context(staged_folder(row.path, overwrite=overwrite)).name
            folder = row.path.parent.resolve() / ranks.of_first(name)
            with ranks.agreeing("before anything was written"):
                if not folder.is_dir():
                    raise WriteError(
                        f"{row.path}: there is no folder {folder} here, which rank 0 has made",
                        hint="all ranks write to one file system",
                    )
            with ranks.agreeing("while it wrote"):
                own = dict(content) if writes else _shards(content)
                _write(own, folder, _Planner(records if writes else {}), str(row.path))
                if writes:
                    with open_checkpoint(folder):
                        pass  # all files are there, and understood
        if writes:
            row.finish()


def _write(content: dict[str, Any], folder: os.PathLike[str], planner: Any, shown: str) -> None:
    try:
        save(content, checkpoint_id=folder, planner=planner)
    except CheckpointException as e:
        rank, why = next(iter(sorted(e.failures.items())))
        raise WriteError(
            f"{shown}: not written, what stood there is as it was: rank {rank}: {why[0]}"
        ) from e


def _tensors(content: Mapping[str, Any]) -> list[str]:
    """The names in the model, and in its average."""
    return [f"{key}.{name}" for key in ("model", "ema") for name in content.get(key, ())]


def _shards(node: Any) -> Any:
    """A tree without what is no DTensor: of that the first rank has the whole."""
    items = enumerate(node) if isinstance(node, list | tuple) else ()
    found = {}
    for key, value in node.items() if isinstance(node, Mapping) else items:
        inner = value if is_sharded(value) else _shards(value)
        if inner is not None:
            found[key] = inner
    return found or None


class _Planner(DefaultSavePlanner):
    """torch's own, which keeps what is recorded of the model, and dicts with nothing in them."""

    def __init__(self, records: Mapping[str, Any]) -> None:
        super().__init__()
        self.records = dict(records)

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:  # torch looks at the names, and warns without them
        super().set_up_planner(state_dict, storage_meta, is_coordinator)
        for path in _empty(state_dict, ()):
            name = ".".join(map(str, path))
            self.state_dict[name], self.mappings[name] = {}, path

    def create_global_plan(self, all_plans: Any) -> Any:
        plans, metadata = super().create_global_plan(all_plans)
        if self.records:  # the one field that every torch keeps, and where it asks for names alone
            metadata.planner_data[RECORDS] = self.records
        return plans, metadata


def _empty(node: Any, path: Path) -> list[Path]:
    """Where dicts with nothing in them are."""
    if isinstance(node, Mapping):
        inner = [(str(key), value) for key, value in node.items()]
        return [one for key, value in inner for one in _empty(value, (*path, key))] or (
            [path] if not node else []
        )
    if isinstance(node, list):
        return [one for i, value in enumerate(node) for one in _empty(value, (*path, i))]
    return []
