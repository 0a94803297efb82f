"""Content hashes: equal for equal tensors under equal names, whatever they are saved in."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint, named
from ..core.pages import Column, Line, Page, Progress, Table, told
from ..core.tensors import StorageRef, TensorRef, announce_all
from ..core.tree import Path, walk
from ..errors import DamagedError, ModelctlError, NoMatchError, UsageError
from ..inspection.ls import SECTIONS, section_of
from ..inspection.printed import Printed
from ..inspection.reading import as_tensor, is_far, pieces, spread

_KIND = "sha256:"
# What would end a line, or can't be encoded; and the sign of an escape itself.
_AWKWARD = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\\]")


class TensorHash(NamedTuple):
    """A tensor and the hash of its content."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    hash: str

    @property
    def line(self) -> str:
        """As a manifest has it. A name with a control character, a backslash or half of a
        surrogate pair in it is escaped, as in Python's texts."""
        return f"{self.hash}  {written(self.name)}"


@dataclass(frozen=True)
class Hashed(Printed):
    """What a checkpoint hashes to.

    Attributes:
        path: where it was read from; None of one in memory.
        section: whose tensors were hashed.
        tensors: each with its own hash, in the order of a manifest.
    """

    path: str | None
    section: str
    tensors: Sequence[TensorHash] = field(repr=False)

    @property
    def manifest(self) -> str:
        """A line a tensor, sorted: what ``verify --manifest`` takes."""
        return "".join(f"{one.line}\n" for one in self.tensors)

    @property
    def hash(self) -> str:
        """``sha256:`` and the SHA-256 of the manifest."""
        return _KIND + hashlib.sha256(self.manifest.encode()).hexdigest()

    @property
    def line(self) -> str:
        return f"{self.hash}  {self.path or '-'}"

    def as_dict(self) -> dict[str, Any]:
        return {
            "path": self.path,
            "hash": self.hash,
            "section": self.section,
            "tensors": [
                {"name": one.name, "dtype": one.dtype, "shape": list(one.shape), "hash": one.hash}
                for one in self.tensors
            ],
        }

    def page(self) -> Page:
        rows = [(one.hash, one.name, one.dtype, one.shape) for one in self.tensors]
        columns = [Column("hash"), Column("name", "name"), Column("dtype"), Column("shape")]
        return Page([Line(self.line)], Table(columns, rows))


class Hashes(list[Hashed], Printed):
    """Those of several files; ``failed`` are those that have none, and why."""

    def __init__(self) -> None:
        super().__init__()
        self.failed: dict[str, ModelctlError] = {}

    def as_dict(self) -> dict[str, Any]:
        failed = [{"path": path, "error": e.as_dict()} for path, e in self.failed.items()]
        return {"files": [*({**one.as_dict(), "error": None} for one in self), *failed]}

    def page(self) -> Page:
        rows = [(one.hash, one.path, len(one.tensors)) for one in self]
        columns = [Column("hash"), Column("path", "name"), Column("tensors", "count")]
        return Page([Line(one.line) for one in self], Table(columns, rows))


def hash_tensors(
    ckpt: Checkpoint, section: str = "all", progress: Progress | None = None
) -> Hashed:
    """The content hash of a checkpoint, and of each of its tensors.

    A tensor's is the SHA-256 of its dtype and shape, in a line (``float32 64,3,7,7``), and of its
    values, row-major and little-endian; the checkpoint's is that of the lines of its manifest, a
    line a tensor, sorted by its bytes. So both are the same in every format, under every sharding
    and in every order, and change with any name, dtype, shape or value. What is no tensor is not
    in it.

    The model's tensors are named as ``load_state_dict`` would see them, others by their full path.
    All bytes are read, and compared with the checksums that the file has.

    Args:
        section: whose tensors: of the ``model``, the ``optimizer``, ``ema``, or ``all``.

    Raises:
        NoMatchError: there is no such section.
        DamagedError: the bytes are not what was saved; names the tensor.
        UnreadableError, UnsupportedError: they can't be read.
    """
    found = tensors_of(ckpt, section)
    digests = _digests(ckpt, found, progress)
    tensors = [
        TensorHash(name, ref.dtype.name, ref.shape, _KIND + digests[ref.identity])
        for name, ref in found.items()
    ]
    tensors.sort(key=lambda one: one.line.encode())
    return Hashed(ckpt.origin.path if ckpt.origin else None, section, tensors)


def tensors_of(ckpt: Checkpoint, section: str = "all") -> dict[str, TensorRef]:
    """The tensors of a section by the names that a manifest has.

    Raises:
        NoMatchError: there is no such section.
    """
    if section not in SECTIONS:
        raise UsageError(f"there is no section '{section}'", hint=f"one of {', '.join(SECTIONS)}")
    found = {
        name: ref
        for name, (path, ref) in named_tensors(ckpt, of_constants=section == "constants")
        if section in ("all", "constants") or section_of(ckpt, path) == section
    }
    if not found and section != "all":
        raise NoMatchError(
            f"this file has no tensors in the section '{section}'", hint="--section all"
        )
    return found


def named_tensors(
    ckpt: Checkpoint, *, of_constants: bool = False
) -> Iterator[tuple[str, tuple[Path, TensorRef]]]:
    """Each tensor, with its path, by the name that a manifest has: of the model that is meant the
    path in that."""
    models = ckpt.sections.models
    prefix = models[0].path if models and ckpt.sections.certain else ()
    yield from named(
        (path[len(prefix) :] if _is_in(prefix, path) else path, (path, ref))
        for path, ref in _all(ckpt.constants if of_constants else ckpt.root)
    )


def _is_in(place: Path, path: Path) -> bool:
    return len(path) > len(place) and path[: len(place)] == place


def _all(root: Any) -> Iterator[tuple[Path, TensorRef]]:
    """Each tensor; storages by themselves, and those of quantized ones, as tensors in a row."""
    for path, node in walk(root):
        ref = as_tensor(node)
        if ref is not None:
            yield (path if ref is node or isinstance(node, StorageRef) else (*path, "storage")), ref


def _digests(
    ckpt: Checkpoint, found: dict[str, TensorRef], progress: Progress | None
) -> dict[Any, str]:
    """The SHA-256 of each, by its identity: tied ones are read once."""
    once = {ref.identity: (name, ref) for name, ref in found.items()}
    total = sum(ref.nbytes for _, ref in once.values())
    tell, lock = told(progress, ckpt.origin.path if ckpt.origin else ""), Lock()
    digests: dict[Any, str] = {}

    def digest(job: tuple[str, TensorRef]) -> None:
        name, ref = job
        sha = hashlib.sha256(head_of(ref))
        try:
            for piece in pieces(ref):
                sha.update(piece)
        except DamagedError as e:
            raise e.of(name) from None
        digests[ref.identity] = sha.hexdigest()
        if tell is not None:
            with lock:
                tell(ref.nbytes, total)

    jobs = list(once.values())
    alone = is_far(ref for _, ref in jobs)
    if alone:
        announce_all(ref for _, ref in jobs)
    else:  # the largest first: none is left alone at the end
        jobs.sort(key=lambda job: -job[1].nbytes)
    spread(jobs, digest, alone=alone)
    return digests


def head_of(ref: TensorRef) -> bytes:
    """What is hashed before a tensor's bytes: its dtype and shape."""
    return f"{ref.dtype.name} {','.join(map(str, ref.shape))}\n".encode()


def written(name: str) -> str:
    """A name as one line of text."""
    if _AWKWARD.search(name):
        return name.encode("unicode_escape", "surrogatepass").decode("ascii")
    return name


def unwritten(text: str) -> str | None:
    """The name that :func:`written` writes so; None where it writes none so."""
    try:
        name = text.encode("ascii").decode("unicode_escape") if "\\" in text else text
    except UnicodeError:
        return None
    return name if written(name) == text else None
