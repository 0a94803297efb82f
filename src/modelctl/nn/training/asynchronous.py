"""A checkpoint written by a thread, from a copy of all that training goes on to change."""

from __future__ import annotations

import atexit
import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_last: _Saving | None = None


class _Saving(Future[Path]):
    """A save under way; its error is told once: to who asks, else to the next save."""

    told = False

    def result(self, timeout: float | None = None) -> Path:
        self.told |= super().exception(timeout) is not None
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        error = super().exception(timeout)
        self.told |= error is not None
        return error


def start(write: Callable[[], Path]) -> Future[Path]:
    """Run it in a thread, which the interpreter's exit waits for. One at a time: :func:`settle`
    first."""
    global _last
    saving = _last = _Saving()

    def run() -> None:
        try:
            path = write()
        except BaseException as e:
            saving.set_exception(e)
        else:
            saving.set_result(path)

    threading.Thread(target=run, name="modelctl-save", daemon=False).start()
    return saving


def done(path: Path) -> Future[Path]:
    """What a rank has that writes nothing."""
    saving = _Saving()
    saving.set_result(path)
    return saving


def settle() -> None:
    """Wait for the save under way; raises its error, where nobody was told of it."""
    global _last
    saving, _last = _last, None
    if saving is not None and not (saving.done() and saving.told):
        saving.result()


@atexit.register  # behind the threads' end
def _tell() -> None:
    if _last is not None and _last.done() and not _last.told:
        error = _last.exception()
        if error is not None:
            warnings.warn(f"the last asynchronous save failed: {error}", stacklevel=1)


def snapshot(node: Any, copies: dict[int, Any] | None = None) -> Any:
    """A tree whose tensors are copies on the CPU; those that share memory share it still.

    The dicts, lists and tuples in it are made anew; a state_dict's ``_metadata`` is kept.
    """
    copies = {} if copies is None else copies
    if isinstance(node, Tensor):
        return _copied(node, copies)
    if isinstance(node, dict):
        made = type(node)({key: snapshot(value, copies) for key, value in node.items()})
        if isinstance(node, OrderedDict):
            made.__dict__.update(node.__dict__)
        return made
    if type(node) in (list, tuple):
        return type(node)(snapshot(value, copies) for value in node)
    return node


def _copied(tensor: Tensor, copies: dict[int, Any]) -> Tensor:
    plain = tensor.detach()
    if type(tensor) not in (Tensor, nn.Parameter) or plain.layout != torch.strided:
        return plain.to("cpu", copy=True)
    plain = plain.resolve_conj().resolve_neg()
    memory: Any = plain.untyped_storage()
    key = memory._cdata
    if key not in copies:  # with what it is a copy of, so that no other gets its address
        copies[key] = memory, memory.clone() if memory.device.type == "cpu" else memory.cpu()
    made = torch.empty(0, dtype=plain.dtype).set_(
        copies[key][1], plain.storage_offset(), plain.size(), plain.stride()
    )
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(made, requires_grad=tensor.requires_grad)
    return made
