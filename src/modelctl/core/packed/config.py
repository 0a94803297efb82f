"""What a model's config says of its quantization (docs/formats.md#quantized-weights)."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from ...errors import ModelctlError
from ..storages import Storage
from .targets import Targets

# In the order in which they are asked, with the method of those that don't name it.
_FILES = {
    "config.json": None,
    "quantize_config.json": "gptq",
    "quant_config.json": "awq",
    "hf_quant_config.json": "modelopt",
}
_MOST = 16 << 20
# What makers call the list of modules that stayed as they were.
_IGNORED = ("ignore", "modules_to_not_convert", "llm_int8_skip_modules", "exclude_modules")


@dataclass(frozen=True)
class QuantConfig:
    """``method`` is the maker's name of the scheme, ``data`` what it says of it, ``source`` the
    file that says so; ``expert_dtype`` what a model's experts are in, where it differs."""

    method: str
    data: Mapping[str, Any]
    source: str
    expert_dtype: str | None = None

    def number(self, *names: str) -> int | None:
        """The first of these entries that is a whole number."""
        for name in names:
            value = self.data.get(name)
            if type(value) is int:
                return value
        return None

    @property
    def block(self) -> tuple[int, ...] | None:
        """The block that has one scale."""
        found = self.data.get("weight_block_size")
        whole = isinstance(found, list) and all(type(n) is int and n > 0 for n in found)
        return tuple(found or ()) if whole else None

    def of(self, module: str) -> Mapping[str, Any]:
        """What compressed-tensors' groups say of a module's weights; {} where none does."""
        by_class: Mapping[str, Any] = {}
        for weights, targets, has_class in self._groups:
            if targets.match(module):
                return weights
            if has_class:
                by_class = by_class or weights
        return by_class

    @cached_property
    def _groups(self) -> list[tuple[Mapping[str, Any], Targets, bool]]:
        """What each group says of weights, of which modules, and whether it names a class."""
        groups = self.data.get("config_groups")
        found: list[tuple[Mapping[str, Any], Targets, bool]] = []
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if isinstance(weights, dict):
                listed = group.get("targets")
                texts = listed if isinstance(listed, list) else []
                has_class = any(isinstance(one, str) and one.isidentifier() for one in texts)
                found.append((weights, Targets(listed), has_class))
        return found

    def ignores(self, module: str) -> bool:
        """Whether the module stayed as it was."""
        return any(targets.match(module) for targets in self._ignored)

    @cached_property
    def _ignored(self) -> list[Targets]:
        return [Targets(self.data.get(name)) for name in _IGNORED]


def read_config(beside: Mapping[str, Callable[[], Storage]]) -> QuantConfig | None:
    """What the files beside the weights say; None where they say nothing."""
    for name, method in _FILES.items():
        if name not in beside:
            continue
        try:
            storage = beside[name]()
            if storage.nbytes > _MOST:
                continue
            found = json.loads(b"".join(storage.chunks()))
        except (ModelctlError, ValueError, RecursionError):
            continue
        if isinstance(found, dict):
            config = _config(found, name, method)
            if config is not None:
                return config
    return None


def _config(found: dict[str, Any], source: str, method: str | None) -> QuantConfig | None:
    inner = found.get("text_config")
    places = [found, inner] if isinstance(inner, dict) else [found]
    data: Any = found if method else None
    for place in places:
        data = next(
            (
                place[key]
                for key in ("quantization_config", "compression_config", "quantization")
                if isinstance(place.get(key), dict)
            ),
            data,
        )
    if not isinstance(data, dict):
        return None
    named = data.get("quant_method") or method
    if not isinstance(named, str):
        return None
    experts = next((place["expert_dtype"] for place in places if "expert_dtype" in place), None)
    return QuantConfig(named, data, source, experts if isinstance(experts, str) else None)
