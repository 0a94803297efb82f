"""The lr range test: raise the learning rate from tiny to huge, and see where the loss falls."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from ...errors import MissingExtraError, NoMatchError, RefusedError, UsageError
from ..devices import to_device
from ..optim.schedulers import lr_of, own_lr
from .untouched import untouched

_SMOOTHING = 0.9


@dataclass(frozen=True)
class LrRange:
    """What :func:`lr_find` measured; ``str()`` says what it suggests.

    Attributes:
        lrs: the learning rate of each step: that of the group with the highest.
        losses: the loss of each step's batch, before the step.
        smoothed: their running average.
        diverged: whether the loss ran away, so that the test ended before ``end``.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    diverged: bool

    @property
    def steepest(self) -> float | None:
        """Where the smoothed loss falls fastest; None where it does not fall."""
        logs = [math.log(lr) for lr in self.lrs]
        lowest = self._lowest
        slopes = [
            ((self.smoothed[i + 1] - self.smoothed[i - 1]) / (logs[i + 1] - logs[i - 1]), i)
            for i in range(1, min(lowest + 1, len(logs) - 1))
        ]
        slope, i = min(slopes, default=(0.0, 0))
        return self.lrs[i] if slope < 0 else None

    @property
    def tenth(self) -> float | None:
        """A tenth of where the smoothed loss is lowest; None where it does not fall."""
        return self.lrs[self._lowest] / 10 if self._lowest else None

    @property
    def _lowest(self) -> int:
        return min(range(len(self.smoothed)), key=self.smoothed.__getitem__)

    def __str__(self) -> str:
        end = "the loss ran away there" if self.diverged else "the loss did not run away"
        text = f"lr {self.lrs[0]:.3g} to {self.lrs[-1]:.3g} in {len(self.lrs)} steps; {end}"
        if self.tenth is None:
            return f"{text}\nno suggestion: the loss does not fall"
        steepest = "" if self.steepest is None else f"steepest descent {self.steepest:.3g}, "
        return f"{text}\nsuggested: {steepest}a tenth of the minimum {self.tenth:.3g}"

    def plot(self, ax: Any = None) -> Any:
        """The curve on matplotlib's axes, given or new; gives the axes.

        Raises:
            MissingExtraError: no ``ax``, and no matplotlib.
        """
        if ax is None:
            try:
                from matplotlib import pyplot
            except ModuleNotFoundError:
                raise MissingExtraError(
                    "the plot needs matplotlib: pip install matplotlib", hint=None
                ) from None
            ax = pyplot.subplots()[1]
        ax.plot(self.lrs, self.losses, alpha=0.3)
        ax.plot(self.lrs, self.smoothed)
        for lr in (self.steepest, self.tenth):
            if lr is not None:
                ax.axvline(lr, linestyle=":")
        ax.set(xscale="log", xlabel="lr", ylabel="loss")
        return ax


def lr_find(
    model: nn.Module,
    optimizer: Optimizer,
    loader_or_step: Iterable[Any] | Callable[[], Tensor],
    *,
    loss_fn: Callable[[Any, Any], Tensor] = F.cross_entropy,
    start: float = 1e-7,
    end: float = 10.0,
    steps: int = 100,
    diverge: float = 4.0,
) -> LrRange:
    """An lr range test: train for a few steps, the lr growing exponentially, and undo it all.

    Each step takes a batch: of (x, y) the loss is ``loss_fn(model(x), y)``; a dict goes into the
    model by names, and the output's ``loss`` counts (transformers). Batches go to the model's
    device; a loader that ends begins anew. Instead of a loader, a function without arguments that
    gives the next batch's loss (autocast and all; no backward). The model is in train mode.

    It ends when the smoothed loss is ``diverge`` times its best, or not finite. Groups keep what
    their lrs are to each other; ``lrs`` are those of the highest.

    Afterwards all is as it was, bit for bit, also where something raised: parameters, buffers,
    gradients, modes, plain attributes of modules, the optimizer's state and groups, and the
    random numbers of torch (with CUDA's), numpy, Python and the loader's own generators. Not what
    an iterator has given out, what persistent workers that ran already drew, and what the model
    keeps in lists or beside itself. It takes the memory of another model and optimizer.

    Raises:
        UsageError: not 0 < ``start`` < ``end``, fewer than 2 steps, ``diverge`` not above 1; a
            step that gives no loss to take the gradient of; lazy parameters.
        NoMatchError: the loader gives no batch.
        RefusedError: the loss is not finite from the start; an optimizer that finds its own lr,
            or that calls the model itself (LBFGS).
    """
    if not 0 < start < end < math.inf or steps < 2 or not diverge > 1:
        raise UsageError(
            f"start={start!r}, end={end!r}, steps={steps!r}, diverge={diverge!r}: "
            "start < end above 0, 2 steps or more and diverge above 1 are wanted"
        )
    if type(optimizer).__name__ == "LBFGS":
        raise RefusedError("LBFGS searches along a line itself: a range of lrs says nothing of it")
    shares = _shares(optimizer)
    lrs: list[float] = []
    losses: list[float] = []
    smoothed: list[float] = []
    average, diverged = 0.0, False
    with untouched(model, optimizer, loader_or_step), torch.enable_grad():
        if not model.training:
            model.train()
        following = _losses(model, loader_or_step, loss_fn)
        for i in range(steps):
            lr = start * (end / start) ** (i / (steps - 1))
            _set_lr(optimizer, shares, lr)
            _clear(model, optimizer)
            loss = next(following, None)
            if loss is None:
                break
            value = float(loss.detach())
            if not math.isfinite(value):
                diverged = True
                break
            average = _SMOOTHING * average + (1 - _SMOOTHING) * value
            lrs.append(lr)
            losses.append(value)
            smoothed.append(average / (1 - _SMOOTHING ** (i + 1)))
            best = min(smoothed)
            if smoothed[-1] > best + (diverge - 1) * abs(best):
                diverged = True
                break
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        del following
    if not lrs:
        if diverged:
            raise RefusedError("the loss is not finite before the first step")
        raise NoMatchError("the loader gave no batch", hint="an iterator can be read only once")
    return LrRange(tuple(lrs), tuple(losses), tuple(smoothed), diverged)


def _shares(optimizer: Optimizer) -> list[float]:
    """What each group's lr is to the highest one's."""
    if any(lr_of(group) is None for group in optimizer.param_groups):
        raise RefusedError(f"{type(optimizer).__name__} finds its own lr: there is none to try")
    own = [own_lr(group) for group in optimizer.param_groups]
    highest = max(own)
    return [lr / highest if highest else 1.0 for lr in own]


def _set_lr(optimizer: Optimizer, shares: Iterable[float], lr: float) -> None:
    for group, share in zip(optimizer.param_groups, shares, strict=True):
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(lr * share)
        else:
            group["lr"] = lr * share


def _clear(model: nn.Module, optimizer: Optimizer) -> None:
    model.zero_grad(set_to_none=True)  # also of what this optimizer does not hold
    optimizer.zero_grad(set_to_none=True)


def _losses(
    model: nn.Module,
    loader_or_step: Iterable[Any] | Callable[[], Tensor],
    loss_fn: Callable[[Any, Any], Tensor],
) -> Iterator[Tensor]:
    if isinstance(loader_or_step, Iterable):
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        for batch in _batches(loader_or_step):
            yield _checked(_loss(model, to_device(batch, device), loss_fn))
    elif callable(loader_or_step):
        while True:
            yield _checked(loader_or_step())
    else:
        raise UsageError(
            f"a loader or a function is wanted, not {type(loader_or_step).__name__}",
            hint="lr_find(model, optimizer, lambda: loss_fn(model(x), y))",
        )


def _batches(loader: Iterable[Any]) -> Iterator[Any]:
    """Batches, from the start again and again; an iterator has only one start."""
    while True:
        empty = True
        for batch in loader:
            empty = False
            yield batch
        if empty:
            return


def _loss(model: nn.Module, batch: Any, loss_fn: Callable[[Any, Any], Tensor]) -> Any:
    if isinstance(batch, Mapping):
        out = model(**batch)
        return out["loss"] if isinstance(out, Mapping) else getattr(out, "loss", None)
    if isinstance(batch, list | tuple) and len(batch) == 2:
        return loss_fn(model(batch[0]), batch[1])
    raise UsageError(
        f"a batch is a pair (x, y) or a dict, not a {type(batch).__name__}",
        hint="give a function that makes the loss: lr_find(model, optimizer, lambda: …)",
    )


def _checked(loss: Any) -> Tensor:
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        what = f"{tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise UsageError(
            f"the step gave no loss to take the gradient of: {what}",
            hint="one number with its graph, before backward",
        )
    return loss
