"""A line a tensor: the data behind ``modelctl ls``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from ..core.checkpoint import Checkpoint, named
from ..core.names import Patterns, as_list, select
from ..core.nodes import Composite
from ..core.notes import Note, info
from ..core.pages import Column, Page, Table
from ..core.records import read_freeze
from ..core.sections.devices import device_of
from ..core.tensors import TensorRef
from ..core.text import count, some
from ..core.tree import Path, path_text, walk
from ..errors import NoMatchError, UsageError
from .printed import Printed

SECTIONS = ("model", "optimizer", "ema", "constants", "all")


class TensorRow(NamedTuple):
    """One tensor. ``inferred``: its role is a guess from name and dtype; ``requires_grad`` is
    None where the file doesn't say; ``layout`` is what a tensor is that is no plain one
    (sparse_coo, per_tensor_affine, DTensor); ``device`` what it was saved on, None where the file
    doesn't say."""

    name: str
    dtype: str
    short_dtype: str
    shape: tuple[int, ...]
    nbytes: int
    section: str | None
    role: str | None
    inferred: bool
    requires_grad: bool | None
    layout: str | None = None
    device: str | None = None

    def as_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "dtype": self.dtype,
            "shape": list(self.shape),
            "bytes": self.nbytes,
            "section": self.section,
            "role": self.role,
            "requires_grad": self.requires_grad,
            "layout": self.layout,
            "device": self.device,
        }


class TensorList(Printed, list[TensorRow]):
    """The report of ``ls``: a row a tensor."""

    def as_dict(self) -> dict[str, Any]:
        return {"tensors": [row.as_dict() for row in self]}

    def page(self, long: bool = False) -> Page:
        """A table of names, dtypes and shapes; with ``long`` bytes, roles and what trains, too, and
        devices where one is not the cpu."""
        columns = [Column("name", "name"), Column("dtype"), Column("shape", "shape")]
        if long:
            columns += [Column("bytes", "count"), Column("role"), Column("grad", "answer")]
        rows = [_cells(row, long) for row in self]
        if long and any(row.device not in (None, "cpu") for row in self):
            columns.append(Column("device", none="?"))
            rows = [[*cells, row.device] for cells, row in zip(rows, self, strict=True)]
        table = Table(columns, rows)
        notes = []
        if long and any(row.inferred for row in self):
            notes = [info("~ inferred from name and dtype; ? the file does not say")]
        return Page([table], table, notes=notes)


def _cells(row: TensorRow, long: bool) -> list[Any]:
    dtype = f"{row.short_dtype} {row.layout}" if row.layout else row.short_dtype
    cells: list[Any] = [row.name, dtype, row.shape]
    if long:
        role = {"parameter": "param", None: ""}.get(row.role, row.role)
        can_train = row.role == "parameter" or row.requires_grad is not None
        grad = row.requires_grad if can_train else "-"
        cells += [row.nbytes, f"{role}{'~' * row.inferred}", grad]
    return cells


def list_tensors(
    ckpt: Checkpoint,
    pattern: Patterns = (),
    *,
    regex: bool = False,
    section: str = "model",
    role: str | None = None,
) -> TensorList:
    """The tensors of a section that ``pattern`` matches (all without one), in the file's order.

    A file without a model (an optimizer by itself, a bare tensor) lists all of them.

    The model's are named as ``load_state_dict`` would see them, all others by their full path.
    ``role`` keeps parameters or buffers only.

    Raises:
        NoMatchError: a pattern, or the section, is nowhere; what the pattern matches has another
            ``role``.
        UsageError: no such section.
    """
    found = _found(ckpt, section)
    names = select(list(found), pattern, regex=regex) if pattern else list(found)
    grads = trainability(ckpt)
    prefix = _model_prefix(ckpt) if section == "all" else ""
    rows = TensorList()
    for name in names:
        ref, of = found[name]
        if isinstance(ref, Composite):
            row = _composite(name, ref, of, ckpt)
            if role is None or (role == "parameter" and row.role == "packed"):
                rows.append(row)
            continue
        kind: str | None = None
        inferred = False
        grad = ref.requires_grad
        if of == "model":
            bare = name[len(prefix) :]
            kind, inferred = ckpt.packed.role(bare, ref)
            grad = grads.get(bare)
        if role is not None and ("parameter" if kind == "packed" else kind) != role:
            continue
        rows.append(
            TensorRow(
                *(name, ref.dtype.name, ref.dtype.short, ref.shape, ref.nbytes, of),
                *(kind, inferred, grad, None, device_of(ref, ckpt)),
            )
        )
    if pattern and role is not None and not rows:
        raise NoMatchError(
            f"no {role} matches '{some(as_list(pattern), 3)}': it matches "
            f"{count(len(names), 'tensor')}, none of them a {role}",
            hint="without " + ("--params" if role == "parameter" else "--buffers"),
        )
    return rows


def list_names(
    ckpt: Checkpoint, pattern: Patterns = (), *, regex: bool = False, section: str = "model"
) -> list[str]:
    """The names alone of what :func:`list_tensors` lists, faster. Raises as that does."""
    names = list(_found(ckpt, section))
    return select(names, pattern, regex=regex) if pattern else names


def _found(ckpt: Checkpoint, section: str) -> dict[str, tuple[TensorRef | Composite, str | None]]:
    """The tensors of a section by name, each with the section that it is in."""
    if section not in SECTIONS:
        raise UsageError(f"there is no section '{section}'", hint=f"one of {', '.join(SECTIONS)}")
    if section == "model" and not ckpt.sections.models:
        section = "all"  # a bare tensor, an optimizer by itself: all that there is
    if section == "model":
        found: dict[str, tuple[TensorRef | Composite, str | None]] = {
            name: (node, "model")
            for name, node in ckpt.shown.items()
            if isinstance(node, TensorRef | Composite)
        }
    else:
        if section == "constants":
            found = {name: (node, "constants") for name, node in _constants(ckpt)}
        else:
            found = {
                name: (ref, of)
                for name, ref, of in _with_sections(ckpt)
                if section == "all" or of == section
            }
        if not found and section != "all":
            raise NoMatchError(
                f"this file has no tensors in the section '{section}'", hint="--section all"
            )
    return found


def other_models(ckpt: Checkpoint) -> list[Note]:
    """A note where the file has more models than the one that a report shows."""
    sections = ckpt.sections
    if not sections.certain or len(sections.models) < 2:
        return []
    others = [
        f"{path_text(model.path)} ({count(len(model.tensors()), 'tensor')})"
        for model in sections.models[1:]
    ]
    return [info(f"other models in the file: {some(others, 4)}; --key shows one")]


def _composite(name: str, node: Composite, section: str | None, ckpt: Checkpoint) -> TensorRow:
    dtype = node.dtype
    on = {device_of(part, ckpt) for part in node.parts.values()}
    weight = ckpt.packed.of.get(name) if section == "model" else None
    nbytes = weight.nbytes if weight else node.nbytes
    role = "packed" if weight else None
    return TensorRow(
        *(name, dtype.name, dtype.short, node.shape, nbytes, section, role, False, None),
        layout=node.layout,
        device=on.pop() if len(on) == 1 else None,
    )


def trainability(ckpt: Checkpoint) -> Mapping[str, bool | None]:
    """Whether each of the model's tensors trains, as far as the file says.

    A freeze record settles it for every parameter; else a parameter that was saved as such
    knows; a plain state_dict doesn't record it: None. Buffers never train.
    """
    if not ckpt.sections.models:
        return {}
    record = read_freeze(ckpt) if ckpt.sections.certain else None
    frozen = set() if record is None else {*record.frozen}
    out: dict[str, bool | None] = {}
    for name, ref in ckpt.shown.items():
        if not isinstance(ref, TensorRef):
            continue
        role, inferred = ckpt.packed.role(name, ref)
        if role == "buffer":
            out[name] = None if inferred else False
        elif role != "parameter":  # frozen with the weight that it is a piece of; it never trains
            out[name] = False if name in frozen else None
        else:
            out[name] = ref.requires_grad if record is None else name not in frozen
    return out


def _model_prefix(ckpt: Checkpoint) -> str:
    models = ckpt.sections.models
    clear = bool(models) and ckpt.sections.certain
    return path_text(models[0].path) + "." if clear and models[0].path else ""


def section_of(ckpt: Checkpoint, path: Path) -> str | None:
    """The section that a path lies in."""
    sections = ckpt.sections
    places: list[tuple[Path, str]] = [
        *((model.path, "model") for model in sections.models),
        *((copy.path, "ema") for copy in sections.ema),
        *((at, "ema") for at in sections.nameless_ema),
        *((at, "optimizer") for at, _ in (*sections.optimizers, *sections.optimizer_objects)),
        *((at, "scheduler") for at, _ in sections.schedulers),
    ]
    if sections.rng is not None:
        places.append((sections.rng[0], "rng"))
    if sections.loader is not None:
        places.append((sections.loader[0], "loader"))
    return next((name for where, name in places if path[: len(where)] == where), None)


def _constants(ckpt: Checkpoint) -> Iterator[tuple[str, TensorRef | Composite]]:
    return named(
        (path, node)
        for path, node in walk(ckpt.constants)
        if isinstance(node, TensorRef | Composite)
    )


def _with_sections(ckpt: Checkpoint) -> list[tuple[str, TensorRef | Composite, str | None]]:
    found = (
        (path, (node, section_of(ckpt, path)))
        for path, node in walk(ckpt.root)
        if isinstance(node, TensorRef | Composite)
    )
    return [(name, node, of) for name, (node, of) in named(found)]
