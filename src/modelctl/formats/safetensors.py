"""safetensors files (docs/formats.md#safetensors): a JSON header, then the tensors' bytes, no
pickle."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable
from typing import Any

from ..core import notes
from ..core.checkpoint import Checkpoint, Origin
from ..core.dtypes import BY_TAG, DType
from ..core.nodes import ABSENT, Composite, mapping, ordered_dict
from ..core.notes import Loss, Note
from ..core.records import METADATA, PREFIX, records
from ..core.sections import is_state_dict
from ..core.storages import RunStorage, Source
from ..core.tensors import TensorRef
from ..core.text import some
from ..core.tree import Path, is_deeper
from ..errors import UnreadableError, UnsupportedError
from ..storage.layout import FileLayout, LayoutBuilder
from ..storage.places import Place
from ..storage.values import ValuesStorage
from .base import WritableFormat, no_state_dict
from .overlaps import overlapping

MAX_HEADER = 100_000_000
# Ties whose names alone would not show that they are: our reader needs no guess.
_TIED = "modelctl.tied"
_MAX_DIMS, _MAX_DEPTH = 64, 200
_SPACE = b" \t\r\n"  # what JSON calls so: a writer may align the tensors with it
_TAG = re.compile(r"[A-Z][A-Z0-9_]{0,30}")


class Safetensors(WritableFormat):
    """One .safetensors file."""

    name = "safetensors"
    label = "safetensors"
    suffixes = (".safetensors",)
    shard_names = ("model", ".safetensors")
    string_metadata = True
    keeps_records = True

    def sniff(self, place: Place) -> bool:
        head = place.head
        # a header of up to 100 MB, so its length has zeros in the upper bytes
        begins = head[8:].lstrip(_SPACE)[:1]
        return len(head) > 8 and head[4:8] == bytes(4) and begins in (b"{", b"[", b"")

    # ------------------------------------------------------------------ reading

    def read(self, place: Place) -> Checkpoint:
        return self._read(place.source)

    def salvage(self, place: Place) -> Checkpoint | None:
        return self._read(place.source, torn=True) if self.sniff(place) else None

    def _read(self, source: Source, *, torn: bool = False) -> Checkpoint:
        """What is in a file; ``torn`` where it may end before its last tensor does."""
        header, start = _header(source)
        metadata = _metadata(header.pop("__metadata__", None), source)
        entries: dict[str, Any] = {}
        spans = []
        for name, info in header.items():
            ref, begin, end = _tensor(name, info, source, start, torn=torn)
            entries[name] = ref
            spans.append((begin, end, name))
        spans.sort()
        reached = 0
        for begin, end, name in spans:
            if begin != reached:
                what = "overlaps another" if begin < reached else "leaves a hole before it"
                raise UnreadableError(
                    f"the tensor {name!r:.200} {what}", path=source.name, offset=start + begin
                )
            reached = end
        if start + reached != source.size and not torn:
            raise UnreadableError(
                f"its tensors end at byte {start + reached:,}, the file at {source.size:,}",
                path=source.name,
                hint="download or save it again",
            )
        ours, unread = _records(metadata)
        sure = mapping(ours.pop(_TIED, None)) or {}
        ties = {
            name: kept
            for name, kept in sure.items()
            if isinstance(kept, str) and kept in header and name not in header
        }
        modules, unclear = _modules(header), []
        for name, kept in metadata.items():
            # safetensors' save_model drops all but one of tied tensors and records them here
            if kept in header and name not in header and name not in ties:
                if _tied_names(name, kept, modules):
                    ties[name] = kept
                else:
                    unclear.append(f"'{name}': '{kept}'")
        entries.update((name, entries[kept]) for name, kept in ties.items())
        plain = {
            name: text
            for name, text in metadata.items()
            if not name.startswith(PREFIX) and ties.get(name) != text
        }
        return Checkpoint(
            ordered_dict(entries, {"_metadata": ordered_dict({"": ours})} if ours else ABSENT),
            Origin(source.name, self.name, self.label, source.size),
            metadata=plain,
            warnings=(*unread, *_not_ties(unclear)),
        )

    # ------------------------------------------------------------------ writing

    def losses(self, ckpt: Checkpoint) -> list[Loss]:
        if not is_state_dict(ckpt.root):
            what = ckpt.sections.kind
            top = mapping(ckpt.root)
            named = f" ({', '.join(str(key) for key in list(top)[:8])})" if top else ""
            a = "an" if what[0] in "aeio" else "a"
            return [
                Loss(
                    f"safetensors holds one flat state_dict, this is {a} {what}{named}",
                    no_state_dict(ckpt),
                )
            ]
        lost = []
        for name, value in (mapping(ckpt.root) or {}).items():
            if name == "__metadata__" or not _is_utf8(name):
                lost.append(f"{name!r:.200} can't be the name of a tensor there")
            elif isinstance(value, Composite):
                lost.append(f"'{name}' is a {value.layout} tensor")
            elif not isinstance(value, TensorRef):
                lost.append(f"'{name}' is no tensor")
            elif value.dtype.tag is None:
                lost.append(f"'{name}' is {value.dtype.name}, which safetensors does not know")
        return [Loss(text) for text in (*lost, *_overlaps(ckpt))]

    def layout(self, ckpt: Checkpoint, name: str) -> FileLayout:
        entries: dict[str, TensorRef] = mapping(ckpt.root) or {}
        metadata = {"format": "pt", **ckpt.metadata}
        for key, record in records(ckpt.root).items():
            if key == METADATA:
                metadata.update(mapping(record) or {})
            else:
                metadata[key] = json.dumps(record, ensure_ascii=False)
        first: dict[Any, str] = {}
        for tensor, ref in entries.items():
            first.setdefault(ref.identity, tensor)
        unsure, modules = {}, _modules(first.values())
        for tensor, ref in entries.items():
            kept = first[ref.identity]
            if kept == tensor:
                continue
            # as safetensors' save_model does; what the user calls so is not written over
            if metadata.setdefault(tensor, kept) != kept or not _tied_names(tensor, kept, modules):
                unsure[tensor] = kept
        if unsure:
            metadata[_TIED] = json.dumps(unsure, ensure_ascii=False)
        written = {tensor: entries[tensor] for tensor in first.values()}
        order = sorted(written, key=lambda tensor: -_alignment(written[tensor].dtype))
        offsets, at = {}, 0
        for tensor in order:
            offsets[tensor] = [at, at + written[tensor].nbytes]
            at += written[tensor].nbytes
        header: dict[str, Any] = {"__metadata__": metadata}
        for tensor, ref in written.items():
            shape = list(ref.shape)
            if ref.dtype.name == "float4_e2m1fn_x2" and shape:
                shape[-1] *= 2
            header[tensor] = {
                "dtype": ref.dtype.tag,
                "shape": shape,
                "data_offsets": offsets[tensor],
            }
        raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode(
            "utf-8", "surrogatepass"
        )
        raw += b" " * (-len(raw) % 8)
        out = LayoutBuilder()
        out.add(len(raw).to_bytes(8, "little") + raw)
        for tensor in order:
            ref = written[tensor]
            if ref.is_contiguous and ref.rebuild is None:
                out.copy(ref.storage, ref.start, ref.start + ref.nbytes)
            else:
                out.copy(ValuesStorage(ref))
        return out.file(name)

    def remarks(self, ckpt: Checkpoint) -> list[Note]:
        refs = ckpt.sections.models[0].tensors() if ckpt.sections.models else {}
        tied = len(refs) - len({ref.identity for ref in refs.values()})
        kept = "kept as __metadata__ (safetensors' load_model and modelctl know them, load_file"
        about = [notes.info(f"tied names: {tied}, {kept} does not)")] if tied else []
        return [*super().remarks(ckpt), *about]

    def record_by_hand(self, ckpt: Checkpoint, path: str, section: Path, record: str) -> str | None:
        return f"json.loads(safe_open({path!r}, 'pt').metadata()[{record!r}])"


def _alignment(dtype: DType) -> int:
    """By this, the largest first, every tensor is aligned for its dtype."""
    return dtype.itemsize if dtype.per_item == 1 else 1


def _tied_names(name: str, kept: str, modules: Collection[str]) -> bool:
    """Whether metadata ``{name: kept}`` says that tensors are tied, or just happens to hold the
    name of one (``{"best.metric": "loss"}``): tied ones are called alike, or the module that the
    name is in has other tensors."""
    module, _, last = name.rpartition(".")
    return last == kept.rpartition(".")[2] or (bool(module) and module in modules)


def _not_ties(pairs: list[str]) -> tuple[Note, ...]:
    text = f"metadata with the name of a tensor, not taken for ties: {some(pairs, 3)}"
    return (notes.info(text),) if pairs else ()


def _modules(names: Iterable[str]) -> set[str]:
    return {name.rpartition(".")[0] for name in names}


def _is_utf8(name: str) -> bool:
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _overlaps(ckpt: Checkpoint) -> list[str]:
    """Tensors that share memory without being the same: copies of them would drift apart."""
    entries = (mapping(ckpt.root) or {}).items()
    tensors = ((str(name), ref) for name, ref in entries if isinstance(ref, TensorRef))
    return [
        f"'{before}' and '{name}' share memory, in safetensors they would not"
        for before, name in overlapping(tensors)
    ]


# ---------------------------------------------------------------------- the header


def _header(source: Source) -> tuple[dict[str, Any], int]:
    def broken(message: str, offset: int = 8) -> UnreadableError:
        return UnreadableError(
            message, path=source.name, member="header", offset=offset, hint="get the file again"
        )

    length = int.from_bytes(source.read(0, 8), "little")
    if length > min(MAX_HEADER, source.size - 8):
        raise broken(f"a header of {length:,} bytes in a file of {source.size:,}", 0)
    raw = source.read(8, length)
    if raw.lstrip(_SPACE)[:1] != b"{":
        raise broken("the header does not begin with '{'")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as e:
        raise broken("the header is not UTF-8", 8 + e.start) from None

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise broken(f"the key {twice!r:.200} twice")
        return found

    def constant(name: str) -> None:
        raise broken(f"{name} is no JSON")

    try:
        header = json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as e:  # also an integer of thousands of digits
        raise broken(f"the header is no JSON: {e}"[:200]) from None
    return header, 8 + length


def _metadata(found: Any, source: Source) -> dict[str, str]:
    if found is None:
        return {}
    if not isinstance(found, dict) or not all(isinstance(text, str) for text in found.values()):
        raise UnreadableError(
            "__metadata__ holds something other than strings", path=source.name, member="header"
        )
    return found


def _records(metadata: dict[str, str]) -> tuple[dict[str, Any], list[Note]]:
    """Our records, and a warning of each that can't be read: it is left out."""
    ours, unread = {}, []
    for name, text in metadata.items():
        if name.startswith(PREFIX):
            try:
                ours[name] = _bounded(json.loads(text))
            except (ValueError, RecursionError):  # also digits that Python does not take
                unread.append(notes.warning(f"the record {name:.100} is no JSON, and left out"))
    return ours, unread


def _bounded(record: Any) -> Any:
    """A record that can be written again. Raises ValueError where it is nested too deep."""
    if is_deeper(record, _MAX_DEPTH):
        raise ValueError
    return record


def _tensor(
    name: str, info: Any, source: Source, start: int, *, torn: bool = False
) -> tuple[TensorRef, int, int]:
    try:
        tag = info["dtype"]
        if type(tag) is str and tag not in BY_TAG and _TAG.fullmatch(tag):
            raise UnsupportedError(
                f"{source.name}: the tensor {name!r:.200} has the dtype {tag}, "
                "which modelctl does not know",
                hint="a newer modelctl may",
            )
        dtype = BY_TAG[tag]
        shape, (begin, end) = info["shape"], info["data_offsets"]
        if type(shape) is not list or len(shape) > _MAX_DIMS or type(info) is not dict:
            raise TypeError
        numel = 1
        for n in shape:
            if type(n) is not int or n < 0:
                raise TypeError
            numel *= n
        if numel >> 60:
            raise TypeError
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise TypeError
    except (KeyError, TypeError, ValueError):
        raise _broken(name, f"described by {info!r:.200}", source) from None
    if start + end > source.size and not torn:
        raise _broken(name, f"ends at byte {start + end:,}, the file at {source.size:,}", source)
    if dtype.tag == "F4" and shape:
        if shape[-1] % 2 and numel == 2 * (end - begin):
            raise UnsupportedError(
                f"{source.name}: the tensor {name!r:.200} is F4 of the shape {shape}, "
                "for whose rows torch, which counts pairs, has no shape"
            )
        shape = [*shape[:-1], shape[-1] // 2]
        numel //= 2
    if dtype.nbytes(numel) != end - begin or numel % dtype.per_item:
        sizes = f"{dtype.nbytes(numel):,} bytes by its shape, {end - begin:,} by its offsets"
        raise _broken(name, sizes, source)
    return (
        TensorRef(dtype, tuple(shape), RunStorage(source, start + begin, end - begin)),
        begin,
        end,
    )


def _broken(name: str, what: str, source: Source) -> UnreadableError:
    return UnreadableError(f"the tensor {name!r:.200}: {what}", path=source.name, member="header")
