"""The random number generators that transformers' Trainer and accelerate keep beside a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch

from ...core.nodes import mapping
from ...errors import ModelctlError
from ...files import open as open_checkpoint
from ...pickles.arrays import as_tensor
from ..loading.values import live
from .part import Saved

# What each of them calls a generator, and what save_checkpoint does.
_CALLED = {
    "python": ("python", "random_state"),
    "numpy": ("numpy", "numpy_random_seed"),
    "torch": ("cpu", "torch_manual_seed"),
    "cuda": ("cuda", "torch_cuda_manual_seed"),
    "mps": ("mps",),
}


def rng_beside(saved: Saved, rank: int, world: int) -> dict[str, Any] | None:
    """The generators of a process, as ``save_checkpoint`` has them; None where none are beside the
    model.

    Raises:
        UnreadableError: the file can't be read.
        UnsupportedError: it holds an object that is none of theirs.
    """
    folder, origin = saved.ckpt.folder, saved.ckpt.origin
    if folder is None or origin is None:
        return None
    trainers = f"rng_state_{rank}.pth" if world > 1 else "rng_state.pth"
    name = next((n for n in (trainers, f"random_states_{rank}.pkl") if n in folder.beside), None)
    if name is None:
        return None
    with open_checkpoint(os.path.join(origin.path, name)) as ckpt:
        return _as_ours(mapping(ckpt.root) or {})


def _as_ours(found: Mapping[Any, Any]) -> dict[str, Any] | None:
    state: dict[str, Any] = {}
    for key, names in _CALLED.items():
        node = next((found[name] for name in names if name in found), None)
        if node is None:
            continue
        if key == "numpy":
            node = _numpy(node)
        state[key] = live(node, key)
    if isinstance(state.get("cuda"), torch.Tensor):  # of the one device that was used
        state.update(cuda=[state["cuda"]], cuda_device=0)
    if "numpy" in state:
        keys = state["numpy"]["keys"].numpy().astype("int64")
        state["numpy"]["keys"] = torch.from_numpy(keys)
    return state or None


def _numpy(node: Any) -> dict[str, Any]:
    """``numpy.random.get_state()``, whose array is no tensor in the tree."""
    try:
        kind, array, pos, has_gauss, gauss = node
        keys = as_tensor(array)
    except (TypeError, ValueError):
        kind = keys = None
    if kind != "MT19937" or keys is None:
        raise ModelctlError(
            "the state of numpy's generator is none of numpy.random.get_state()",
            hint="resume(..., rng=False) leaves the generators as they are",
        )
    named = {"keys": keys, "pos": pos, "has_gauss": has_gauss}
    return {**named, "cached_gaussian": gauss}
