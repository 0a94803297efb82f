"""The formats of one file: what archives, shards and folders hold."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from ..core.checkpoint import Checkpoint
from ..errors import ModelctlError, UnreadableError
from ..storage.places import Place
from .base import Format
from .programs.export import TorchExport
from .programs.torchscript import TorchScript
from .pytorch.legacy import TorchLegacy
from .pytorch.tar import TorchTar
from .pytorch.zip import TorchZip
from .safetensors import Safetensors

# Those that hold a state_dict and nothing else need.
SHARDS: Sequence[Format] = (TorchZip(), TorchLegacy(), Safetensors())
SINGLE: Sequence[Format] = (TorchExport(), TorchScript(), *SHARDS, TorchTar())


def known_to(formats: Sequence[Format], place: Place) -> Format | None:
    """The first of the formats that knows a place, or None."""
    return next((known for known in formats if known.sniff(place)), None)


def read_single(place: Place, among: Sequence[Format] | None = None) -> Checkpoint:
    """Read one file that was found inside of something else.

    Raises:
        UnreadableError: no format knows it, or it is damaged.
    """
    known = known_to(among or SINGLE, place)
    if known is None and among is None:
        known = known_to(third_party(), place)
    if known is None:
        raise UnreadableError("no checkpoint", path=place.name)
    return known.read(place)


@cache
def third_party() -> tuple[Format, ...]:
    """The formats that other installed packages bring, by the entry points ``modelctl.formats``:
    a subclass of :class:`~modelctl.formats.base.Format`, or an instance of one.

    Raises:
        ModelctlError: one of them can't be loaded; names its package.
    """
    from importlib.metadata import entry_points

    found: list[Format] = []
    for point in sorted(entry_points(group="modelctl.formats"), key=lambda one: one.name):
        package = point.dist.name if point.dist is not None else "another package"
        try:
            loaded: Any = point.load()
            made = loaded() if isinstance(loaded, type) else loaded
        except Exception as e:  # whatever somebody else's code raises
            raise ModelctlError(
                f"the format '{point.name}' of {package} can't be loaded: {e}",
                hint=f"upgrade or uninstall {package}",
            ) from e
        if not isinstance(made, Format):
            raise ModelctlError(
                f"the format '{point.name}' of {package} is no modelctl.formats.base.Format",
                hint=f"upgrade or uninstall {package}",
            )
        found.append(made)
    return tuple(found)
