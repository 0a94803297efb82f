"""One forward of a copied model, watched: who was called, what came out, what it cost."""

from __future__ import annotations

import traceback
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import HigherOrderOperator
from torch.utils._python_dispatch import TorchDispatchMode

from ...errors import ModelctlError
from ..model_names import kind_of
from ..training.rng import random_numbers_kept
from .kernels import (
    each,
    for_real,
    nothing_compiled,
    plain_kernels,
    raise_if_mixed,
    tensors_in,
)
from .macs import formula, is_free
from .meta_shapes import result
from .model_copy import Copy
from .said import Shapes, cut, needs_values, shapes_of, words
from .values import FromPython, Values, is_view, written

aten: Any = torch.ops.aten

# What gives a number to Python, not a tensor.
_ANSWERS = frozenset(
    {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
)
_FOR_REAL = "device='cpu' (--device cpu) runs a copy of the model for real"
_BACKWARD = ("summary runs no backward", "saved tensor hooks", "does not support backward")
_WITH_BIAS = (nn.Linear, nn.modules.conv._ConvNd)


@dataclass
class Calls:
    """What a forward did in a module, without the modules inside it."""

    macs: int = 0
    calls: int = 0
    output: Shapes | None = None
    given: tuple[tuple[torch.Size, torch.dtype], ...] = ()


@dataclass
class Trace:
    """What a forward did: ``modules`` by name, in the order of their first calls.

    Attributes:
        uncounted: how often operators without a known number of MACs were called, and where.
        unseen: the modules inside a TorchScript program, whose calls Python does not see.
        touched: the ids of the parameters and buffers that some operator got;
            ``touched_in_training``: those that one in train mode got, where that was looked at.
        peak: bytes of the tensors alive at once at most, inputs, parameters and buffers aside,
            where nothing is kept for a backward.
        normed: (module, BatchNorm) where the output of a layer with a bias goes right into one,
            and nowhere else.
        saved: bytes that autograd keeps for the backward, parameters, buffers and inputs aside;
            None where that is not known.
        output: the shapes of what the model returned.
    """

    modules: dict[str, Calls] = field(default_factory=dict)
    uncounted: dict[tuple[str, str], int] = field(default_factory=dict)
    unseen: set[str] = field(default_factory=set)
    touched: set[int] = field(default_factory=set)
    touched_in_training: set[int] = field(default_factory=set)
    normed: list[tuple[str, str]] = field(default_factory=list)
    peak: int = 0
    saved: int | None = 0
    output: Shapes | None = None

    @property
    def macs(self) -> int:
        return sum(one.macs for one in self.modules.values())


class ForwardError(ModelctlError):
    """A model's forward raised; the message names the module it came from. ``modules`` is how
    many had been called."""

    modules = 0
    backward = False  # whether it takes gradients itself
    values = False  # whether it looks at values that are not known


def trace(
    copied: Copy,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    device: torch.device,
    saving: bool = True,
    from_python: bool = False,
) -> Trace:
    """Run a copied model once on these inputs; without ``saving`` under ``no_grad``, and what a
    backward would need is not known. With ``from_python`` Python's numbers that become tensors
    keep their values on meta, too: for that each function of torch is seen, which takes time.

    Raises:
        ForwardError: the forward raised.
    """
    model = copied.model
    values = Values()
    if device.type == "meta":
        for tensor, value in copied.with_values:
            values.learn(tensor, value)
        args, kwargs = each((args, dict(kwargs)), values.on_meta)
    watch = _Watch(copied, args, kwargs, values)
    with ExitStack() as stack:
        stack.enter_context(random_numbers_kept())
        stack.enter_context(plain_kernels(device))
        stack.enter_context(torch.set_grad_enabled(saving))
        stack.enter_context(nothing_compiled())
        if saving:
            keep_nothing = torch.autograd.graph.saved_tensors_hooks(watch.save, _no_backward)
            stack.enter_context(keep_nothing)
        for handle in watch.hook(model):
            stack.callback(handle.remove)
        try:
            with watch, FromPython(values) if from_python else nullcontext():
                out = watch.call(model, args, kwargs)
        except Exception as e:
            raise watch.explain(e) from e
    found = watch.trace
    found.output = shapes_of(out)
    found.saved = found.saved if saving else None
    found.normed = [pair for pair in found.normed if pair[0] not in watch.elsewhere]
    return found


def _no_backward(_: Any) -> Tensor:
    raise RuntimeError(_BACKWARD[0])


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operator of a forward, and which module it is of."""

    def __init__(
        self, copied: Copy, args: Sequence[Any], kwargs: Mapping[str, Any], values: Values
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.trace = Trace()
        self.values = values
        self.stack: list[str] = []
        self.modules = {id(module): name for name, module in copied.model.named_modules()}
        self.kinds: dict[str, str] = {}
        self.biased: dict[int, tuple[Any, str]] = {}
        self.elsewhere: set[str] = set()  # modules of which something else takes the output
        self.instead = copied.tensors
        own = (*copied.model.parameters(), *copied.model.buffers())
        self.own = {id(tensor) for tensor in own}
        # storages of others: they are not the forward's
        outside = (*own, *tensors_in((args, kwargs)))
        self.others = {_storage(one)._cdata for one in outside if _has_storage(one)}
        self.live: dict[int, _Alive] = {}
        self.last = ""  # operator that runs
        self.alive = 0

    supports_higher_order_operators = True

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Newer torch asks. With its own answer it would import its compiler inside of the first
        operator: seconds, and frames of that import keep the operator's tensors alive."""
        return False

    # -------------------------------------------------------------- modules

    def hook(self, model: nn.Module) -> Iterator[Any]:
        for name, module in model.named_modules():
            self.kinds[name] = kind_of(module)
            if isinstance(module, torch.jit.ScriptModule):  # takes no hooks
                if name:
                    self.trace.unseen.add(name)
                continue
            yield module.register_forward_pre_hook(
                self._entering(name), prepend=True, with_kwargs=True
            )
            yield module.register_forward_hook(self._leaving(name))

    def call(self, model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(model, torch.jit.ScriptModule):
            return model(*args, **kwargs)
        self._entering("")(model, args, kwargs)
        out = model(*args, **kwargs)
        self._leaving("")(model, args, out)
        return out

    def _entering(self, name: str) -> Callable[..., None]:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            self.stack.append(name)
            calls = self.trace.modules.setdefault(name, Calls())
            calls.calls += 1
            # not the tensors: they would live on
            calls.given = tuple((one.shape, one.dtype) for one in tensors_in((args, kwargs)))
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and args:
                made, by = self.biased.get(id(args[0]), (None, ""))
                if made is not None and made() is args[0] and (by, name) not in self.trace.normed:
                    self.trace.normed.append((by, name))

        return enter

    def _leaving(self, name: str) -> Callable[..., None]:
        def leave(module: nn.Module, args: Any, out: Any) -> None:
            while self.stack and self.stack.pop() != name:
                pass  # left by an exception that the model caught
            calls = self.trace.modules[name]
            if calls.output is None:
                calls.output = shapes_of(out)
            biased = isinstance(module, _WITH_BIAS) and module.bias is not None
            if biased and isinstance(out, Tensor):
                self.biased[id(out)] = (weakref.ref(out), name)

        return leave

    def explain(self, error: Exception) -> ForwardError:
        """What a forward raised, and where: in the innermost module that the traceback shows."""
        frames = [frame.f_locals.get("self") for frame, _ in traceback.walk_tb(error.__traceback__)]
        where = next((self.modules[id(one)] for one in frames[::-1] if id(one) in self.modules), "")
        kind = self.kinds.get(where, "model")
        place = f"'{where}' ({kind})" if where else f"the model itself ({kind})"
        given = words(self.trace.modules.get(where, Calls()).given)
        start = f"forward failed in {place}{f', given {given}' if given else ''}: "
        text = " ".join(str(error).split()) or "no message"
        if needs_values(error, text):
            by = f" ({self.last})" if self.last else ""
            found = ForwardError(
                f"{start}it needs the values of tensors{by}, and has shapes alone",
                hint=_FOR_REAL,
            )
            found.values = True
        else:
            hint = None
            if "Long, Int" in text:
                hint = "give integers: dtypes=[torch.long] (--input-dtype int64)"
            elif "meta" in text.lower() or "quantized" in text:
                hint = f"it may be torch's meta device: {_FOR_REAL}"
            found = ForwardError(f"{start}{type(error).__name__}: {cut(text)}", hint=hint)
        found.modules = len(self.trace.modules)
        found.backward = any(words in text for words in _BACKWARD)
        return found

    # -------------------------------------------------------------- operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, HigherOrderOperator):
            return self._of_functions(func, args, kwargs)
        if formula(func) is None and not is_free(func):  # made of others? In inference mode
            with self:
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        self.last = func._schema.name
        inputs = [*tensors_in(args), *tensors_in(kwargs)]
        if any(id(one) in self.instead for one in inputs):
            # by way of an object or closure that was not copied: the original stays as it is
            args, kwargs = each((args, kwargs), lambda one: self.instead.get(id(one), one))
            inputs = [*tensors_in(args), *tensors_in(kwargs)]
        out = self._run(func, inputs, args, kwargs)
        self.last = ""
        self._count(func, args, kwargs, out)
        for one in inputs:
            if id(one) in self.own:
                self.trace.touched.add(id(one))
            made, by = self.biased.get(id(one), (None, ""))
            if made is not None and made() is one and "batch_norm" not in func._schema.name:
                self.elsewhere.add(by)
        for one in tensors_in(out):
            self._made(one)
        return out

    def _of_functions(self, func: Any, args: Any, kwargs: Any) -> Any:
        """An operator that calls Python for each element (flex_attention): what it costs depends on
        that, and nobody counts it."""
        key = (str(func._name), self.stack[-1] if self.stack else "")
        self.trace.uncounted[key] = self.trace.uncounted.get(key, 0) + 1
        query, _, value = (one if isinstance(one, Tensor) else None for one in args[:3])
        if func._name != "flex_attention" or query is None or value is None or not query.is_meta:
            return func(*args, **kwargs)
        rows = query.shape[:-1]
        found = [(*rows, value.shape[-1]), rows, rows]
        return tuple(torch.empty(one, dtype=query.dtype, device="meta") for one in found)

    def _run(self, func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """What an operator gives; on meta with the values that are known."""
        device = kwargs.get("device")
        values = self.values
        on_meta = any(one.is_meta or values.is_stale(one) for one in inputs)
        on_meta = on_meta or str(device) == "meta"
        if not on_meta:
            return func(*args, **kwargs)
        known = None if is_view(func) else values.computed(func, args, kwargs)
        if func in _ANSWERS and known is not None:
            return known
        if func is aten._to_copy.default and device is not None and device.type != "meta":
            # nothing gets values back that has none
            if known is not None:
                return known
            kwargs = {**kwargs, "device": torch.device("meta"), "pin_memory": False}
        if func is aten._pack_padded_sequence.default:
            packed = values.packed(*args)
            if packed is None:
                raise RuntimeError("data-dependent")
            return packed
        targets = written(func, args, kwargs)
        args, kwargs = self._all_on_meta(func, inputs, args, kwargs)
        raise_if_mixed(func, inputs, args, kwargs)
        out = result(func, args, kwargs)
        if out is None:
            try:
                out = func(*args, **kwargs)
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError):
                if known is None:
                    for_real(func, args, kwargs)
                    raise
                out = each(known, values.on_meta)  # its shape depends on values
        if known is not None:
            values.follow(out, known)
        else:
            values.forget(targets)
            values.constant(func, args, out)
        return out

    def _all_on_meta(self, func: Any, inputs: list[Tensor], args: Any, kwargs: Any) -> Any:
        """What a forward makes on the CPU by itself (positions, masks) is on meta from where it
        meets a tensor that is there, and keeps its values."""
        indexed = func._overloadpacket in (aten.index, aten.index_put, aten.index_put_)

        def moved(value: Tensor) -> Tensor:
            # a mask's number of True is known only from its values
            if indexed and value.dtype == torch.bool:
                known = self.values.of(value)
                return value if known is None else known
            return self.values.on_meta(value)

        if not indexed and all(one.is_meta for one in inputs):
            return args, kwargs
        return each((args, kwargs), moved)

    def _count(self, func: Any, args: Any, kwargs: Any, out: Any) -> None:
        name = self.stack[-1] if self.stack else ""
        flops = formula(func)
        if flops is not None:
            calls = self.trace.modules.setdefault(name, Calls())
            calls.macs += flops(*args, **kwargs, out_val=out) // 2
        elif not is_free(func):
            key = (str(func._schema.name), name)
            self.trace.uncounted[key] = self.trace.uncounted.get(key, 0) + 1

    # -------------------------------------------------------------- memory

    def _made(self, tensor: Tensor) -> None:
        if not _has_storage(tensor):
            return
        storage = _storage(tensor)
        key = storage._cdata
        if key in self.live or key in self.others:
            return
        self.live[key] = _Alive(storage.nbytes(), weakref.ref(storage, self._gone(key)))
        self.alive += storage.nbytes()
        self.trace.peak = max(self.trace.peak, self.alive)

    def _gone(self, key: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            found = self.live.pop(key, None)
            if found is not None:
                self.alive -= found.nbytes

        return gone

    def save(self, tensor: Tensor) -> None:
        """What autograd keeps for the backward; here it keeps nothing."""
        if _has_storage(tensor):
            found = self.live.get(_storage(tensor)._cdata)
            if found is not None and not found.saved:
                found.saved = True
                self.trace.saved = (self.trace.saved or 0) + found.nbytes


@dataclass
class _Alive:
    nbytes: int
    reference: Any
    saved: bool = False


def _has_storage(tensor: Tensor) -> bool:
    return tensor.layout == torch.strided and not torch.nn.parameter.is_lazy(tensor)


def _storage(tensor: Tensor) -> Any:
    return tensor.untyped_storage()
