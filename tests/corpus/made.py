"""The project's own corpus: what makes each file, and what torch itself sees in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import nn

import modelctl as mc

Seen = dict[str, tuple[str, list[int], str]]
Tensors = Iterable[tuple[str, torch.Tensor]]


class Maker(NamedTuple):
    """Makes a file in an empty folder and says where.

    ``kind`` is what people call the file; ``plain`` says that ``torch.load`` takes it with
    ``weights_only=True``; ``needs`` is the library that has to be there; ``reads`` reads its
    tensors, where that is not what ``torch.load`` or ``safe_open`` does.
    """

    make: Callable[[Path], Path]
    kind: str
    plain: bool = True
    needs: str | None = None
    reads: Callable[[Path], Tensors] | None = None


MAKERS: dict[str, Maker] = {}


def makes(kind: str, **more: Any) -> Callable[[Callable[[Path], Path]], Callable[[Path], Path]]:
    """Registers a function as a :class:`Maker` under its own name."""

    def register(make: Callable[[Path], Path]) -> Callable[[Path], Path]:
        assert make.__name__ not in MAKERS
        MAKERS[make.__name__] = Maker(make, kind, **more)
        return make

    return register


def bare(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes, row-major, gathered by torch."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def tensors(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor under its full path: dict keys, list indices, attributes; a whole module's by
    the names of its state_dict."""
    if isinstance(node, torch.Tensor):
        yield ".".join(path) or "<root>", node
    elif isinstance(node, nn.Module):
        for name, value in node.state_dict(keep_vars=True).items():
            if isinstance(value, torch.Tensor):
                yield ".".join((*path, name)), value
    elif isinstance(node, Mapping):
        for key, value in node.items():
            yield from tensors(value, (*path, str(key)))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from tensors(value, (*path, str(i)))
    elif hasattr(node, "__dict__") and not isinstance(node, type):
        yield from tensors(vars(node), path)


def described(found: Tensors) -> Seen:
    return {
        name: (
            str(t.dtype).removeprefix("torch."),
            list(t.shape),
            sha256(bare(t)),
        )
        for name, t in found
    }


def official(path: Path) -> Tensors:
    """What the library that wrote a file reads in it."""
    if path.suffix == ".safetensors":
        with safe_open(path, "pt") as opened:
            return [(name, opened.get_tensor(name)) for name in opened.keys()]  # noqa: SIM118
    return tensors(torch.load(path, weights_only=False, map_location="cpu"))


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Made:
    """A file of the project's own, and what is in it."""

    def __init__(self, name: str, folder: Path) -> None:
        maker = MAKERS[name]
        torch.manual_seed(0)
        self.path = maker.make(folder)
        self.kind = maker.kind
        self.seen = described((maker.reads or official)(self.path))

    def check(self, ckpt: mc.Checkpoint) -> None:
        """That a checkpoint has exactly these tensors, each to the byte."""
        assert self.seen == {
            name: (ref.dtype.name, list(ref.shape), sha256(ref.tobytes()))
            for name, ref in ckpt.tensors().items()
        }
