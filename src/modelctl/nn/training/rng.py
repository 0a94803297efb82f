"""The states of all random number generators that a training draws from."""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import distributed, nn

from ...errors import RefusedError
from ..loading.values import live
from .part import Part, Saved
from .trainers import rng_beside


class RngPart(Part):
    """The generators, where they are wanted: last, so that nothing draws from them after."""

    name = "rng"

    def __init__(self, saved: Saved, wanted: bool, model: nn.Module) -> None:
        super().__init__(saved)
        self.wanted, self.model = wanted, model
        self.state: Any = None

    def fit(self) -> None:
        node = self.saved.top.get("rng")
        if self.wanted and node is not None:
            self.state = own_state(live(node, "rng"))
        elif self.wanted:
            self.state = rng_beside(self.saved, rank(), world())
            _check(self.state or {})
        self._wanted(self.wanted, node if not self.wanted else self.state)

    def run(self) -> None:
        if self.state is not None:
            restore_rng(self.state, self.model)
            self.restored = True


def rank() -> int:
    """This process's number among those of ``torch.distributed``; 0 where it isn't used."""
    return distributed.get_rank() if _distributed() else 0


def _distributed() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if _distributed() else 1


def rng_state(model: nn.Module) -> dict[str, Any]:
    """The generators of torch (CPU, every CUDA device, MPS), Python's ``random`` and numpy's
    global one, as tensors, numbers and tuples that ``weights_only`` loads.

    numpy's is left out, with a warning, where it is not the MT19937 that it is by default.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    cuda: Any = torch.cuda
    if cuda.is_available() and cuda.is_initialized():
        state["cuda"] = cuda.get_rng_state_all()
        state["cuda_device"] = _cuda_device(model)
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy: Any = np.random.get_state(legacy=False)
    if numpy["bit_generator"] == "MT19937":
        state["numpy"] = {
            # torch has had uint32 for too short a time
            "keys": torch.from_numpy(numpy["state"]["key"].astype(np.int64)),
            "pos": int(numpy["state"]["pos"]),
            "has_gauss": int(numpy["has_gauss"]),
            "cached_gaussian": float(numpy["gauss"]),
        }
    else:
        warnings.warn("numpy's global generator is not MT19937: not saved", stacklevel=3)
    return state


def gathered(state: dict[str, Any]) -> dict[str, Any]:
    """On rank 0 its state with those of the other ranks in it; every rank has to call this."""
    if world() == 1:
        return state
    states: list[Any] | None = [None] * world() if rank() == 0 else None
    distributed.gather_object(state, states)
    return state if states is None else {**state, "others": states[1:]}


def own_state(saved: Any) -> Any:
    """What of a saved state is this process's; None, with a warning, where it has none.

    Raises:
        RefusedError: it is not what :func:`rng_state` and :func:`gathered` give.
    """
    state = of_rank(saved, "random number generators")
    if state is not None:
        _check(state)
    return state


def of_rank(saved: Any, what: str) -> Any:
    """What of a :func:`gathered` state is this process's; None, with a warning, where it has none.

    Raises:
        RefusedError: it is none.
    """
    others = saved.get("others", []) if isinstance(saved, dict) else None
    if not isinstance(others, list):
        raise _odd("a dict is expected")
    states = [saved, *others]
    if rank() >= len(states):
        warnings.warn(
            f"the checkpoint has the {what} of {len(states)} of {world()} "
            f"processes: those of rank {rank()} stay as they are (save_checkpoint(rng='all'), "
            "called on every rank, saves all)",
            stacklevel=5,
        )
        return None
    if others and len(states) != world():
        warnings.warn(
            f"the {what} of {len(states)} processes were saved, {world()} are here: they will "
            "not go on as they would have",
            stacklevel=5,
        )
    return states[rank()]


def _odd(why: object) -> RefusedError:
    return RefusedError(
        f"the checkpoint's rng is not one that save_checkpoint wrote: {why}",
        hint="resume(..., rng=False) leaves the generators as they are",
    )


def _check(state: Any) -> None:
    try:
        for key in ("torch", "mps"):
            if key in state:
                _bytes(state[key])
        for device in state.get("cuda", ()):
            _bytes(device)
        if "cuda" in state and not 0 <= state.get("cuda_device", 0) < len(state["cuda"]):
            raise ValueError("its CUDA device is none of those it has")
        if "python" in state:
            random.Random().setstate(_python(state["python"]))
        if "numpy" in state:
            np.random.RandomState().set_state(_numpy(state["numpy"]))
        if "torch" in state:
            torch.Generator().set_state(state["torch"])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
        raise _odd(e) from None


def restore_rng(state: dict[str, Any], model: nn.Module) -> None:
    """Set the generators from a checked state; those of CUDA devices that are not here are left
    out with a warning."""
    if "cuda" in state and torch.cuda.is_available():
        saved, here = state["cuda"], torch.cuda.device_count()
        if len(saved) != here:
            warnings.warn(
                f"generators of {len(saved)} CUDA devices were saved, {here} are here: random "
                "numbers of all but the model's will not go on as they would have",
                stacklevel=4,
            )
        to = _cuda_device(model)
        for device, i in _placed(len(saved), state.get("cuda_device", to), here, to).items():
            torch.cuda.set_rng_state(saved[i], device)
    mps = getattr(torch.backends, "mps", None)
    if "mps" in state and mps is not None and mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "python" in state:
        random.setstate(_python(state["python"]))
    if "numpy" in state:
        np.random.set_state(_numpy(state["numpy"]))
    if "torch" in state:
        torch.set_rng_state(state["torch"])


def _cuda_device(model: nn.Module) -> int:
    """The CUDA device that a model draws its random numbers from: its own, else the current."""
    for tensor in model.parameters():
        if tensor.is_cuda:
            return int(tensor.get_device())
    return int(torch.cuda.current_device())


def _placed(saved: int, at: int, here: int, to: int) -> dict[int, int]:
    """Which saved CUDA generator each device here gets: the model's follows it from ``at`` to
    ``to``, whose own goes the other way; the others stay."""
    places = {i: i for i in range(min(saved, here))}
    if at in range(saved):
        if at in places:
            del places[at]
            if to in range(saved):
                places[at] = to
        places[to] = at
    return places


def _bytes(state: Any) -> None:
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise TypeError("a generator's state is no byte tensor")


def _python(state: Any) -> Any:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss


def _numpy(state: Any) -> Any:
    keys = state["keys"].numpy().astype(np.uint32)
    return "MT19937", keys, state["pos"], state["has_gauss"], state["cached_gaussian"]


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """What the forward draws is not missing later: dropout, noise, stochastic depth."""
    cuda: Any = torch.cuda
    devices = cuda.device_count() if cuda.is_available() and cuda.is_initialized() else 0
    python, numpy = random.getstate(), np.random.get_state()
    mps = torch.mps.get_rng_state() if torch.backends.mps.is_available() else None
    try:
        with torch.random.fork_rng(devices=range(devices)):
            yield
    finally:
        if mps is not None:
            torch.mps.set_rng_state(mps)
        random.setstate(python)
        np.random.set_state(numpy)
