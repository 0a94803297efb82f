"""The formats of one file: what archives, shards and folders hold."""

from __future__ import annotations

from collections.abc import Sequence

from ..core.checkpoint import Checkpoint
from ..errors import ModelctlError, UnreadableError
from ..storage.places import Place
from .base import Format
from .guests import third_party
from .programs.export import TorchExport
from .programs.torchscript import TorchScript
from .pytorch.legacy import TorchLegacy
from .pytorch.tar import TorchTar
from .pytorch.zip import TorchZip
from .safetensors import Safetensors

# Those that hold a state_dict and nothing else need.
SHARDS: Sequence[Format] = (TorchZip(), TorchLegacy(), Safetensors())
SINGLE: Sequence[Format] = (TorchExport(), TorchScript(), *SHARDS, TorchTar())


def check_not_empty(place: Place) -> None:
    """Raises UnreadableError for a file without a byte in it."""
    if not place.is_folder and place.size == 0:
        raise UnreadableError(
            "an empty file", path=place.name, hint="the download or the save failed: do it again"
        )


def known_to(formats: Sequence[Format], place: Place) -> Format | None:
    """The first of the formats that knows a place, or None."""
    return next((known for known in formats if known.sniff(place)), None)


def guest_of(place: Place) -> Format | None:
    """The first format of another package that knows a place, or None.

    Raises:
        ModelctlError: none knows it, and one of them can't say so; names its package.
    """
    failed: ModelctlError | None = None
    for known in third_party():
        try:
            if known.sniff(place):
                return known
        except ModelctlError as e:
            failed = failed or e
    if failed is not None:
        raise failed
    return None


def read_single(place: Place, among: Sequence[Format] | None = None) -> Checkpoint:
    """Read one file that was found inside of something else.

    Raises:
        UnreadableError: no format knows it, or it is damaged.
    """
    check_not_empty(place)
    known = known_to(among or SINGLE, place)
    if known is None and among is None:
        known = guest_of(place)
    if known is None:
        raise UnreadableError("no checkpoint", path=place.name)
    return known.read(place)
