"""A checkpoint: the tree of what a file holds, and where it came from."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, wraps
from itertools import islice
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, TypeGuard, TypeVar

from ..errors import DamagedError, NoMatchError, UsageError
from .names import nearest
from .nodes import children, mapping
from .notes import Note
from .numbers import plain_number
from .sections import Sections, find_sections
from .sections.pairing import under
from .storages import Storage
from .tensors import TensorRef
from .text import some
from .tree import Path, find_path, get, path_text, walk

if TYPE_CHECKING:
    from .packed import PackedWeights

T = TypeVar("T")
_MOST_ROWS = 30  # in a notebook


class Finding(NamedTuple):
    """Something that unpickling the file would do; modelctl itself does not. ``offset`` is where
    it does it first, of so many ``times``."""

    level: Literal["dangerous", "suspicious"]
    id: str
    what: str
    name: str
    opcode: str
    offset: int
    times: int = 1


class Origin(NamedTuple):
    """Where a checkpoint was read from: path, format (its name and label), bytes on disk."""

    path: str
    format: str
    label: str
    bytes_on_disk: int


class Folder(NamedTuple):
    """The folder that a checkpoint was read from.

    Attributes:
        files: the file of each part of the tree, by its key at the top; of shards their index;
            under ``""`` where one file holds all.
        beside: what else stands there and goes along into a new folder, as a part does that was
            not changed, where it is here, too; each is opened when it is asked for, and may turn
            out to be none that does: ModelctlError.
        left: what does not: the weights once more in another format.
        arranged: how the tree is laid out there, for the format that read it.
    """

    files: Mapping[str, str]
    beside: Mapping[str, Callable[[], Storage]]
    left: Sequence[str] = ()
    arranged: Any = None


class Recorded(NamedTuple):
    """What a program recorded of a module: its class, and the shape that it gave. A dimension
    that is not fixed has the name of its symbol."""

    module: str
    type: str
    out_shape: tuple[int | str, ...]


class Program(Protocol):
    """A program that is in the file beside its tensors.

    ``loader`` is the function of torch that makes it a module that can be called
    (``torch.jit.load``), None where there is none.
    """

    loader: str | None

    def recorded(self) -> list[Recorded]:
        """What its modules gave, read now. Raises UnreadableError."""
        ...


class Resource(Protocol):
    """What a checkpoint keeps open: its files."""

    @property
    def bytes_read(self) -> int: ...
    def close(self) -> None: ...


def named(nodes: Iterable[tuple[Path, T]]) -> Iterator[tuple[str, T]]:
    """Nodes under the text of their paths, made unique: keys 1 and "1" may stand side by side."""
    taken: dict[str, int] = {}
    for path, node in nodes:
        name = path_text(path)
        times = taken.get(name, 0)
        taken[name] = times + 1
        yield (f"{name}'{times}" if times else name), node


def _is_tensor(node: Any) -> TypeGuard[TensorRef]:
    return isinstance(node, TensorRef)


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """What a file holds: a tree of values with :class:`TensorRef` at its leaves.

    Immutable: an edit gives a new checkpoint whose tree shares what did not change. Use it as a
    context manager, or :meth:`close` it: its files stay open for the bytes that are read later.

    Attributes:
        root: the tree (see :mod:`modelctl.core.tree`).
        origin: where it was read from, or None.
        metadata: string metadata of the container (safetensors).
        warnings: what is odd about the file.
        findings: what unpickling the file would run or build.
        notes: what edits have to say about themselves, for the report.
        constants: tensors and values that a compiled model's code uses, beside its state_dict.
        outside: what else the file holds that is not in the tree (a program, other members), so
            that writing the tree would lose it; None where there is nothing.
        program: what the modules of an exported program gave; None where there is none.
        key: the path of the state_dict that was chosen, where the found one isn't meant.
        read: the tree as it was read, before any edit; None where it was made.
        folder: the folder around it, with what belongs to it; None where it is a file alone.
        device: what an output says that all storages were on; None: what each says itself.
    """

    root: Any
    origin: Origin | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)
    warnings: tuple[Note, ...] = ()
    findings: tuple[Finding, ...] = ()
    notes: tuple[Note, ...] = ()
    constants: Any = None
    outside: str | None = None
    program: Program | None = None
    key: Path | None = None
    read: Any = None
    folder: Folder | None = None
    device: str | None = None
    resources: tuple[Resource, ...] = ()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
        if isinstance(value, DamagedError) and value.tensor is None:
            for name, ref in self.tensors().items():
                if ref.storage is value.storage:
                    raise value.of(name) from None

    def close(self) -> None:
        """Close the files. What was not read by then can't be read any more."""
        for resource in self.resources:
            resource.close()

    @property
    def bytes_read(self) -> int:
        """Bytes read from the files so far."""
        return sum(resource.bytes_read for resource in self.resources)

    @cached_property
    def sections(self) -> Sections:
        """Where the model, its EMA copies, the optimizer … are in the tree."""
        return find_sections(self.root, self.key)

    @cached_property
    def shown(self) -> Mapping[str, Any]:
        """What reports show of the model: its entries; those of all models, under the path of each,
        where none is clearly the one that is meant."""
        sections = self.sections
        if sections.certain:
            return sections.models[0].entries if sections.models else {}
        return {
            under(model) + name: node
            for model in sections.models
            for name, node in model.entries.items()
        }

    @cached_property
    def packed(self) -> PackedWeights:
        """Which of the model's weights are quantized, and how, as far as names, shapes and the
        config beside the file tell."""
        from .packed import find_packed, read_config

        config = read_config(self.folder.beside) if self.folder is not None else None
        return find_packed(self.shown, config, self.metadata)

    def __getitem__(self, path: str) -> Any:
        """What stands at a dotted path (``ckpt["epoch"]``, ``ckpt["model.fc.weight"]``): a plain
        value, a :class:`TensorRef`, a list, a dict.

        Raises:
            NoMatchError: nothing does.
        """
        where = find_path(self.root, path)
        if where is None:
            near = nearest(path, [str(label) for label, _ in children(self.root)])
            hint = f"nearest: {', '.join(near)}" if near else None
            raise NoMatchError(f"there is nothing at '{path}'", hint=hint)
        node = plain_number(get(self.root, where))
        entries = mapping(node)
        return node if entries is None else dict(entries)

    def __contains__(self, path: object) -> bool:
        return isinstance(path, str) and find_path(self.root, path) is not None

    def __iter__(self) -> Iterator[Any]:
        """The keys at the top: of a training checkpoint its parts, of a state_dict its names."""
        return iter([label for label, _ in children(self.root)])

    def __repr__(self) -> str:
        where = self.origin.path if self.origin is not None else "in memory"
        keys = [str(key) for key in self]
        return f"<Checkpoint {where}: {self.sections.kind}, {some(keys, 6) or 'no keys'}>"

    def _repr_html_(self) -> str:
        """For a notebook: the line, and a row a tensor of the model."""
        from html import escape

        models = self.sections.models
        tensors = models[0].tensors() if models else self.tensors()
        rows = "".join(
            f"<tr><td>{escape(name)}</td><td>{ref.dtype.short}</td>"
            f"<td>{'x'.join(map(str, ref.shape)) or 'scalar'}</td></tr>"
            for name, ref in islice(tensors.items(), _MOST_ROWS)
        )
        more = f"<p>… of {len(tensors):,}</p>" if len(tensors) > _MOST_ROWS else ""
        head = "<tr><th>name</th><th>dtype</th><th>shape</th></tr>"
        return f"<p>{escape(repr(self))}</p><table>{head}{rows}</table>{more}"

    def tensors(self) -> dict[str, TensorRef]:
        """Every tensor in the file, by its full path.

        Labels are joined with dots; a bare tensor is ``<root>``; a tensor that is reached on
        several paths is listed under each.
        """
        return dict(named((path, node) for path, node in walk(self.root) if _is_tensor(node)))

    def state_dict(self) -> dict[str, TensorRef]:
        """The model's tensors, by the names that ``load_state_dict`` would see.

        Raises:
            NoMatchError: no state_dict is found.
            AmbiguousError: several, and none is clearly the model's.
        """
        return self.sections.model().tensors()

    def replace(self, **changes: Any) -> Checkpoint:
        """A copy with the given attributes changed."""
        return replace(self, **changes)

    def noting(self, *notes: Note) -> Checkpoint:
        """A copy with more to say in the report: see :mod:`modelctl.core.notes`."""
        return replace(self, notes=(*self.notes, *notes))


def of_checkpoint(function: Callable[..., T]) -> Callable[..., T]:
    """The same function, with an error that helps where something else is given than a
    checkpoint."""

    @wraps(function)
    def checked(*args: Any, **options: Any) -> T:
        if args and not isinstance(args[0], Checkpoint):
            raise UsageError(
                f"{function.__name__} takes an opened checkpoint, not a {type(args[0]).__name__}",
                hint=f"with mc.open(path) as ckpt: mc.{function.__name__}(ckpt, ...)",
            )
        return function(*args, **options)

    return checked
