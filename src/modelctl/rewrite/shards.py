"""What an edit in place keeps and says of shards and of the index that names them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from shlex import quote

from ..core.checkpoint import Checkpoint
from ..core.nodes import mapping
from ..core.notes import Note, info, warning
from ..core.text import count, some
from ..errors import RefusedError
from ..formats.shards.writing import shards_in
from .naming import is_sharded, opened


def shard_size(before: Checkpoint) -> int | None:
    """The bytes in the biggest of the shards that were read, so that new ones are about as big;
    None where there were no shards."""
    if not is_sharded(before):
        return None
    shards = (shards_in(before.origin.path) if before.origin is not None else None) or {}
    sizes: dict[str | None, dict[int, int]] = {}
    for name, ref in before.state_dict().items():
        sizes.setdefault(shards.get(name), {})[id(ref.storage)] = ref.storage.nbytes
    sizes.pop(None, None)  # tied to one that the index names
    return max((sum(of.values()) for of in sizes.values()), default=1) or 1


def check_index(after: Checkpoint, path: str) -> None:
    """Raises RefusedError where a file is one of the shards of an index, which would not find in
    the new one what it puts there."""
    folder, name = os.path.split(path)
    try:
        beside = os.listdir(folder or ".")
    except OSError:
        return
    for other in sorted(beside):
        if ".index" not in other or not other.endswith(".json"):
            continue
        shards = shards_in(Path(folder, other)) or {}
        names = [tensor for tensor, shard in shards.items() if shard == name]
        missing = [tensor for tensor in names if tensor not in (mapping(after.root) or {})]
        if missing:
            index = os.path.join(folder, other)
            raise RefusedError(
                f"{path} is a shard of {other}, which would no longer fit it: it puts "
                f"{some(missing, 2)} there",
                hint=f"edit all shards at once, by their index: {quote(index)}",
            )


def about_shards(before: Checkpoint, saved: Path, files: int) -> Iterator[Note]:
    """What became of the shards that were read, and how many files were written instead.

    Args:
        saved: the new index, or the file that took the place of all.
    """
    index = before.origin.path if before.origin is not None else ""
    old = [one.path for one in opened(before)]
    stay = [one.name for one in old if str(one) != index and one != saved and one.exists()]
    new = count(files - 1, "new shard") if files > 1 else "one file now"
    if stay:
        yield warning(
            f"{new}; the old ones stay, and this index names them no more: {some(stay)}",
            "remove them where no other index needs them",
        )
    else:
        yield info(f"{new}; the old ones are gone")
