"""What the tree of a checkpoint is made of: plain values, tensors, and inert nodes for all else.

None, bool, int, float, str, bytes, tuple, list and dict stand for themselves and are treated as
immutable; :func:`modelctl.core.tree.rebuild` makes changed copies. What a pickle would import is a
:class:`Global`, what it would call or construct an :class:`Obj`: names and arguments, never the
thing itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from enum import Enum
from typing import Any, Final

from .dtypes import DType
from .tensors import StorageRef, TensorRef


class Absent(Enum):
    """The type of :data:`ABSENT`, which stands where a pickle says nothing (None is a value)."""

    ABSENT = "absent"


ABSENT: Final = Absent.ABSENT


class Global:
    """Something that a pickle names, by module and qualified name (Python 3's)."""

    __slots__ = ("_hash", "module", "name")

    def __init__(self, module: str, name: str) -> None:
        self.module, self.name = module, name
        self._hash = hash((module, name))

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, Global):
            return NotImplemented
        return self.module == other.module and self.name == other.name

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"

    def __repr__(self) -> str:
        return f"<{self}>"


class Obj:
    """What calling or constructing something would give, kept as its recipe.

    ``func`` (usually a :class:`Global`) and ``args`` say what would be called: as a function
    (``how`` is ``"reduce"``), or as ``func.__new__`` (``"newobj"``, ``"newobj_ex"`` with
    ``kwargs``). ``state`` is what BUILD would set, ``items`` and ``entries`` what APPEND and
    SETITEM would add.
    """

    __slots__ = ("args", "entries", "func", "how", "items", "kwargs", "state")

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...] = (),
        how: str = "reduce",
        *,
        kwargs: Any = ABSENT,
        state: Any = ABSENT,
        items: list[Any] | None = None,
        entries: dict[Any, Any] | None = None,
    ) -> None:
        self.func, self.args, self.how, self.kwargs = func, args, how, kwargs
        self.state = state
        self.items: list[Any] = [] if items is None else items
        self.entries: dict[Any, Any] = {} if entries is None else entries

    def replace(self, **changes: Any) -> Obj:
        """A copy with the given attributes changed."""
        fields = {name: getattr(self, name) for name in self.__slots__} | changes
        return Obj(fields.pop("func"), fields.pop("args"), fields.pop("how"), **fields)

    def __repr__(self) -> str:
        return f"<{self.func} object>"


class Composite(Obj):
    """A tensor that is no strided view of one storage: sparse, quantized, nested, wrapped, meta.

    It stays the recipe that it is, and is written back so; ``layout`` says what kind it is
    (``sparse_coo``, ``per_tensor_affine``, ``DTensor``), ``parts`` are the plain tensors in it.
    """

    __slots__ = ("dtype", "layout", "parts", "shape")

    def __init__(
        self,
        func: Any,
        args: tuple[Any, ...] = (),
        how: str = "reduce",
        *,
        dtype: DType,
        shape: tuple[int, ...],
        layout: str,
        parts: dict[str, TensorRef] | None = None,
        **fields: Any,
    ) -> None:
        super().__init__(func, args, how, **fields)
        self.dtype, self.shape, self.layout = dtype, shape, layout
        self.parts: dict[str, TensorRef] = parts or {}

    @property
    def nbytes(self) -> int:
        """Bytes of its parts, or of the storage that it views."""
        own = [part.storage.nbytes for part in self.args if isinstance(part, StorageRef)]
        return sum(own) + sum(part.nbytes for part in self.parts.values())

    def replace(self, **changes: Any) -> Composite:
        names = (*Obj.__slots__, *Composite.__slots__)
        fields = {name: getattr(self, name) for name in names} | changes
        return Composite(fields.pop("func"), fields.pop("args"), fields.pop("how"), **fields)

    def __repr__(self) -> str:
        return f"Composite({self.layout}, {self.dtype.short}, {list(self.shape)})"


ORDERED_DICT = Global("collections", "OrderedDict")
# Callables that give a dict to which SETITEM adds.
_MAPPINGS = {
    ORDERED_DICT,
    Global("collections", "defaultdict"),
    Global("collections", "Counter"),
}


def ordered_dict(entries: dict[Any, Any], state: Any = ABSENT) -> Obj:
    """An OrderedDict with these entries; ``state`` is its ``__dict__`` (``{"_metadata": …}``)."""
    return Obj(ORDERED_DICT, (), entries=entries, state=state)


def mapping(node: Any) -> dict[Any, Any] | None:
    """The entries of a dict or of a node that would be one (OrderedDict, …), else None."""
    if isinstance(node, dict):
        return node
    # what is called may be anything, and not hashable
    if isinstance(node, Obj) and (
        node.entries or (isinstance(node.func, Global) and node.func in _MAPPINGS)
    ):
        return node.entries
    return None


def with_entries(node: Any, entries: dict[Any, Any]) -> Any:
    """The same kind of mapping as ``node``, with other entries."""
    return node.replace(entries=entries) if isinstance(node, Obj) else entries


# torch.compile's module pickles as a call: OptimizedModule(the module, how to compile it).
_COMPILED = Global("torch._dynamo.eval_frame", "OptimizedModule")


def _is_compiled(node: Obj) -> bool:
    return node.how == "reduce" and node.func == _COMPILED and is_module((*node.args, None)[0])


# torch.fx's module pickles as a call, too: of its __dict__ and of the imports of its code.
_GRAPH = Global("torch.fx.graph_module", "reduce_graph_module")


def is_graph_module(node: Any) -> bool:
    """True for a ``torch.fx.GraphModule``: a whole module whose forward is code in the file."""
    if not isinstance(node, Obj) or node.how != "reduce" or node.func != _GRAPH:
        return False
    if len(node.args) != 2 or not isinstance(node.args[1], str) or node.state is not ABSENT:
        return False
    state = node.args[0]
    return isinstance(state, dict) and None not in (
        mapping(state.get("_parameters")),
        mapping(state.get("_modules")),
    )


def attributes(node: Obj) -> dict[Any, Any]:
    """What BUILD would set on an object: its ``__dict__``, and its slots where it has them."""
    state = node.state
    if _is_compiled(node):
        return {"_parameters": {}, "_buffers": {}, "_modules": {"_orig_mod": node.args[0]}}
    if is_graph_module(node):
        return node.args[0]  # type: ignore[no-any-return]
    if isinstance(state, dict):
        return state
    if isinstance(state, tuple) and len(state) == 2:
        parts = [{} if part is None else mapping(part) for part in state]
        if all(part is not None for part in parts):
            return {**(parts[0] or {}), **(parts[1] or {})}
    return {}


def with_attributes(node: Obj, changes: Mapping[str, Any]) -> Obj:
    """An object with these attributes set (None removes one)."""
    state = node.state
    if is_graph_module(node):
        return node.replace(args=(_set(node.args[0], changes), *node.args[1:]))
    if isinstance(state, tuple):  # (__dict__, slots)
        return node.replace(state=(_set(mapping(state[0]) or {}, changes), state[1]))
    return node.replace(state=_set(state if isinstance(state, dict) else {}, changes))


def _set(entries: dict[Any, Any], changes: Mapping[str, Any]) -> dict[Any, Any]:
    merged = {**entries, **changes}
    return {key: value for key, value in merged.items() if key not in changes or value is not None}


def is_module(node: Any) -> bool:
    """True for an object with the state of an ``nn.Module`` (docs/formats.md#whole-modules)."""
    if not isinstance(node, Obj) or not isinstance(node.func, Global):
        return False
    state = attributes(node)
    return (
        mapping(state.get("_parameters")) is not None and mapping(state.get("_modules")) is not None
    )


def _module_children(state: dict[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """A module's tensors and submodules by their state_dict names, then its other attributes:
    those that repeat tensors (an LSTM's ``_flat_weights``) are no children."""
    transient = state.get("_non_persistent_buffers_set")
    skipped = transient.args[0] if isinstance(transient, Obj) and transient.args else ()
    yield from (mapping(state["_parameters"]) or {}).items()
    for name, buffer in (mapping(state.get("_buffers")) or {}).items():
        if not (isinstance(skipped, list) and name in skipped):
            yield name, buffer
    yield from (mapping(state["_modules"]) or {}).items()
    for name, value in state.items():
        if name not in ("_parameters", "_buffers", "_modules") and not _repeats_tensors(value):
            yield name, value


def _repeats_tensors(value: Any, depth: int = 3) -> bool:
    """Whether an attribute is a tensor, or a list of them, however it is built."""
    if isinstance(value, TensorRef):
        return True
    if depth and isinstance(value, Obj) and not is_module(value):
        value = value.args
    return depth > 0 and (
        isinstance(value, list | tuple)
        and any(_repeats_tensors(part, depth - 1) for part in value[:64])
    )


def children(node: Any) -> Iterator[tuple[Any, Any]]:
    """(label, child) of a container: dict keys, list indices, attribute names; a whole module's
    tensors and submodules are labelled as in its state_dict."""
    if isinstance(node, dict):
        yield from node.items()
    elif isinstance(node, list | tuple) and not isinstance(node, StorageRef):
        yield from enumerate(node)
    elif isinstance(node, Composite):
        yield from node.parts.items()
    elif isinstance(node, Obj):
        if is_graph_module(node):
            yield "import_block", node.args[1]
        elif not _is_compiled(node):
            yield from enumerate(node.args)
        if isinstance(node.kwargs, dict):
            yield from node.kwargs.items()
        yield from enumerate(node.items)
        yield from node.entries.items()
        found = attributes(node)
        if is_module(node):
            yield from _module_children(found)
        elif found:
            yield from found.items()
        elif node.state is not ABSENT and node.state is not None:
            yield "state", node.state
