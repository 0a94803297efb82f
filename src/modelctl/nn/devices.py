"""Where tensors go: which device is meant, which GPUs are seen, and whole batches onto one."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import os
import warnings
from collections.abc import Mapping, MutableMapping, MutableSequence
from typing import Any, TypeVar, cast

import torch

from ..errors import UsageError

Device = str | int | torch.device | None
T = TypeVar("T")

_VISIBLE = "CUDA_VISIBLE_DEVICES"
_ORDER = "CUDA_DEVICE_ORDER"


def choose_device(device: str | int | torch.device = "auto") -> torch.device:
    """The device that is meant, checked to be there.

    ``"auto"`` is a CUDA device where there is one, else MPS, else the CPU. ``"cuda"`` is the one
    with the most free memory now; under torchrun it is the process's own (``LOCAL_RANK``), which
    becomes the current one (``torch.cuda.set_device``), as NCCL wants it. A number, or
    ``"cuda:1"``, is that one of those that CUDA_VISIBLE_DEVICES shows, in its order.

    With several GPUs to choose from, asking each opens a CUDA context there (some hundred MB):
    :func:`visible_devices` keeps out of those that are not yours. Choose once, and move model,
    loss (its class weights are tensors, too) and each batch there::

        device = choose_device("auto")
        model, loss = to_device((model, nn.CrossEntropyLoss(weight=weights)), device)

    Raises:
        UsageError: not a device, or one that is not there.
    """
    if device == "auto":
        if torch.cuda.is_available():
            return _own_gpu()
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    found = _device(device, "cuda")
    if found.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if not count:
            raise UsageError(
                f"{device!r}: there is no CUDA device{_shown()}",
                hint="device='auto' takes what is there",
            )
        if (found.index or 0) >= count:
            raise UsageError(
                f"{device!r}: the CUDA devices here are 0 to {count - 1}{_shown()}",
                hint="device='auto' takes the one with the most free memory",
            )
        return _own_gpu() if found.index is None else found
    if found.type == "mps" and not torch.backends.mps.is_available():
        raise UsageError("'mps': there is no MPS device", hint="device='auto' takes what is there")
    return found


def _device(device: object, numbers: str | None = None) -> torch.device:
    """What torch takes for a device; numbers are those of the kind ``numbers``, or torch's own."""
    try:
        if not isinstance(device, str | int | torch.device) or isinstance(device, bool):
            raise RuntimeError(f"it is a {type(device).__name__}")
        if isinstance(device, int) and numbers is not None:
            return torch.device(numbers, device)
        return torch.device(device)
    except RuntimeError as e:
        raise UsageError(
            f"{device!r:.40} is no device: {str(e).splitlines()[0]}",
            hint="'cpu', 'cuda:0', 0, or what choose_device gives",
        ) from None


def _own_gpu() -> torch.device:
    count = torch.cuda.device_count()
    rank = os.environ.get("LOCAL_RANK", "")
    if rank.isdecimal():  # all would choose the same
        own = torch.device("cuda", int(rank) % count)
        torch.cuda.set_device(own)  # NCCL passes objects on over the current one
        return own
    return torch.device("cuda", max(range(count), key=_free_memory) if count > 1 else 0)


def _free_memory(index: int) -> int:
    try:
        return torch.cuda.mem_get_info(index)[0]
    except RuntimeError:  # another process has it for itself, or filled it
        return -1


def _shown() -> str:
    value = os.environ.get(_VISIBLE)
    return "" if value is None else f" ({_VISIBLE}={value})"


# ------------------------------------------------------------------ which are seen


def visible_devices(*devices: int | str) -> None:
    """Let this process see these GPUs alone, in this order: ``visible_devices(2, 0)`` makes GPU 2
    ``cuda:0`` and GPU 0 ``cuda:1``.

    Sets CUDA_VISIBLE_DEVICES for this process and those that it starts. Numbers are those of
    ``nvidia-smi``, whatever was set before (CUDA_DEVICE_ORDER becomes PCI_BUS_ID unless it is
    set); UUIDs (``"GPU-…"``) work, too; no argument hides all.

    Raises:
        UsageError: not a number or a text; CUDA is up already (``torch.cuda.is_available()`` is
            enough for that), so that it would not take notice; or CUDA_VISIBLE_DEVICES is set and
            leaves one of these out.
    """
    for device in devices:
        if not isinstance(device, str | int) or isinstance(device, bool) or str(device)[:1] == "-":
            raise UsageError(f"{device!r:.40} is no GPU", hint="visible_devices(2, 0), or UUIDs")
    wanted = [part.strip() for device in devices for part in str(device).split(",")]
    before = os.environ.get(_VISIBLE)
    if before == ",".join(wanted) and (_ORDER in os.environ or _cuda_is_up()):
        if _ORDER not in os.environ and any(part.isdecimal() for part in wanted):
            warnings.warn(
                f"CUDA is up already, without {_ORDER}=PCI_BUS_ID: its GPU {wanted[0]} need not "
                "be nvidia-smi's",
                stacklevel=2,
            )
        return
    if before is not None:
        allowed = [part.strip() for part in before.split(",")]
        hidden = [device for device in wanted if device not in allowed]
        if hidden:
            raise UsageError(
                f"GPU {', '.join(hidden)} is hidden from this process: {_VISIBLE}={before}",
                hint="choose among these, or change it where it is set (a scheduler, the shell)",
            )
    if _cuda_is_up():
        raise UsageError(
            f"CUDA is up already, it would take no notice of another {_VISIBLE}",
            hint="call visible_devices first of all (even torch.cuda.is_available() starts "
            "CUDA), or set the variable in the shell",
        )
    os.environ[_VISIBLE] = ",".join(wanted)
    os.environ.setdefault(_ORDER, "PCI_BUS_ID")


def _cuda_is_up() -> bool:
    """Whether the driver runs, and so has read its variables; torch does not know of all starts."""
    if cast(Any, torch.cuda).is_initialized():
        return True
    import ctypes

    try:
        driver = ctypes.CDLL("libcuda.so.1", mode=os.RTLD_NOLOAD)
        return bool(driver.cuDeviceGetCount(ctypes.byref(ctypes.c_int())) == 0)
    except (OSError, AttributeError):  # not loaded, so not up; or not Linux
        return False


# ------------------------------------------------------------------ batches


def to_device(batch: T, device: str | int | torch.device, *, non_blocking: bool = False) -> T:
    """A batch with all tensors in it on ``device``; its containers are new ones of the same types.

    Goes into mappings, lists, tuples, named tuples and dataclasses; what has a ``.to`` (tensors,
    modules, PackedSequence, a tokenizer's output) is asked itself; anything else stays as it is.
    A module is moved in place, as ``.to`` does.

    Args:
        device: as torch takes it; choose once with :func:`choose_device`, not for each batch.
        non_blocking: don't wait for the copy. It only helps from page-locked memory
            (``DataLoader(pin_memory=True)``) to CUDA; from the GPU to the CPU, wait before use.
            A ``.to`` that knows no such argument copies as it does.

    Raises:
        UsageError: not a device.
    """
    if device == "auto":
        raise UsageError(
            "device='auto' could choose another one for each batch",
            hint="device = choose_device('auto'), once",
        )
    return cast(T, _moved(batch, _device(device), non_blocking))


def _moved(value: Any, device: torch.device, non_blocking: bool) -> Any:
    def inner(part: Any) -> Any:
        return _moved(part, device, non_blocking)

    if isinstance(value, str | bytes | type):
        return value
    if callable(getattr(value, "to", None)):
        if non_blocking and _takes_non_blocking(value):
            return value.to(device, non_blocking=True)
        return value.to(device)
    if isinstance(value, Mapping):
        items = {key: inner(part) for key, part in value.items()}
        if not isinstance(value, MutableMapping):
            return type(value)(items)  # type: ignore[call-arg]
        made = copy.copy(value)  # a defaultdict's factory, an OrderedDict's attributes
        for key, part in items.items():
            made[key] = part
        return made
    if isinstance(value, tuple):
        parts = [inner(part) for part in value]
        make = getattr(type(value), "_make", type(value))  # a named tuple may have its own new
        return make(parts)
    if isinstance(value, MutableSequence) and not isinstance(value, bytearray):
        filled = copy.copy(value)
        for i, part in enumerate(value):
            filled[i] = inner(part)
        return filled
    if dataclasses.is_dataclass(value):
        changed = copy.copy(value)
        for field in dataclasses.fields(value):
            if hasattr(value, field.name):
                object.__setattr__(changed, field.name, inner(getattr(value, field.name)))
        return changed
    return value


def _takes_non_blocking(value: Any) -> bool:
    if isinstance(value, torch.Tensor | torch.nn.Module):
        return True
    try:
        params = inspect.signature(value.to).parameters
    except (TypeError, ValueError):  # written in C
        return False
    return "non_blocking" in params or any(p.kind is p.VAR_KEYWORD for p in params.values())
