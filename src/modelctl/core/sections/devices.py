"""The devices that storages say they were on, as torch tags them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..tensors import TensorRef
from ..text import count
from ..tree import containers

if TYPE_CHECKING:
    from ..checkpoint import Checkpoint

# What torch.save calls them: of some kinds there are several, and of these the first is meant
# where none is said; those of other vendors come with packages of their own.
_ONE, _NUMBERED = ("cpu", "mps"), ("cuda", "xpu", "hpu", "npu")
_DEVICE = re.compile(rf"(?:{'|'.join(_ONE)})|(?:{'|'.join(_NUMBERED)})(?P<index>:\d{{1,3}})?")


def devices_of(ckpt: Checkpoint) -> dict[str, int] | None:
    """How many tensors of a checkpoint, in all its sections, were saved on which device, the one
    of most first; None where the file doesn't say of any."""
    refs: dict[int, TensorRef] = {}
    for _, inner in containers(ckpt.root).values():
        for child in inner:
            if type(child) is TensorRef:
                refs[id(child)] = child
    if type(ckpt.root) is TensorRef:
        refs[id(ckpt.root)] = ckpt.root
    found = Counter(device_of(ref, ckpt) for ref in refs.values())
    found.pop(None, None)
    return {device: n for device, n in found.most_common() if device is not None} or None


def device_of(ref: TensorRef, ckpt: Checkpoint) -> str | None:
    """The device that a tensor was saved on; None where the file doesn't say."""
    return ckpt.device or ref.storage.location


def devices_text(devices: Mapping[str, int]) -> str:
    """``cuda:0``, or of several ``cuda:0 (4 tensors), cpu (1)``."""
    if len(devices) == 1:
        return next(iter(devices))
    (first, most), *others = devices.items()
    return ", ".join((f"{first} ({count(most, 'tensor')})", *(f"{d} ({n})" for d, n in others)))


def device_tag(device: str) -> str:
    """A device as torch tags a storage that is on it: ``cuda`` is ``cuda:0``.

    Raises:
        UsageError: there is no such device, or none that holds bytes.
    """
    known = ", ".join((_ONE[0], *(f"{one}:0" for one in _NUMBERED), *_ONE[1:]))
    if device == "meta":
        raise UsageError("'meta' is no place for bytes: they would be lost", hint=f"one of {known}")
    found = _DEVICE.fullmatch(device)
    if found is None:
        raise UsageError(f"there is no device '{device}'", hint=f"one of {known}")
    return f"{device}:0" if device in _NUMBERED else device
