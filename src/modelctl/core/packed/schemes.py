"""The schemes that weights are packed by, a row each: how their tensors are called, and what these
say of the weight. Sources: docs/formats.md#quantized-weights.

In a name ``{m}`` is the module with its dot, ``{a}`` what the weight is called in it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from typing import Any, NamedTuple

from ...errors import ModelctlError
from ..tensors import TensorRef
from .config import QuantConfig
from .weights import Layout

# The tensors of one weight, by the names that the scheme's row has for them.
Pieces = Mapping[str, TensorRef]
_MOST_READ = 1 << 16


class Context(NamedTuple):
    """What is known of a weight beside its tensors: its module, the config, and what the file's
    metadata say about it."""

    module: str
    config: QuantConfig | None
    about: Mapping[str, Any]


class Scheme(NamedTuple):
    """``packed`` is the name of the tensor with the elements, ``others`` those beside it and what
    they are, ``sure`` those of which one has to be there; ``methods`` are what configs call it."""

    name: str
    packed: str
    others: Mapping[str, str]
    sure: tuple[str, ...]
    layout: Callable[[Pieces, Context], Layout | None]
    methods: tuple[str, ...]


def _words(ref: TensorRef, bits: int) -> int:
    """How many elements of so many bits a row of a packed tensor has room for."""
    return ref.shape[-1] * ref.dtype.itemsize * 8 // bits


def _group(width: int, groups: int) -> int | None:
    """How many elements in a row have a scale in common."""
    return -(-width // groups) if groups > 1 else None


def _may_be(bits: int | None) -> bool:
    return bits is not None and 1 <= bits <= 8


def _gptq(p: Pieces, given: Context) -> Layout | None:
    """Packed along the inputs: qweight (in * bits / 32, out), scales (groups, out), qzeros (groups,
    out * bits / 32), g_idx (in)."""
    q, scales, index = p["{m}qweight"], p["{m}scales"], p.get("{m}g_idx")
    zeros = p.get("{m}qzeros")
    if len(q.shape) != 2 or len(scales.shape) != 2 or _is_awq(p, given):
        return None
    rows, out = q.shape
    bits = given.config.number("bits") if given.config else None
    if index is not None and index.numel:
        bits = 32 * rows // index.numel
    elif zeros is not None and len(zeros.shape) == 2 and out:
        bits = 32 * zeros.shape[1] // out
    if bits is None or not _may_be(bits):
        return None
    width = index.numel if index is not None else 32 * rows // bits
    return Layout((out, width), f"int{bits}", bits, _group(width, scales.shape[0]))


def _is_awq(p: Pieces, given: Context) -> bool:
    """AWQ packs along the outputs, as its zero points; its g_idx would be a GPTQ's."""
    if given.config is not None and given.config.method in ("gptq", "awq"):
        return given.config.method == "awq"
    zeros, q = p.get("{m}qzeros"), p["{m}qweight"]
    alike = zeros is not None and zeros.shape[1:] == q.shape[1:]
    return alike and p["{m}scales"].shape[1:] != q.shape[1:] and "{m}g_idx" not in p


def _awq(p: Pieces, given: Context) -> Layout | None:
    """GEMM: qweight (in, out * bits / 32), scales (groups, out). GEMV: qweight (out, in * bits /
    32)."""
    q, scales = p["{m}qweight"], p["{m}scales"]
    if len(q.shape) != 2 or len(scales.shape) != 2 or not _is_awq(p, given):
        return None
    config = given.config
    bits = config.number("bits", "w_bit") if config else None
    if config is not None and str(config.data.get("version")).lower() == "gemv":
        bits = bits or 4
        size = config.number("group_size", "q_group_size")
        return Layout((q.shape[0], _words(q, bits)), f"int{bits}", bits, size)
    width, out = q.shape[0], scales.shape[1]
    bits = 32 * q.shape[1] // out if out else bits
    if bits is None or not _may_be(bits):
        return None
    return Layout((out, width), f"int{bits}", bits, _group(width, scales.shape[0]))


def _pack_quantized(p: Pieces, given: Context) -> Layout | None:
    """int32 along the inputs, the last ones filled up; ``weight_shape`` is the logical one."""
    q, scale = p["{m}{a}_packed"], p.get("{m}{a}_scale")
    if q.dtype.name != "int32" or not q.shape:
        return None
    said = given.config.of(given.module) if given.config else {}
    bits: Any = said.get("num_bits")
    if type(bits) is not int or not _may_be(bits):
        bits = None
    size = said.get("group_size")
    size = size if type(size) is int and size > 0 else None
    groups = scale.shape[-1] if scale is not None and scale.shape else 0
    width = None
    if bits and size and groups * size == _words(q, bits):
        width = groups * size
    elif "{m}{a}_shape" in p:  # numbers: what is filled up can't be told from the packed shape
        width = _last_of(p["{m}{a}_shape"])
    if bits is None and width:
        bits = next((n for n in (4, 8, *range(1, 8)) if -(-width * n // 32) == q.shape[-1]), None)
    if bits is None:
        return None
    if width is None or -(-width * bits // 32) != q.shape[-1]:
        width = _words(q, bits)
    return Layout((*q.shape[:-1], width), f"int{bits}", bits, size or _group(width, groups))


def _last_of(ref: TensorRef) -> int | None:
    if ref.dtype.name not in ("int64", "int32") or ref.numel < 2:
        return None
    try:
        return int(ref.numpy()[-1])
    except ModelctlError:  # it is for verify to say what is wrong with it
        return None


def _fp4(packed: str, scale: str, e8m0: bool) -> Callable[[Pieces, Context], Layout | None]:
    """Two to a byte along the inputs; ``e8m0``: the scales are exponents (MX), else fp8 (NVFP4)."""

    def layout(p: Pieces, given: Context) -> Layout | None:
        q, s = p[packed], p.get(scale)
        if s is None:
            return None
        exponents = s.dtype.name in ("uint8", "float8_e8m0fnu")
        if q.dtype.name not in ("uint8", "int8") or exponents != e8m0 or not s.shape:
            return None
        if not q.shape or len(s.shape) != len(q.shape):
            return None
        said = given.config.of(given.module) if given.config else {}
        bits = 6 if said.get("num_bits") == 6 else 4  # MXFP6: four to three bytes
        width = _words(q, bits)
        group = _group(width, s.shape[-1]) or width
        return Layout((*q.shape[:-1], width), f"fp{bits}", bits, group)

    return layout


def _blocks(p: Pieces, given: Context) -> Layout | None:
    """gpt-oss: blocks (…, groups, 16) of bytes with two elements, scales (…, groups)."""
    q, scales = p["{m}{a}_blocks"], p["{m}{a}_scales"]
    if q.dtype.name != "uint8" or len(q.shape) < 2 or scales.shape != q.shape[:-1]:
        return None
    return Layout((*q.shape[:-2], q.shape[-2] * q.shape[-1] * 2), "fp4", 4, q.shape[-1] * 2)


def _bnb_4bit(p: Pieces, given: Context) -> Layout | None:
    """Two to a byte, flat; the logical shape is in the quant_state, which is JSON in bytes."""
    q = p["{m}{a}"]
    kind = next((one for one in ("nf4", "fp4") if _state_of(one) in p), None)
    said = _json_in(p[_state_of(kind)]) if kind else {}
    shape = said.get("shape")
    whole = isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)
    if not whole or -(-prod(shape or ()) // 2) != q.nbytes:
        shape = [2 * q.nbytes]
    size = said.get("blocksize")
    if type(size) is not int and "{m}{a}.absmax" in p:
        size = _group(2 * q.nbytes, p["{m}{a}.absmax"].numel)
    return Layout(tuple(shape or ()), kind or "4-bit", 4, size)


def _state_of(kind: str) -> str:
    return f"{{m}}{{a}}.quant_state.bitsandbytes__{kind}"


def _json_in(ref: TensorRef) -> dict[str, Any]:
    if ref.dtype.name != "uint8" or ref.nbytes > _MOST_READ:
        return {}
    try:
        found = json.loads(ref.tobytes())
    except (ModelctlError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _bnb_8bit(p: Pieces, given: Context) -> Layout | None:
    q = p["{m}{a}"]
    return Layout(q.shape, "int8", 8) if q.dtype.name == "int8" else None


def _scaled(p: Pieces, given: Context) -> Layout | None:
    """fp8 and int8, an element a byte, with a scale for the tensor, a row, or a block."""
    q = p["{m}{a}"]
    names = ("{m}{a}_scale_inv", "{m}{a}_scale", "{m}scale")
    scale = next((p[name] for name in names if name in p), None)
    floats = q.dtype.name.startswith("float8_e") and q.dtype.name != "float8_e8m0fnu"
    config = given.config
    if scale is None or not (floats or q.dtype.name == "int8"):
        return None
    experts = config.expert_dtype if config and ".experts." in f".{given.module}." else None
    if not floats and experts == "fp4":
        width, groups = 2 * q.shape[-1], scale.shape[-1] if scale.shape else 1
        return Layout((*q.shape[:-1], width), "fp4", 4, _group(width, groups))
    group: Any = None
    if len(scale.shape) == len(q.shape) and len(q.shape) > 1 and scale.shape[-1] > 1:
        sizes = zip(q.shape[-2:], scale.shape[-2:], strict=True)
        block = tuple(_power(n, parts) for n, parts in sizes)
        group = block if block[0] > 1 else block[1]
        said = config.block if config else None
        if said is not None and len(said) == 2:
            group = said
    return Layout(q.shape, "fp8" if floats else "int8", 8, group)


def _power(size: int, parts: int) -> int:
    """The power of two that a dimension is cut by into so many parts, the last one shorter."""
    step = -(-size // max(parts, 1))
    return 1 << max(step - 1, 0).bit_length()


# The elements of torchao's classes: what they are, and bits.
_TORCHAO = {
    "Int4Tensor": ("int4", 4),
    "Int4TilePackedTo4dTensor": ("int4", 4),
    "Int4PlainInt32Tensor": ("int4", 4),
    "Int4PreshuffledTensor": ("int4", 4),
    "Int8Tensor": ("int8", 8),
    "Float8Tensor": ("fp8", 8),
    "NVFP4Tensor": ("fp4", 4),
}


def _torchao(p: Pieces, given: Context) -> Layout | None:
    q, scale = p["{m}_{a}_qdata"], p.get("{m}_{a}_scale")
    kind = given.about.get("_type")
    data = given.about.get("_data")
    data = data if isinstance(data, dict) else {}
    by_dtype = {"int8": ("int8", 8), "uint8": ("int4", 4), "int32": ("int4", 4)}
    element, bits = torchao_element(str(kind), data) or by_dtype.get(q.dtype.name, ("fp8", 8))
    shape: Any = data.get("shape")
    if isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape):
        pass
    elif q.dtype.name == "int32" and len(q.shape) == 4:
        # tiles of tensor cores: (out / 8, in / (16 * inner), 32, inner / 2)
        inner = 2 * q.shape[3]
        shape = (8 * q.shape[0], 16 * inner * q.shape[1])
    elif q.dtype.name in ("uint8", "int32") and q.shape:
        shape = (*q.shape[:-1], _words(q, bits))
    else:
        shape = q.shape
    size = _block(data, tuple(shape))
    if size is None and scale is not None and len(scale.shape) == 2 and kind is None:
        size = _group(shape[-1], scale.shape[-1] if scale.shape[0] == shape[0] else 1)
    return Layout(tuple(shape), element, bits, size)


def torchao_element(kind: str, data: Mapping[str, Any]) -> tuple[str, int] | None:
    """What the elements of one of torchao's classes are, and their bits; None for one that is not
    known. ``data`` are its attributes, in which a dtype is its name or ``{"_data": name}``."""
    said = data.get("target_dtype", data.get("elem_dtype"))
    named = said.get("_data") if isinstance(said, dict) else said
    digits = str(named).rpartition(".")[2].removeprefix("u")
    digits = digits.removeprefix("int").removeprefix("float").partition("_")[0]
    if kind in ("IntxUnpackedToInt8Tensor", "MXTensor") and digits.isdecimal():
        stem = "int" if kind.startswith("Int") else "fp"
        return f"{stem}{digits}", int(digits)
    return _TORCHAO.get(kind)


def _block(data: Mapping[str, Any], shape: tuple[int, ...]) -> int | tuple[int, ...] | None:
    block = data.get("block_size")
    if type(block) is int:
        return block
    whole = isinstance(block, list | tuple) and all(type(n) is int and n > 0 for n in block)
    if not whole or not block or (block[-1] == shape[-1] and len(block) == len(shape)):
        return None
    return block[-1] if all(n == 1 for n in block[:-1]) else tuple(block)


_ACTIVATIONS = {"{m}input_scale": "input scale", "{m}input_global_scale": "input scale"}
_SCALES = {"{m}{a}_scale": "scale", "{m}{a}_scale_2": "scale", "{m}{a}_global_scale": "scale"}
_PACKED = {
    **_SCALES,
    "{m}{a}_zero_point": "zero_point",
    "{m}{a}_shape": "shape",
    "{m}{a}_g_idx": "group index",
    **_ACTIVATIONS,
    "{m}input_zero_point": "zero_point",
}
_QWEIGHT = {"{m}scales": "scale", "{m}qzeros": "zero_point", "{m}g_idx": "group index"}
_CT = "compressed-tensors"
_MODELOPT = ("modelopt", "modelopt_fp4")

SCHEMES = (
    Scheme("gptq", "{m}qweight", _QWEIGHT, ("{m}scales",), _gptq, ("gptq", "auto-round")),
    Scheme("awq", "{m}qweight", _QWEIGHT, ("{m}scales",), _awq, ("awq", "auto-round")),
    Scheme(
        *("pack-quantized", "{m}{a}_packed", _PACKED, ("{m}{a}_scale",)),
        *(_pack_quantized, (_CT,)),
    ),
    Scheme(
        *("nvfp4", "{m}{a}_packed", _PACKED, ("{m}{a}_scale",)),
        *(_fp4("{m}{a}_packed", "{m}{a}_scale", False), (_CT,)),
    ),
    Scheme(
        *("mxfp4", "{m}{a}_packed", _PACKED, ("{m}{a}_scale",)),
        *(_fp4("{m}{a}_packed", "{m}{a}_scale", True), (_CT,)),
    ),
    Scheme(
        *("nvfp4", "{m}{a}", {**_SCALES, **_ACTIVATIONS}, ("{m}{a}_scale_2",)),
        *(_fp4("{m}{a}", "{m}{a}_scale", False), (_CT, *_MODELOPT)),
    ),
    Scheme(
        *("mxfp4", "{m}{a}_blocks", {"{m}{a}_scales": "scale"}, ("{m}{a}_scales",)),
        *(_blocks, ("mxfp4",)),
    ),
    Scheme(
        "bnb",
        "{m}{a}",
        {
            "{m}{a}.absmax": "scale",
            "{m}{a}.quant_map": "codebook",
            "{m}{a}.nested_absmax": "scale",
            "{m}{a}.nested_quant_map": "codebook",
            **{_state_of(kind): "quant_state" for kind in ("nf4", "fp4")},
        },
        ("{m}{a}.absmax",),
        *(_bnb_4bit, ("bitsandbytes",)),
    ),
    Scheme(
        *("bnb", "{m}{a}", {"{m}SCB": "scale", "{m}weight_format": "format"}, ("{m}SCB",)),
        *(_bnb_8bit, ("bitsandbytes",)),
    ),
    Scheme(
        "torchao",
        "{m}_{a}_qdata",
        {
            "{m}_{a}_scale": "scale",
            "{m}_{a}_zero_point": "zero_point",
            "{m}_{a}_scale_and_zero": "scale",
            "{m}_{a}_per_tensor_scale": "scale",
            "{m}_{a}_act_per_tensor_scale": "input scale",
            "{m}_{a}_act_pre_scale": "input scale",
        },
        ("{m}_{a}_scale", "{m}_{a}_scale_and_zero"),
        *(_torchao, ("torchao",)),
    ),
    Scheme(
        "",
        "{m}{a}",
        {
            "{m}{a}_scale_inv": "scale",
            **_SCALES,
            "{m}{a}_zero_point": "zero_point",
            "{m}scale": "scale",
            **_ACTIVATIONS,
        },
        ("{m}{a}_scale_inv", "{m}{a}_scale", "{m}scale"),
        *(_scaled, ("fp8", "fbgemm_fp8", _CT, "modelopt", "quark", "deepseek")),
    ),
)
