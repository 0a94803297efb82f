"""torch's tensor rebuild functions, as references instead of tensors
(docs/formats.md#tensors-in-a-pickle).

Each takes the arguments that the pickle would call the function with and gives a
:class:`~modelctl.core.tensors.TensorRef`, or None where the tensor has no plain strided storage
(sparse, quantized, nested, wrapped): that one stays the inert recipe that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from ..core.dtypes import BY_NAME, DType
from ..core.nodes import Global, Obj
from ..core.tensors import Rebuild, StorageRef, TensorRef
from ..core.tree import brief
from ..errors import UnreadableError

_MAX_DIMS = 64
_MOST = (1 << 63) - 1  # torch counts in int64


def _plain(node: Any) -> Any:
    """An int, or the ints of a tuple (torch.Size too)."""
    if isinstance(node, Obj) and node.func == Global("torch", "Size") and len(node.args) == 1:
        node = node.args[0]
    return node


class Reach(NamedTuple):
    """A size and a stride that go together: how many elements, and how far off the last one is."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    numel: int
    last: int


def reach(size: tuple[Any, ...], stride: tuple[Any, ...]) -> Reach:
    """What a view of this size and stride reaches. Both have as many dimensions.

    Raises:
        UnreadableError: negative ones, or what are no integers.
    """
    last = 0
    numel = 1
    for n, step in zip(size, stride, strict=True):
        if type(n) is not int or type(step) is not int or n < 0 or step < 0:
            sizes = ", ".join(brief(n) for n in size)
            raise UnreadableError(f"a tensor of size [{sizes:.200}] or of such strides")
        numel *= n
        last += (n - 1) * step
    if max(numel, last, *size, 0) > _MOST:
        raise UnreadableError("a tensor of more elements than there can be")
    return Reach(size, stride, numel, last)


def view(
    ref: StorageRef,
    dtype: DType,
    offset: Any,
    size: Any,
    stride: Any,
    requires_grad: Any,
    rebuild: Rebuild | None = None,
) -> TensorRef:
    """A checked view of a storage (docs/safety.md#tensors).

    Raises:
        UnreadableError: negative, or outside the storage.
    """
    size, stride = _plain(size), _plain(stride)
    if type(size) is not tuple or type(stride) is not tuple or len(size) != len(stride):
        raise UnreadableError("a tensor whose size and stride don't go together")
    if len(size) > _MAX_DIMS:
        raise UnreadableError(f"a tensor of {len(size)} dimensions")
    if type(offset) is not int or offset < 0:
        raise UnreadableError(f"a tensor at the offset {brief(offset)}")
    return place(ref, dtype, offset, reach(size, stride), requires_grad, rebuild)


def place(
    ref: StorageRef,
    dtype: DType,
    offset: int,
    reach: Reach,
    requires_grad: Any,
    rebuild: Rebuild | None = None,
) -> TensorRef:
    """A view of what was checked by itself: whether it lies in its storage is checked here.

    Raises:
        UnreadableError: it reaches outside.
    """
    size, stride, numel, last = reach
    storage, _, base = ref
    if numel and base + (offset + last + 1) * dtype.itemsize > storage.nbytes:
        raise UnreadableError(
            f"a tensor of size {list(size)!r:.200} that reaches outside its storage of "
            f"{storage.nbytes:,} bytes"
        )
    # None is "the file doesn't say": a state_dict stores False for every tensor
    if requires_grad is not True:
        requires_grad = None
    return TensorRef(
        dtype,
        size,
        storage,
        offset,
        stride,
        base=base,
        requires_grad=requires_grad,
        rebuild=rebuild,
    )


def _typed(storage: Any) -> tuple[StorageRef, DType]:
    if not isinstance(storage, StorageRef):
        raise TypeError
    return storage, storage.dtype or BY_NAME["uint8"]  # torch.load's dtype of an untyped one


def _tensor(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, size, stride = args
    return view(*_typed(storage), offset, size, stride, False)


def _extras(hooks: Any, bits: Any) -> Rebuild | None:
    found = {}
    if isinstance(bits, dict):
        if not all(name in ("conj", "neg") and type(on) is bool for name, on in bits.items()):
            raise UnreadableError("a tensor with bits other than conj and neg")
        found = {name: True for name, on in bits.items() if on}
    kept = hooks if isinstance(hooks, Obj) and hooks.entries else None
    return Rebuild(found or None, kept) if found or kept is not None else None


def _tensor_v2(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, size, stride, requires_grad, hooks, *rest = args
    extras = None
    if rest or (isinstance(hooks, Obj) and hooks.entries):
        extras = _extras(hooks, rest[0] if rest else None)
    return view(*_typed(storage), offset, size, stride, requires_grad, extras)


def _tensor_v3(args: tuple[Any, ...]) -> TensorRef:
    storage, offset, size, stride, requires_grad, hooks, dtype, *rest = args
    if not isinstance(storage, StorageRef):
        raise TypeError
    extras = _extras(hooks, rest[0] if rest else None)
    return view(storage, _dtype(dtype), offset, size, stride, requires_grad, extras)


def _dtype(node: Any) -> DType:
    if isinstance(node, Global) and node.module == "torch" and node.name in BY_NAME:
        return BY_NAME[node.name]
    raise TypeError


def _parameter(args: tuple[Any, ...]) -> TensorRef | None:
    data, requires_grad, hooks, *rest = args
    if not isinstance(data, TensorRef) or type(requires_grad) is not bool:
        return None
    extras = data.rebuild
    if rest or (isinstance(hooks, Obj) and hooks.entries):
        bits = extras.bits if extras else None
        kept = hooks if isinstance(hooks, Obj) and hooks.entries else None
        extras = Rebuild(bits, kept, rest[0] if rest else None)
    return data.replace(requires_grad=requires_grad, role="parameter", rebuild=extras)


def _old_parameter(args: tuple[Any, ...]) -> TensorRef | None:
    """``Parameter(data)``, as torch up to 0.4 spelled it; a state may follow that says the rest."""
    data, *rest = args or (None,)
    if not isinstance(data, TensorRef) or len(rest) > 1 or any(type(x) is not bool for x in rest):
        return None
    return data.replace(requires_grad=rest[0] if rest else True, role="parameter")


def _old_variable(args: tuple[Any, ...]) -> TensorRef | None:
    """``Variable(data)``: a tensor, before 0.4 made them one."""
    made = _old_parameter(args)
    return made and made.replace(role=None, requires_grad=made.requires_grad if args[1:] else None)


def set_old_state(made: TensorRef, state: Any) -> bool:
    """The state of a parameter or variable of torch up to 0.3, (requires_grad, volatile, hooks);
    False where it is none."""
    if type(state) is not tuple or len(state) != 3 or type(state[0]) is not bool:
        return False
    hooks = state[2]
    kept = Rebuild(made.rebuild.bits if made.rebuild else None, hooks)
    made.settle(state[0], kept if isinstance(hooks, Obj) and hooks.entries else made.rebuild)
    return True


def _from_type(args: tuple[Any, ...]) -> TensorRef | None:
    func, cls, inner, state = args
    make = REBUILDS.get(func) if isinstance(func, Global) else None
    if make in (None, _from_type, _encode) or type(inner) is not tuple:
        return None
    made = make(inner)
    if not isinstance(made, TensorRef) or not isinstance(cls, Global):
        return None
    bits = made.rebuild.bits if made.rebuild else None
    hooks = made.rebuild.hooks if made.rebuild else None
    marked = isinstance(state, dict) and state.get("_is_buffer") is True
    is_buffer = marked or cls == Global("torch.nn.parameter", "Buffer")
    role = "buffer" if is_buffer else made.role
    return made.replace(role=role, rebuild=Rebuild(bits, hooks, state, cls))


def _encode(args: tuple[Any, ...]) -> bytes | None:
    """How protocol 2 spells bytes."""
    text, codec = args
    return text.encode("latin-1") if codec in ("latin1", "latin-1") else None


TENSOR_V2 = Global("torch._utils", "_rebuild_tensor_v2")
TENSOR_V3 = Global("torch._utils", "_rebuild_tensor_v3")
REBUILDS: dict[Global, Callable[[tuple[Any, ...]], Any]] = {
    Global("_codecs", "encode"): _encode,
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    TENSOR_V2: _tensor_v2,
    TENSOR_V3: _tensor_v3,
    Global("torch._utils", "_rebuild_parameter"): _parameter,
    Global("torch._utils", "_rebuild_parameter_with_state"): _parameter,
    Global("torch._tensor", "_rebuild_from_type_v2"): _from_type,
    Global("torch.tensor", "_rebuild_from_type_v2"): _from_type,
    Global("torch.nn.parameter", "Parameter"): _old_parameter,
    Global("torch.autograd.variable", "Variable"): _old_variable,
}
