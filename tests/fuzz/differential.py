"""What torch makes of a file under ``weights_only``, beside what modelctl does."""

from __future__ import annotations

import io
import warnings
from typing import Any

import torch

from modelctl.core.dtypes import BY_NAME
from modelctl.core.tensors import TensorRef
from modelctl.core.tree import walk
from modelctl.files import read_place
from modelctl.storage.places import Place


def differs(data: bytes) -> str | None:
    """How tensors differ of a file that modelctl reads and torch loads; None where they don't, or
    torch refuses it."""
    from .targets import Bytes

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception:  # whatever torch has to say
        return None
    theirs = dict(_tensors(loaded))
    with read_place(Place("x.pt", source=Bytes("x.pt", data))) as ckpt:
        ours = {
            tuple(map(str, path)): node
            for path, node in walk(ckpt.root)
            if isinstance(node, TensorRef) and node.rebuild is None
        }
        for path, ref in ours.items():
            values = theirs.get(path)
            if values is None or ref.nbytes > 1 << 20:
                continue  # of what is no plain container the paths are others
            if str(values.dtype) != f"torch.{ref.dtype}" or tuple(values.shape) != ref.shape:
                return f"torch: {values.dtype} {tuple(values.shape)}, here {ref}"
            if ref.dtype.name not in BY_NAME or values.layout != torch.strided:
                continue
            raw = values.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if raw != ref.tobytes():
                return f"torch has other bytes of {'.'.join(path)}"
    return None


def _tensors(node: Any, path: tuple[str, ...] = (), depth: int = 0) -> Any:
    if depth > 20:
        return
    if isinstance(node, torch.Tensor):
        yield path, node
    elif isinstance(node, dict):
        for key, value in node.items():
            yield from _tensors(value, (*path, str(key)), depth + 1)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _tensors(value, (*path, str(i)), depth + 1)
