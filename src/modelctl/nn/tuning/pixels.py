"""The mean and the standard deviation of images, per channel, over all of a loader."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.text import some
from ...errors import AmbiguousError, NoMatchError, RefusedError, UsageError

_CHANNELS = 4  # what images have at most, where the layout is to be told from the shape


def mean_std(loader: Iterable[Any], *, key: str | int | None = None) -> tuple[Tensor, Tensor]:
    """The mean and the standard deviation of each channel, over all pixels that a loader gives.

    One pass, one batch in memory; batches may be of any size. ``uint8`` is counted exactly and
    divided by 255, as ``v2.ToDtype(torch.float32, scale=True)`` does it; floats are taken as
    they are, summed in float64. So the result is what ``v2.Normalize`` wants behind either. Each
    pixel counts the same: it is not the mean of the batches' numbers, nor of the images'. The
    standard deviation is that of ``torch.std``. Floats that look as if they were divided by 255
    twice, not at all, or normalised already are warned about, with the range that was found.

    A loader with random crops or shuffling draws from the random numbers; with augmentation the
    result is that of the augmented images.

    Args:
        loader: gives batches N,C,H,W (or N,C,T,H,W): tensors, tuples or lists whose first such
            tensor is meant, or dicts that have one.
        key: which entry of each batch, where that isn't it.

    Returns:
        Two tensors of C numbers, float64, on the CPU.

    Raises:
        NoMatchError: no batch, or nothing like a batch of images in one.
        AmbiguousError: a dict with several.
        RefusedError: channels last, another number of channels or another dtype than before,
            integers that aren't uint8, NaN or infinity.
        UsageError: a batch has no such ``key``.
    """
    sums: _Counted | _Summed | None = None
    for number, batch in enumerate(loader):
        images = _images(batch, key, number).detach()
        if sums is None:
            _check_layout(images)
            if images.dtype != torch.uint8 and not images.is_floating_point():
                raise RefusedError(
                    f"images of {images.dtype}: what is white in them is not known",
                    hint="make them uint8, or floats from 0 to 1",
                )
            kind = _Counted if images.dtype == torch.uint8 else _Summed
            sums = kind(images.shape[1])
        elif (images.shape[1], images.dtype == torch.uint8) != (sums.channels, sums.counted):
            raise RefusedError(
                f"batch {number} is {images.dtype} with {images.shape[1]} channels, those before "
                f"had {sums.channels} and were {'uint8' if sums.counted else 'floats'}"
            )
        for channel in range(sums.channels):
            sums.add(channel, images[:, channel], number)
    if sums is None:
        raise NoMatchError("the loader gave no batch", hint="an iterator can be read only once")
    return sums.result()


class _Counted:
    """How often each of uint8's values is there: exact, whatever the number of images."""

    counted = True

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.counts = torch.zeros(channels, 256, dtype=torch.long)

    def add(self, channel: int, pixels: Tensor, number: int) -> None:
        self.counts[channel] += torch.bincount(pixels.reshape(-1), minlength=256).cpu()

    def result(self) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        for counts in self.counts.tolist():
            n = sum(counts)
            total = sum(value * times for value, times in enumerate(counts))
            squares = sum(value * value * times for value, times in enumerate(counts))
            # Python's integers don't round
            means.append(total / (255 * n) if n else math.nan)
            over = n * (n - 1) * 255 * 255
            stds.append(math.sqrt((n * squares - total * total) / over) if over else math.nan)
        return _float64(means), _float64(stds)


class _Summed:
    """Mean and squared deviation of each channel, each batch's merged into those before (Chan,
    Golub and LeVeque): a sum of squares would lose its digits."""

    counted = False

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.seen, self.means, self.squares = ([0.0] * channels for _ in range(3))
        self.lowest, self.highest = math.inf, -math.inf

    def add(self, channel: int, pixels: Tensor, number: int) -> None:
        if not pixels.numel():
            return
        # MPS has no float64
        exact = (pixels.cpu() if pixels.device.type == "mps" else pixels).double()
        lowest, highest = exact.aminmax()
        mean = exact.mean()
        squares = float((exact - mean).square().sum())
        if not math.isfinite(squares):
            raise RefusedError(f"batch {number} has NaN or infinity in channel {channel}")
        n, before = pixels.numel(), self.seen[channel]
        delta = float(mean) - self.means[channel]
        self.seen[channel] = before + n
        self.means[channel] += delta * n / (before + n)
        self.squares[channel] += squares + delta * delta * before * n / (before + n)
        self.lowest = min(self.lowest, float(lowest))
        self.highest = max(self.highest, float(highest))

    def result(self) -> tuple[Tensor, Tensor]:
        looks = None
        if self.lowest < 0:
            looks = "normalised already: take the images before v2.Normalize"
        elif self.highest > 2:
            looks = "not divided by 255: what follows has to take them so, too"
        elif 0 < self.highest < 1.001 / 255:
            looks = "divided by 255 twice"
        if looks is not None:
            warnings.warn(
                f"floats from {self.lowest:.4g} to {self.highest:.4g}: they look {looks}",
                stacklevel=3,
            )
        variances = [
            squares / (n - 1) if n > 1 else math.nan
            for squares, n in zip(self.squares, self.seen, strict=True)
        ]
        means = [m if n else math.nan for m, n in zip(self.means, self.seen, strict=True)]
        return _float64(means), _float64([math.sqrt(v) for v in variances])


def _float64(values: Sequence[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _images(batch: Any, key: str | int | None, number: int) -> Tensor:
    """The images of a batch."""
    if key is not None:
        try:
            batch = batch[key]
        except (KeyError, IndexError, TypeError):
            raise UsageError(f"batch {number} has no {key!r}: it is {_said(batch)}") from None
    if isinstance(batch, Mapping):
        found = {name: value for name, value in batch.items() if _is_images(value)}
        if len(found) > 1:
            names = [repr(name) for name in found]
            raise AmbiguousError(
                f"batch {number} has several entries like images: {some(names)}",
                hint=f"say which: key={names[0]}",
            )
        images = [*found.values()]
    elif isinstance(batch, list | tuple):
        images = [value for value in batch if _is_images(value)]
    else:
        images = [batch] if _is_images(batch) else []
    first: Tensor | None = next(iter(images), None)
    if first is None:
        raise NoMatchError(
            f"batch {number} has no images N,C,H,W: it is {_said(batch)}",
            hint="key= says which entry they are; a single image C,H,W is image[None]",
        )
    return first


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() in (4, 5)


def _said(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"a tensor {tuple(batch.shape)}"
    if isinstance(batch, Mapping):
        return f"a dict of {some([repr(name) for name in batch])}"
    if isinstance(batch, list | tuple):
        return f"a {type(batch).__name__} of {some([_said(one) for one in batch])}"
    return f"of type {type(batch).__name__}"


def _check_layout(images: Tensor) -> None:
    if images.shape[-1] <= _CHANNELS < images.shape[1]:
        raise RefusedError(
            f"images {tuple(images.shape)}: their channels come last",
            hint="images.permute(0, 3, 1, 2) puts them second",
        )
