"""The states of all random number generators that a training draws from."""

from __future__ import annotations

import random
import warnings
from typing import Any

import numpy as np
import torch

from ..errors import RefusedError


def rng_state() -> dict[str, Any]:
    """The generators of torch (CPU, every CUDA device, MPS), Python's ``random`` and numpy's
    global one, as tensors, numbers and tuples that ``weights_only`` loads.

    numpy's is left out, with a warning, where it is not the MT19937 that it is by default.
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    mps = getattr(torch.backends, "mps", None)
    if mps is not None and mps.is_available():
        state["mps"] = torch.mps.get_rng_state()
    numpy = np.random.get_state(legacy=True)
    if isinstance(numpy, tuple) and numpy[0] == "MT19937":
        _, keys, pos, has_gauss, cached = numpy
        state["numpy"] = {
            # torch has had uint32 for too short a time
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "pos": int(pos),
            "has_gauss": int(has_gauss),
            "cached_gaussian": float(cached),
        }
    else:
        warnings.warn("numpy's global generator is not MT19937: not saved", stacklevel=3)
    return state


def check_rng(state: Any) -> None:
    """Raises RefusedError where a saved state is not what :func:`rng_state` gives."""
    try:
        for key in ("torch", "mps"):
            if key in state:
                _bytes(state[key])
        for device in state.get("cuda", ()):
            _bytes(device)
        if "python" in state:
            random.Random().setstate(_python(state["python"]))
        if "numpy" in state:
            np.random.RandomState().set_state(_numpy(state["numpy"]))
        if "torch" in state:
            torch.Generator().set_state(state["torch"])
    except (AttributeError, KeyError, TypeError, ValueError, IndexError, RuntimeError) as e:
        raise RefusedError(
            f"the checkpoint's rng is not one that save_checkpoint wrote: {e}",
            hint="resume(..., rng=False) leaves the generators as they are",
        ) from None


def restore_rng(state: dict[str, Any]) -> None:
    """Set the generators from a checked state; those of CUDA devices that are not here are left
    out with a warning."""
    if "cuda" in state and torch.cuda.is_available():
        here = torch.cuda.device_count()
        for i, device in enumerate(state["cuda"][:here]):
            torch.cuda.set_rng_state(device, i)
        if len(state["cuda"]) != here:
            warnings.warn(
                f"generators of {len(state['cuda'])} CUDA devices were saved, {here} are here: "
                "their random numbers will not go on as they would have",
                stacklevel=3,
            )
    if "mps" in state and torch.backends.mps.is_available():
        torch.mps.set_rng_state(state["mps"])
    if "python" in state:
        random.setstate(_python(state["python"]))
    if "numpy" in state:
        np.random.set_state(_numpy(state["numpy"]))
    if "torch" in state:
        torch.set_rng_state(state["torch"])


def _bytes(state: Any) -> None:
    if not isinstance(state, torch.Tensor) or state.dtype != torch.uint8:
        raise TypeError("a generator's state is no byte tensor")


def _python(state: Any) -> Any:
    version, numbers, gauss = state
    return version, tuple(numbers), gauss


def _numpy(state: Any) -> Any:
    keys = state["keys"].numpy().astype(np.uint32)
    return "MT19937", keys, state["pos"], state["has_gauss"], state["cached_gaussian"]
