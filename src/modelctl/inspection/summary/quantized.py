"""The quantized weights among others: how many, what they are, what they take."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from ...core.nodes import Composite
from ...core.packed import PackedWeights, Weight
from ...core.tensors import TensorRef
from ...core.text import count, some


class Quantized(NamedTuple):
    """``schemes`` counts the weights by label (``int4 gptq g128``), ``params`` their logical
    elements, ``nbytes`` all their pieces; ``sources`` are what says so, None in it where names and
    shapes alone do."""

    schemes: Mapping[str, int]
    params: int
    nbytes: int
    sources: tuple[str | None, ...]

    @classmethod
    def of(cls, weights: Iterable[Weight]) -> Quantized | None:
        """None where there are none."""
        return cls.sum(
            cls({one.label: 1}, one.numel, one.nbytes, (one.known_from,)) for one in weights
        )

    @classmethod
    def sum(cls, several: Iterable[Quantized | None]) -> Quantized | None:
        schemes: dict[str, int] = {}
        sources: dict[str | None, None] = {}
        params = nbytes = 0
        for one in several:
            if one is None:
                continue
            for label, n in one.schemes.items():
                schemes[label] = schemes.get(label, 0) + n
            sources.update(dict.fromkeys(one.sources))
            params += one.params
            nbytes += one.nbytes
        return cls(schemes, params, nbytes, tuple(sources)) if schemes else None

    @property
    def bits(self) -> float | None:
        """What an element takes on average, with its share of the scales."""
        return 8 * self.nbytes / self.params if self.params else None

    @property
    def inferred(self) -> bool:
        return None in self.sources

    def as_dict(self) -> dict[str, Any]:
        return {
            "schemes": dict(self.schemes),
            "weights": sum(self.schemes.values()),
            "params": self.params,
            "bytes": self.nbytes,
            "bits_per_weight": self.bits,
            "known_from": [one for one in self.sources if one is not None],
            "inferred": self.inferred,
        }

    def __str__(self) -> str:
        labels = [
            label if len(self.schemes) == 1 else f"{label} ({n:,})"
            for label, n in self.schemes.items()
        ]
        return f"{count(sum(self.schemes.values()), 'weight')} in {some(labels, 4)}"

    @property
    def known(self) -> str:
        """What says so."""
        sources = [one for one in self.sources if one is not None]
        if not sources:
            return "~ inferred from names and shapes"
        others = ", of others ~ inferred" if self.inferred else ""
        return f"known from {some(sources)}{others}"


def pieces(packed: PackedWeights, tensors: Mapping[str, TensorRef | Composite]) -> dict[str, int]:
    """Elements of what belongs to quantized weights and is no parameter, by what it is."""
    found: dict[str, int] = {}
    for name, ref in tensors.items():
        piece = packed.piece(name)
        if piece not in (None, "packed") and isinstance(ref, TensorRef):
            found[str(piece)] = found.get(str(piece), 0) + ref.numel
    return found
