"""Quantized weights, which are stored packed and in pieces: what each is, and its tensors.

What the schemes write is in docs/formats.md#quantized-weights.
"""

from .config import QuantConfig, read_config
from .find import PackedWeights, find_packed
from .weights import Weight

__all__ = ["PackedWeights", "QuantConfig", "Weight", "find_packed", "read_config"]
