"""Find the quantized weights among the tensors of a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..names import role_of
from ..nodes import Composite, Global, attributes, mapping
from ..nodes import Obj as Object
from ..tensors import TensorRef
from ..tree import Path, walk
from .config import QuantConfig
from .schemes import SCHEMES, Context, Scheme, torchao_element
from .weights import Layout, Weight

# How a name ends that only a piece has: where none does there is nothing to look for.
_ENDS = ("scales", "SCB", ".absmax", "_scale", "_scale_inv", "_qdata", "scale_and_zero", ".scale")
_EXPONENTS = "float8_e8m0fnu"


@dataclass(frozen=True)
class PackedWeights:
    """The quantized weights of a model by name, and the weight that each of their tensors is of.

    ``scales`` are tensors that can be nothing but scales, of no weight that is known.
    """

    weights: Mapping[str, Weight] = field(default_factory=dict)
    of: Mapping[str, Weight] = field(default_factory=dict)
    scales: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.weights or self.scales)

    def piece(self, name: str) -> str | None:
        """What a tensor is to a quantized weight (``packed``, ``scale``); None: to none."""
        weight = self.of.get(name)
        if weight is not None:
            return weight.pieces[name]
        return "scale" if name in self.scales else None

    def role(self, name: str, ref: TensorRef) -> tuple[str, bool]:
        """(role, inferred) as :func:`modelctl.core.names.role_of`; of a piece what it is."""
        piece = self.piece(name)
        if piece is None:
            return role_of(name, ref)
        weight = self.of.get(name)
        return piece, weight is not None and weight.known_from is None

    def parameters(self, tensors: Mapping[str, TensorRef]) -> dict[str, TensorRef]:
        """Those that are (or seem to be) parameters; of a quantized weight the packed one alone."""
        return {
            name: ref
            for name, ref in tensors.items()
            if self.role(name, ref)[0] in ("parameter", "packed")
        }

    def unpacked(self, entries: Mapping[str, Any]) -> dict[str, Any]:
        """A model's entries under the names and with the shapes that they would have unquantized,
        for who compares these: what stands for a quantized weight has no values of its own."""
        found: dict[str, Any] = {}
        for name, node in entries.items():
            weight = self.of.get(name)
            if weight is None or not isinstance(node, TensorRef):
                if name not in self.scales:
                    found[name] = node
            elif weight.name not in found:
                one = entries.get(weight.packed, node)
                found[weight.name] = one.replace(
                    shape=weight.shape, stride=(0,) * len(weight.shape), role="parameter"
                )
        return found


def find_packed(
    entries: Mapping[str, Any],
    config: QuantConfig | None = None,
    metadata: Mapping[str, str] | None = None,
) -> PackedWeights:
    """The quantized weights among the entries of a state_dict.

    ``config`` is what the model's config says of them, ``metadata`` what the file keeps beside its
    tensors (torchao says there what each one is).
    """
    weights: dict[str, Weight] = {}
    of: dict[str, Weight] = {}
    tensors = {name: node for name, node in entries.items() if isinstance(node, TensorRef)}
    if any(name.endswith(_ENDS) for name in tensors):
        for name in tensors:
            if name in of:
                continue
            weight = _weight(name, tensors, config, metadata or {})
            if weight is not None and weight.name not in weights:
                weights[weight.name] = weight
                of.update(dict.fromkeys(weight.pieces, weight))
    for name, node in entries.items():
        if isinstance(node, Composite):
            wrapped = _wrapped(name, node)
            if wrapped is not None:
                weights[name] = of[name] = wrapped
    scales = (n for n, ref in tensors.items() if ref.dtype.name == _EXPONENTS and n not in of)
    return PackedWeights(weights, of, frozenset(scales))


def _weight(
    name: str,
    tensors: Mapping[str, TensorRef],
    config: QuantConfig | None,
    metadata: Mapping[str, str],
) -> Weight | None:
    """The weight whose elements are in this tensor; None where they are in none."""
    at = name.rfind(".") + 1
    module, last = name[:at], name[at:]
    for scheme in SCHEMES:
        own = _called(last, scheme.packed)
        if own is None:
            continue
        full = {
            said: said.replace("{m}", module).replace("{a}", own)
            for said in (scheme.packed, *scheme.others)
        }
        if not any(full[said] in tensors for said in scheme.sure):
            continue
        if scheme.packed == "{m}{a}" and config is not None and config.ignores(module[:-1]):
            continue
        found = {said: tensors[text] for said, text in full.items() if text in tensors}
        about = _about(metadata.get(module + own)) if scheme.name == "torchao" else {}
        layout = scheme.layout(found, Context(module[:-1], config, about))
        if layout is None:
            continue
        roles = {scheme.packed: "packed", **scheme.others}
        return Weight(
            module + own,
            scheme.name,
            layout,
            {full[said]: roles[said] for said in found},
            sum(ref.nbytes for ref in found.values()),
            _known_from(scheme, config, about, found),
        )
    return None


def _called(last: str, packed: str) -> str | None:
    """What the weight is called in its module, by the last part of a name; None where the scheme's
    packed tensor is not called so."""
    before, attribute, after = packed.removeprefix("{m}").partition("{a}")
    if not attribute:
        return "weight" if last == before else None
    own = last[len(before) : len(last) - len(after)]
    return own if own and last == before + own + after else None


def _known_from(
    scheme: Scheme, config: QuantConfig | None, about: Mapping[str, Any], found: Mapping[str, Any]
) -> str | None:
    if about:
        return "the file's metadata"
    if config is not None and config.method in scheme.methods:
        return config.source
    return "the quant_state" if any(".quant_state." in said for said in found) else None


def _about(text: str | None) -> Mapping[str, Any]:
    """What torchao's metadata say of one tensor."""
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _wrapped(name: str, node: Composite) -> Weight | None:
    """A tensor of one of torchao's classes, as it was pickled."""
    cls = next((arg for arg in node.args if isinstance(arg, Global) and _of_torchao(arg)), None)
    if cls is None:
        return None
    state: dict[str, Any] = {}
    for arg in _states(node):
        state.update({str(key): value for key, value in arg.items()})
    kind = cls.name.rpartition(".")[2]
    named = {k: v.name if isinstance(v, Global) else v for k, v in state.items()}
    element, bits = torchao_element(kind, named) or (kind, None)
    block: Any = named.get("block_size")
    wide = bool(node.shape) and block is not None
    group = block[-1] if wide and isinstance(block, list | tuple) and block else block
    if not isinstance(group, int) or (node.shape and group == node.shape[-1]):
        group = None
    nbytes = sum(ref.nbytes for _, ref in parts_of(node))
    layout = Layout(node.shape, element, bits, group)
    return Weight(name, "torchao", layout, {name: "packed"}, nbytes, "its class")


def parts_of(node: Composite) -> Iterator[tuple[Path, TensorRef]]:
    """The plain tensors in one of these, however deep they are."""
    return ((path, ref) for path, ref in walk(node) if isinstance(ref, TensorRef))


def _of_torchao(cls: Global) -> bool:
    return cls.module.partition(".")[0] == "torchao"


def _states(node: Composite) -> Iterator[Mapping[Any, Any]]:
    """What the object's attributes would be."""
    state = node.args[3] if len(node.args) > 3 else None
    for part in state if isinstance(state, tuple) else (state,):
        found = attributes(part) if isinstance(part, Object) else mapping(part)
        if found:
            yield found
