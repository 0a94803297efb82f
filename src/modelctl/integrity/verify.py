"""Whether checkpoints are sound: everything in them is read once, nothing is run."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from shlex import quote
from threading import Lock
from typing import Any

from ..core.checkpoint import Checkpoint
from ..core.notes import Note, info
from ..core.pages import Progress, told
from ..core.storages import Storage
from ..core.tensors import TensorRef, announce_all
from ..core.text import some
from ..errors import DamagedError, ModelctlError, UnreadableError, UnsupportedError
from ..files import PathLike, place_of, read_place, read_torn
from ..inspection.dangers import would_run
from ..inspection.ls import section_of
from ..inspection.reading import is_far, pieces, spread
from ..storage.places import Place
from ..storage.streams import is_stream
from .hashing import head_of, named_tensors
from .manifest import compared, read_manifest
from .records import Record, others
from .report import Verified, Verify
from .sections import Fault, disagreements
from .values import Values, has_special, look

# The half of an adapter that is zero until it was trained (arXiv 2106.09685, 4.1).
_BEGINS_AT_ZERO = re.compile(r"\blora_(B|up|embedding_B)\b")


def verify(
    paths: PathLike | Sequence[PathLike],
    manifest: PathLike | None = None,
    *,
    key: str | None = None,
    follow_symlinks: bool = False,
    progress: Progress | None = None,
) -> Verify:
    """Whether checkpoints are sound, each by itself (docs/safety.md#verify).

    Structure, sizes, ranges and strides, shards against their index, the parts of distributed
    tensors: opening checks them. All bytes are read and compared with the checksums that the file
    records; values are looked through for NaN, Inf and weights that are all zero; optimizer, freeze
    record and sparse indices are compared with the model. With ``manifest``, the file that
    ``modelctl hash --tensors`` writes, every tensor's content is, too.

    Args:
        paths: files, folders or URLs, one or several; with ``manifest`` one.
        key: the dotted path of the state_dict that is meant, where the found one isn't.

    Raises:
        UnreadableError: ``manifest`` is none.
        ModelctlError: there is no such file.
    """
    known = None if manifest is None else read_manifest(manifest)
    found = Verify()
    for path in [paths] if isinstance(paths, str | os.PathLike) else paths:
        place = place_of(path, follow_links=follow_symlinks)
        try:
            with read_place(place, key) as ckpt:
                found.append(Look(place, ckpt, known, progress).result())
        except ModelctlError as e:
            if isinstance(e, UnreadableError) and _is_torn(path):
                e.hint = f"modelctl verify {quote(place.name)} --salvage -o NEW.pt keeps the rest"
            found.append(Verified(place.name, error=e))
    return found


def _is_torn(path: PathLike) -> bool:
    """Whether something of a file that can't be read could be salvaged."""
    if is_stream(path):
        return False
    with suppress(ModelctlError):
        torn = read_torn(place_of(path))
        if torn is not None:
            torn.close()
            return True
    return False


class Look:
    """One checkpoint, looked through."""

    def __init__(
        self,
        place: Place,
        ckpt: Checkpoint,
        manifest: Mapping[str, str] | None,
        progress: Progress | None,
    ) -> None:
        self.place, self.ckpt, self.manifest = place, ckpt, manifest
        self.names: dict[Any, list[str]] = {}
        self.refs: dict[Any, TensorRef] = {}
        for name, ref in _all_tensors(ckpt):
            self.names.setdefault(ref.identity, []).append(name)
            self.refs.setdefault(ref.identity, ref)
        self.storages = [*{id(ref.storage): ref.storage for ref in self.refs.values()}.values()]
        self.records = others(place.zips, self.storages)
        self.faults: list[Fault] = []
        self.notes: list[Note] = []
        self.values: dict[Any, Values] = {}
        self.hashes: dict[Any, str] = {}
        self.lost: set[Any] = set()  # identities of what can't be read, or is damaged
        self._damaged: dict[int, list[str]] = {}  # names of tensors, by their storage
        self._errors: dict[int, DamagedError] = {}
        self._lock = Lock()
        self._tell = told(progress, place.name)
        self._total = sum(ref.nbytes for ref in self.refs.values())

    def result(self) -> Verified:
        for note in self.ckpt.warnings:
            if note.level == "warning":
                self.faults.append(Fault("odd", "", note.text))
            else:
                self.notes.append(note)
        self._read()
        self.faults += self._of_values()
        try:
            self.faults += disagreements(self.ckpt)
        except UnreadableError as e:
            if not self._damaged:
                self.faults.append(_of_error(e))
        if self.manifest is not None:
            self._compare(self.manifest)
        order = {
            name: i for i, name in enumerate(name for of in self.names.values() for name in of)
        }
        self.faults.sort(key=lambda one: order.get(one.where, -1))
        checksums = sum(one.recorded_crc32() is not None for one in self.storages)
        checksums += sum(one.directory.has_checksums for one in self.records)
        if not checksums and self.manifest is None and self._total:
            self.notes.append(
                info(
                    f"{self._label} has no checksums: a value that was changed does not show",
                    "modelctl hash --tensors writes a manifest, --manifest compares with it",
                )
            )
        return Verified(
            self.place.name,
            self.faults,
            [*self.notes, *would_run(self.ckpt)],
            tensors=sum(map(len, self.names.values())),
            nbytes=self._total,
            checksums=checksums,
        )

    @property
    def _label(self) -> str:
        return self.ckpt.origin.label if self.ckpt.origin else "it"

    # ------------------------------------------------------------------ all bytes

    def _read(self) -> None:
        """Read everything: tensors, then what of storages no tensor shows, then other records."""
        jobs = list(self.refs.values())
        alone = is_far(jobs)
        if alone:
            announce_all(jobs)
        else:  # the largest first: none is left alone at the end
            jobs.sort(key=lambda ref: -ref.nbytes)
        spread(jobs, self._tensor, alone=alone)
        rest = [one for one in self.storages if not one.compared and id(one) not in self._damaged]
        spread(rest, self._storage, alone=alone)
        spread(self.records, self._record, alone=alone)
        names = {id(ref.storage): self.names[key] for key, ref in self.refs.items()}
        for where, known in self._damaged.items():
            every = known or names.get(where, [])
            beside = f"; so are {some(every[1:], 3)}, in the same storage" if every[1:] else ""
            error = self._errors[where]
            self.faults.append(
                Fault(
                    "damaged",
                    every[0] if every else "",
                    f"its bytes don't have the CRC-32 that the file records{beside}",
                    str(error.path) if error.path else None,
                    error.offset,
                )
            )

    def _tensor(self, ref: TensorRef) -> None:
        names = self.names[ref.identity]
        with self._lock:
            if id(ref.storage) in self._damaged:
                self._damaged[id(ref.storage)] += names
                self.lost.add(ref.identity)
                return
        try:
            self._through(ref)
        except DamagedError as e:
            self.lost.add(ref.identity)
            self._is_damaged(ref.storage, e, names)
        except UnreadableError as e:
            self.lost.add(ref.identity)
            self._add(_of_error(e, names[0]))
        except UnsupportedError as e:
            self.notes.append(info(f"{names[0]} was not looked at: {e.message}"))
        if self._tell is not None:
            with self._lock:
                self._tell(ref.nbytes, self._total)

    def _through(self, ref: TensorRef) -> None:
        """All bytes of a tensor, once: their hash and what is wrong with their values."""
        sha = hashlib.sha256(head_of(ref)) if self.manifest is not None else None

        def passing() -> Iterator[bytes | memoryview]:
            for piece in pieces(ref):
                if sha is not None:
                    sha.update(piece)
                yield piece

        if has_special(ref.dtype):
            self.values[ref.identity] = look(passing(), ref.dtype)
        else:
            for _ in passing():
                pass
        if sha is not None:
            self.hashes[ref.identity] = f"sha256:{sha.hexdigest()}"

    def _storage(self, storage: Storage) -> None:
        try:
            storage.check()
        except DamagedError as e:
            self._is_damaged(storage, e, [])
        except UnreadableError as e:
            self._add(_of_error(e))

    def _record(self, record: Record) -> None:
        try:
            record.check()
        except UnreadableError as e:
            self._add(Fault("damaged", record.member.name, e.reason, str(e.path), e.offset))

    def _is_damaged(self, storage: Storage, e: DamagedError, names: Sequence[str]) -> None:
        with self._lock:
            self._damaged.setdefault(id(storage), []).extend(names)
            self._errors.setdefault(id(storage), e)

    def _add(self, fault: Fault) -> None:
        with self._lock:
            self.faults.append(fault)

    # ------------------------------------------------------------------ what was read

    def _of_values(self) -> Iterator[Fault]:
        weights = {
            ref.identity
            for name, ref in self.ckpt.shown.items()
            if isinstance(ref, TensorRef)
            and len(ref.shape) > 1
            and ref.numel > 1
            and not _BEGINS_AT_ZERO.search(name)
            and self.ckpt.packed.role(name, ref)[0] == "parameter"
        }
        for key, names in self.names.items():
            found = self.values.get(key)
            if found is None:
                continue
            if found.nan:
                yield Fault("nan", names[0], f"{found.nan:,} of {self.refs[key].numel:,} are NaN")
            if found.inf:
                yield Fault("inf", names[0], f"{found.inf:,} of {self.refs[key].numel:,} are Inf")
            if found.zero and key in weights:
                yield Fault("zero", names[0], f"all {self.refs[key].numel:,} weights are 0")

    def _compare(self, manifest: Mapping[str, str]) -> None:
        found = {name: (path, ref) for name, (path, ref) in named_tensors(self.ckpt)}
        hashes = {
            name: self.hashes[ref.identity]
            for name, (_, ref) in found.items()
            if ref.identity in self.hashes
        }
        sections = {name: section_of(self.ckpt, path) for name, (path, _) in found.items()}
        for says in compared(manifest, hashes, sections):
            if isinstance(says, Fault):
                self.faults.append(says)
            else:
                self.notes.append(info(says))


def _all_tensors(ckpt: Checkpoint) -> Iterator[tuple[str, TensorRef]]:
    """Every tensor by its name, the constants of a compiled model, too."""
    for of_constants in (False, True):
        for name, (_, ref) in named_tensors(ckpt, of_constants=of_constants):
            yield f"constants.{name}" if of_constants else name, ref


def _of_error(e: UnreadableError, where: str = "") -> Fault:
    path = None if e.path is None else str(e.path)
    return Fault("unreadable", where or e.member or "", e.reason, path, e.offset)
