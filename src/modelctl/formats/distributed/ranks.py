"""Folders of one file a rank, each with its own part of tensors (docs/formats.md#rank-files): FSDP2
and tensor parallel (DTensor), FSDP1 (ShardedTensor). Joined along their placements."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from shlex import quote
from typing import Any

from ...core.checkpoint import Checkpoint, Origin
from ...core.nodes import Composite
from ...core.notes import Note, warning
from ...core.tensors import TensorRef
from ...core.text import count, some
from ...core.tree import Path, get, path_text, rebuild, walk
from ...errors import ModelctlError, UnreadableError, UnsupportedError
from ...pickles.interpreter import most_bytes
from ...storage.chunked import Chunk, ChunkedStorage, placed
from ...storage.places import Place
from ..base import Format
from ..pytorch.zip import TorchZip
from ..shards.writing import INDEX
from .sharding import Sharded, is_sharded, ranks_of, sharded

_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_NUMBER = re.compile(r"\d+")
_BETWEEN = re.compile(r"[\W_]+")
# What the name of a file ends with that says which rank it is of.
_OF_RANK = frozenset(("", "world", "size", "of", "mp", "tp", "pp", "dp", "rank", "shard"))
_OURS = (b"torch.distributed.tensor", b"torch.distributed._tensor", b"_shard.sharded_tensor")
_FILES = TorchZip()
# What FSDP1 saves under LOCAL_STATE_DICT.
_FLAT = ("_flat_param", "flat_param")

# The files of a group by their rank.
Ranks = dict[int, str]


class RankFiles(Format):
    """A file a rank: of the model, and maybe of the optimizer and of the rest, too."""

    name = "ranks"
    label = "rank files"

    def sniff(self, place: Place) -> bool:
        return any(_is_of_rank(place, next(iter(g.values()))) for g in _groups(place).values())

    def read(self, place: Place) -> Checkpoint:
        groups = {
            name: ranks
            for name, ranks in _groups(place).items()
            if _FILES.sniff(place.member(next(iter(ranks.values()))))
        }
        grouped = {name for ranks in groups.values() for name in ranks.values()}
        others = [name for name in place.names if name not in grouped]
        most = max(len(ranks) for ranks in groups.values())
        kinds = [[*ranks.values()] for ranks in groups.values()]
        kinds += [[one] for one in others if one.endswith(_SUFFIXES) and _is_of_rank(place, one)]
        few = next((names for names in kinds if len(names) < most), None)
        if few is not None:
            raise UnreadableError(
                f"{count(most, 'rank')} wrote here, and only {count(len(few), 'file')} of a kind: "
                f"{some(few)}",
                path=place.name,
                hint="copy the folder again, with the files of all ranks",
            )
        parts = {name: _Group(place, ranks) for name, ranks in groups.items()}
        joined = {name: part.joined() for name, part in parts.items()}
        read = [one for part in parts.values() for one in part.read]
        return Checkpoint(
            next(iter(joined.values())) if len(joined) == 1 else joined,
            Origin(
                place.name,
                self.name,
                f"{count(most, 'rank')}, {count(len(read), 'file')}",
                sum(one.origin.bytes_on_disk for one in read if one.origin),
            ),
            warnings=(*dict.fromkeys(w for one in read for w in one.warnings), *not_read(others)),
            findings=tuple(finding for one in read for finding in one.findings),
        )


def _groups(place: Place) -> dict[str, Ranks]:
    """The files in a folder whose names differ by one number, by what is before the numbers."""
    alike: dict[str, list[str]] = {}
    if any(name.endswith(INDEX) for name in place.names):  # shards
        return {}
    for name in place.names:
        if name.endswith(_SUFFIXES) and _NUMBER.search(name):
            alike.setdefault(_NUMBER.sub("#", name), []).append(name)
    found: dict[str, Ranks] = {}
    for skeleton, names in alike.items():
        numbers = [[int(n) for n in _NUMBER.findall(name)] for name in names]
        varying = [i for i, column in enumerate(zip(*numbers, strict=True)) if len({*column}) > 1]
        if len(names) == 1 or len(varying) != 1:
            continue
        pairs = sorted((row[varying[0]], name) for row, name in zip(numbers, names, strict=True))
        ranks = dict(pairs)
        title = _title(skeleton)
        if len(ranks) == len(pairs):  # 1 and 01 are no two ranks
            found[title if title not in found else skeleton] = ranks
    return found


def _title(skeleton: str) -> str:
    """What files are called without what says which rank each is of."""
    words = _BETWEEN.split(skeleton.rpartition(".")[0])
    while words and words[-1].lower() in _OF_RANK:
        words.pop()
    return "_".join(words) or skeleton


def _is_of_rank(folder: Place, file: str) -> bool:
    place = folder.member(file)
    if place.zip is None or not _FILES.sniff(place):
        return False
    name = next(name for name in place.zip.members if name.rpartition("/")[2] == "data.pkl")
    data = place.zip.read(name, most_bytes(place.size))
    return any(word in data for word in _OURS)


def not_read(names: Sequence[str]) -> list[Note]:
    """What to say of other checkpoints beside those of the ranks: Lightning's ``meta.pt``,
    Megatron's ``common.pt``, …"""
    others = [name for name in names if name.endswith(_SUFFIXES)]
    if not others:
        return []
    what = "is" if len(others) == 1 else "are"
    return [Note("advice", f"{some(others)} beside it {what} not read here", "name it by itself")]


def of_one_rank(place: Place, node: Composite) -> Note | None:
    """What to say of one file of several ranks that was named by itself, or is alone in its
    folder, by a tensor in it; None of any other."""
    ranks = ranks_of(node) if is_sharded(node) else 1
    if ranks == 1:
        return None
    folder = quote(os.path.dirname(os.path.abspath(place.name)))
    return warning(
        f"one of {ranks or 'several'} ranks: it has a part of each tensor",
        "copy the files of the other ranks beside it"
        if place.is_folder
        else f"name the folder, which joins them: {folder}",
    )


class _Group:
    """The files of one kind, one of each rank."""

    def __init__(self, place: Place, ranks: Ranks) -> None:
        self.place, self.ranks = place, ranks
        self.read = place.together(_FILES.read, [place.member(one) for one in ranks.values()])

    def joined(self) -> Any:
        """Their tree, with tensors that are whole. What is no part of a tensor is the first
        rank's; trees without such parts (generators of random numbers, …) stay a list.

        Raises:
            UnreadableError: a rank is missing, or they are of different saves.
        """
        roots = [one.root for one in self.read]
        found = {
            path: node
            for path, node in walk(roots[0])
            if isinstance(node, Composite) and is_sharded(node)
        }
        if not found:
            return roots
        flat = [path for path in found if str(path[-1]).rpartition(".")[2] in _FLAT]
        if flat:
            raise UnsupportedError(
                f"{self.place.name}: {path_text(flat[0])!r:.200}: FSDP's flat parameters, of which "
                "the files do not say what they are made of",
                hint="save it with StateDictType.SHARDED_STATE_DICT or FULL_STATE_DICT",
            )
        changes: dict[int, TensorRef] = {}
        for path, node in found.items():
            if id(node) not in changes:
                changes[id(node)] = self._tensor(path, [self._at(root, path) for root in roots])
        for rank, root in zip(self.ranks, roots, strict=True):
            self._check_same(found, rank, root)
        return rebuild(roots[0], changes)

    def _at(self, root: Any, path: Path) -> Composite:
        try:
            node = get(root, path)
        except KeyError:
            node = None
        if not isinstance(node, Composite) or not is_sharded(node):
            raise self._mixed(f"{path_text(path)!r:.200} is not in the files of all ranks")
        return node

    def _check_same(self, found: Mapping[Path, Any], rank: int, root: Any) -> None:
        """A rank holds no part of a tensor that the first one does not know."""
        for path, node in walk(root):
            if isinstance(node, Composite) and path not in found and is_sharded(node):
                raise self._mixed(f"{path_text(path)!r:.200} is in the file of rank {rank} alone")

    def _mixed(self, what: str) -> UnreadableError:
        return UnreadableError(
            what, path=self.place.name, hint="the files are of one save, and of all its ranks?"
        )

    def _tensor(self, path: Path, nodes: Sequence[Composite]) -> TensorRef:
        chunks: list[Chunk] = []
        whole: Sharded | None = None
        try:
            for (rank, name), node in zip(self.ranks.items(), nodes, strict=True):
                part = sharded(node, rank)
                whole = whole or part
                if part[:2] != whole[:2]:
                    raise UnreadableError(
                        f"{list(part.shape)} in {name}, {list(whole.shape)} in the first file"
                    )
                chunks += [Chunk.of(held.offsets, held.ref, name) for held in part.held]
            assert whole is not None
            inside = placed(whole.shape, chunks)
        except ModelctlError as e:
            if isinstance(e, UnsupportedError):
                raise UnsupportedError(
                    f"{self.place.name}: {path_text(path)!r:.200}: {e.message}", hint=e.hint
                ) from None
            if not isinstance(e, UnreadableError):
                raise
            raise self._mixed(f"{path_text(path)!r:.200}: {e.reason}") from None
        return TensorRef(*whole[:2], ChunkedStorage(*whole[:2], inside))
