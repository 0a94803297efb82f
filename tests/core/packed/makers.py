"""Small models in each layout of quantized weights, by hand from the rules in docs/formats.md.

A maker writes a folder as Hugging Face lays it out (weights, and the config that says how they are
quantized) and gives back the shapes that the weights had before.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]
Shape = tuple[int, ...]
F16, F32, U8, I32 = torch.float16, torch.float32, torch.uint8, torch.int32
if not hasattr(torch, "float8_e8m0fnu"):
    pytest.skip("torch 2.7 has float8_e8m0fnu", allow_module_level=True)
E4M3, E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
HIDDEN, INNER, WORDS = 64, 128, 96
# What is quantized in a layer, by its logical shape.
LINEAR = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "mlp.up_proj": (INNER, HIDDEN),
    "mlp.down_proj": (HIDDEN, INNER),
}


def linear() -> dict[str, Shape]:
    return {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in LINEAR.items()}


def plain() -> Tensors:
    """What none of them quantizes."""
    norms = {f"model.layers.{i}.input_layernorm.weight": torch.ones(HIDDEN) for i in range(2)}
    return {
        "model.embed_tokens.weight": torch.zeros(WORDS, HIDDEN, dtype=F16),
        **norms,
        "model.norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": torch.zeros(WORDS, HIDDEN, dtype=F16),
    }


def written(
    folder: Path, tensors: Tensors, config: dict[str, Any] | None, metadata: Any = None
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    whole = {name: one.contiguous() for name, one in {**plain(), **tensors}.items()}
    save_file(whole, folder / "model.safetensors", metadata)
    if config is not None:
        model = {"model_type": "llama", **config}
        (folder / "config.json").write_text(json.dumps(model))
    return folder


def gptq(folder: Path, bits: int = 4, group: int = 32, config: bool = True) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.qweight": torch.zeros(width * bits // 32, out, dtype=I32),
            f"{name}.qzeros": torch.zeros(width // group, out * bits // 32, dtype=I32),
            f"{name}.scales": torch.zeros(width // group, out, dtype=F16),
            f"{name}.g_idx": torch.arange(width, dtype=I32) // group,
        }
    said = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": False}
    written(folder, tensors, {"quantization_config": said} if config else None)
    return linear()


def awq(folder: Path, bits: int = 4, group: int = 32, config: bool = True) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.qweight": torch.zeros(width, out * bits // 32, dtype=I32),
            f"{name}.qzeros": torch.zeros(width // group, out * bits // 32, dtype=I32),
            f"{name}.scales": torch.zeros(width // group, out, dtype=F16),
        }
    said = {"quant_method": "awq", "bits": bits, "group_size": group, "version": "gemm"}
    written(folder, tensors, {"quantization_config": said} if config else None)
    return linear()


def _groups(**weights: Any) -> dict[str, Any]:
    """compressed-tensors' config of one group."""
    group = {"targets": ["Linear"], "weights": weights}
    said = {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}}
    return {"quantization_config": {**said, "ignore": ["lm_head"]}}


def pack_quantized(
    folder: Path, bits: int = 4, group: int | None = 32, width: int = HIDDEN, config: bool = True
) -> dict[str, Shape]:
    """``width`` may be one that does not fill its words."""
    shapes = {name: (out, width) for name, (out, _) in linear().items()}
    tensors: Tensors = {}
    for name, (out, inputs) in shapes.items():
        groups = math.ceil(inputs / group) if group else 1
        packed = torch.zeros(out, math.ceil(inputs * bits / 32), dtype=I32)
        tensors |= {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": torch.zeros(out, groups, dtype=F16),
            f"{name}.weight_shape": torch.tensor([out, inputs]),
        }
    strategy = {"strategy": "group", "group_size": group} if group else {"strategy": "channel"}
    said = _groups(num_bits=bits, type="int", symmetric=True, **strategy)
    written(folder, tensors, said if config else None)
    return shapes


def nvfp4(folder: Path) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.weight_packed": torch.zeros(out, width // 2, dtype=U8),
            f"{name}.weight_scale": torch.zeros(out, width // 16, dtype=F32).to(E4M3),
            f"{name}.weight_global_scale": torch.ones(1),
            f"{name}.input_global_scale": torch.ones(1),
        }
    said = _groups(num_bits=4, type="float", strategy="tensor_group", group_size=16)
    written(folder, tensors, said)
    return linear()


def modelopt(folder: Path) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.weight": torch.zeros(out, width // 2, dtype=U8),
            f"{name}.weight_scale": torch.zeros(out, width // 16, dtype=F32).to(E4M3),
            f"{name}.weight_scale_2": torch.ones(()),
            f"{name}.input_scale": torch.ones(()),
        }
    written(folder, tensors, {"quantization_config": {"quant_method": "modelopt"}})
    return linear()


def int8(folder: Path) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.weight": torch.zeros(out, width, dtype=torch.int8),
            f"{name}.weight_scale": torch.zeros(out, 1, dtype=F16),
        }
    written(folder, tensors, _groups(num_bits=8, type="int", strategy="channel"))
    return linear()


def fp8(folder: Path) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.weight": torch.zeros(out, width).to(E4M3),
            f"{name}.weight_scale": torch.zeros(1, dtype=F32),
            f"{name}.input_scale": torch.zeros(1, dtype=F32),
        }
    written(folder, tensors, _groups(num_bits=8, type="float", strategy="tensor"))
    return linear()


def fp8_blocks(folder: Path, config: bool = True) -> dict[str, Shape]:
    """DeepSeek's: a scale a block of 32 x 32, the last ones shorter."""
    shapes = {name: (out, width - 8) for name, (out, width) in linear().items()}
    tensors: Tensors = {}
    for name, (out, width) in shapes.items():
        tensors |= {
            f"{name}.weight": torch.zeros(out, width).to(E4M3),
            f"{name}.weight_scale_inv": torch.zeros(math.ceil(out / 32), math.ceil(width / 32)),
        }
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    written(folder, tensors, {"quantization_config": said} if config else None)
    return shapes


def fp4_experts(folder: Path) -> dict[str, Shape]:
    """DeepSeek's fp4 experts: two to an int8, with exponents as scales."""
    name = "model.layers.0.ffn.experts.0.w1"
    tensors = {
        f"{name}.weight": torch.zeros(INNER, HIDDEN // 2, dtype=torch.int8),
        f"{name}.scale": torch.zeros(INNER, HIDDEN // 32).to(E8M0),
    }
    said = {"quant_method": "fp8", "weight_block_size": [32, 32]}
    written(folder, tensors, {"quantization_config": said, "expert_dtype": "fp4"})
    return {name: (INNER, HIDDEN)}


def mxfp4(folder: Path) -> dict[str, Shape]:
    """gpt-oss: all experts of a layer in one tensor."""
    shapes: dict[str, Shape] = {}
    tensors: Tensors = {}
    for i in range(2):
        experts = f"model.layers.{i}.mlp.experts"
        for name, out, width in (("gate_up_proj", INNER, HIDDEN), ("down_proj", HIDDEN, INNER)):
            shapes[f"{experts}.{name}"] = (4, out, width)
            tensors |= {
                f"{experts}.{name}_blocks": torch.zeros(4, out, width // 32, 16, dtype=U8),
                f"{experts}.{name}_scales": torch.zeros(4, out, width // 32, dtype=U8),
                f"{experts}.{name}_bias": torch.zeros(4, out, dtype=torch.bfloat16),
            }
    written(folder, tensors, {"quantization_config": {"quant_method": "mxfp4"}})
    return shapes


def bnb_4bit(folder: Path, kind: str = "nf4", config: bool = True) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, shape in linear().items():
        numel = math.prod(shape)
        state = {"quant_type": kind, "blocksize": 64, "dtype": "float16", "shape": list(shape)}
        said = torch.tensor([*json.dumps(state).encode()], dtype=U8)
        tensors |= {
            f"{name}.weight": torch.zeros(numel // 2, 1, dtype=U8),
            f"{name}.weight.absmax": torch.zeros(numel // 64, dtype=U8),
            f"{name}.weight.quant_map": torch.zeros(16),
            f"{name}.weight.nested_absmax": torch.zeros(1),
            f"{name}.weight.nested_quant_map": torch.zeros(256),
            f"{name}.weight.quant_state.bitsandbytes__{kind}": said,
        }
    quantization = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    written(folder, tensors, {"quantization_config": quantization} if config else None)
    return linear()


def bnb_8bit(folder: Path) -> dict[str, Shape]:
    tensors: Tensors = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}.weight": torch.zeros(out, width, dtype=torch.int8),
            f"{name}.SCB": torch.zeros(out),
            f"{name}.weight_format": torch.zeros((), dtype=U8),
        }
    quantization = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    written(folder, tensors, {"quantization_config": quantization})
    return linear()


def torchao(folder: Path, metadata: bool = True) -> dict[str, Shape]:
    """Its layout in safetensors, of Int4Tensor."""
    tensors: Tensors = {}
    about: dict[str, Any] = {}
    for name, (out, width) in linear().items():
        tensors |= {
            f"{name}._weight_qdata": torch.zeros(out, width // 2, dtype=U8),
            f"{name}._weight_scale": torch.zeros(width // 32, out, dtype=torch.bfloat16),
            f"{name}._weight_zero_point": torch.zeros(width // 32, out, dtype=torch.bfloat16),
        }
        about[f"{name}.weight"] = {
            "_type": "Int4Tensor",
            "_data": {"block_size": [1, 32], "shape": [out, width]},
            "_tensor_data_names": ["qdata", "scale", "zero_point"],
        }
    about |= {name: {"_type": "Tensor"} for name in plain()}
    texts = {name: json.dumps(one) for name, one in about.items()}
    texts["tensor_names"] = json.dumps([*about])
    written(folder, tensors, None, texts if metadata else None)
    return linear()


# Each with the label of its weights and what a weight takes, in bits with its scales.
LAYOUTS: dict[str, tuple[Callable[[Path], dict[str, Shape]], str]] = {
    "gptq": (gptq, "int4 gptq g32"),
    "gptq 8": (lambda folder: gptq(folder, 8, 64), "int8 gptq"),
    "gptq 3": (lambda folder: gptq(folder, 3), "int3 gptq g32"),
    "awq": (awq, "int4 awq g32"),
    "pack-quantized": (pack_quantized, "int4 pack-quantized g32"),
    "pack-quantized 8": (lambda f: pack_quantized(f, 8, None), "int8 pack-quantized"),
    "pack-quantized 3": (lambda f: pack_quantized(f, 3, None, 50), "int3 pack-quantized"),
    "nvfp4": (nvfp4, "nvfp4 g16"),
    "modelopt": (modelopt, "nvfp4 g16"),
    "int8": (int8, "int8"),
    "fp8": (fp8, "fp8"),
    "fp8 blocks": (fp8_blocks, "fp8 32x32"),
    "fp4 experts": (fp4_experts, "fp4 g32"),
    "mxfp4": (mxfp4, "mxfp4 g32"),
    "bnb 4-bit": (bnb_4bit, "nf4 bnb g64"),
    "bnb 8-bit": (bnb_8bit, "int8 bnb"),
    "torchao": (torchao, "int4 torchao g32"),
}
