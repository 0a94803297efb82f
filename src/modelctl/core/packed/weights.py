"""One quantized weight: its logical shape, and the tensors that it is stored in."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import NamedTuple


class Layout(NamedTuple):
    """What the tensors of a weight say of it: its logical ``shape`` (out, in), what its elements
    are (int4, fp8, nf4) and their bits where that is known, how many have a scale in common: so
    many in a row, or a block; None where a whole row or tensor has."""

    shape: tuple[int, ...]
    element: str
    bits: int | None
    group: int | tuple[int, ...] | None = None


class Weight(NamedTuple):
    """A quantized weight.

    Attributes:
        name: what it would be called unquantized.
        scheme: who packed it so (gptq, awq, nvfp4, torchao).
        pieces: its tensors by name, and what each is: packed, scale, zero_point, group index, ….
        nbytes: of all of them.
        known_from: what says so (config.json, its metadata); None: inferred from names and shapes.
    """

    name: str
    scheme: str
    layout: Layout
    pieces: Mapping[str, str]
    nbytes: int
    known_from: str | None = None

    @property
    def module(self) -> str:
        return self.name.rpartition(".")[0]

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def numel(self) -> int:
        return prod(self.layout.shape)

    @property
    def packed(self) -> str:
        """The name of the tensor that holds its elements."""
        return next(name for name, role in self.pieces.items() if role == "packed")

    @property
    def label(self) -> str:
        """``int4 gptq g128``, ``nvfp4 g16``, ``fp8 128x128``."""
        element, group = self.layout.element, self.layout.group
        if element == self.scheme or self.scheme.endswith(element.removeprefix("fp")):
            words = [self.scheme]
        else:
            words = [element, self.scheme] if self.scheme else [element]
        if isinstance(group, tuple):
            words.append("x".join(map(str, group)))
        elif group is not None:
            words.append(f"g{group}")
        return " ".join(words)
