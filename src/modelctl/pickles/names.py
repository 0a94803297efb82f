"""What a name in a pickle is (docs/safety.md#names): naming something is enough to have it called.

What may be called calls what it is handed (an attribute ``detach`` of a Namespace, the factory of a
defaultdict), so that no list of callables alone can hold. But nothing runs that is not named: so
every name is judged, wherever it stands, called or not. Allowed is what is data (a dtype, a
storage), what is harmless whoever calls it with whatever, and what :mod:`.policy` lets be called.
"""

from __future__ import annotations

import sys

from ..core.checkpoint import Finding
from ..core.dtypes import BY_NAME
from ..core.nodes import Global

_KINDS = ("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")
_STORAGES = (*_KINDS, "ComplexDouble", "ComplexFloat", "QInt8", "QUInt8", "QInt32", "QUInt4x2")
_SPARSE_MODULES = ("torch.sparse", "torch.cuda.sparse")
_OF_TENSORS = frozenset(f"{kind}Tensor" for kind in _KINDS)
_OF_STORAGES = frozenset(f"{kind}Storage" for kind in (*_STORAGES, "QUInt2x4"))

# Functions of tensors alone, that modules keep as attributes: their activations.
_ACTIVATIONS = frozenset(
    (
        *("relu", "relu_", "relu6", "elu", "selu", "celu", "gelu", "silu", "mish", "prelu"),
        *("leaky_relu", "rrelu", "glu", "sigmoid", "logsigmoid", "hardsigmoid", "hardswish"),
        *("hardtanh", "hardshrink", "softshrink", "tanh", "tanhshrink", "softplus", "softsign"),
        *("softmax", "log_softmax", "softmin", "threshold", "identity", "dropout", "normalize"),
        *("layer_norm", "batch_norm", "linear", "avg_pool1d", "avg_pool2d", "avg_pool3d"),
        *("adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d", "max_pool1d"),
        *("max_pool2d", "max_pool3d", "mse_loss", "l1_loss", "smooth_l1_loss", "cross_entropy"),
        *("nll_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "kl_div"),
        *("cosine_similarity", "pairwise_distance", "scaled_dot_product_attention"),
        *("sin", "cos", "exp", "log", "sqrt", "square", "abs", "sum", "mean", "max", "min"),
    )
)
_DATA: dict[str, frozenset[str]] = {
    "torch": frozenset(
        (
            *(one.name for one in BY_NAME.values()),
            *("complex32", "bcomplex32", "half", "float", "double", "long", "int", "short"),
            *("cfloat", "cdouble", "chalf", "qint8", "quint8", "qint32", "quint4x2", "quint2x4"),
            *(f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)),
            *("bits8", "bits16", "bits1x8", "bits2x4", "bits4x2"),
            *("strided", "sparse_coo", "sparse_csr", "sparse_csc", "sparse_bsr", "sparse_bsc"),
            *("jagged", "_mkldnn", "contiguous_format", "preserve_format", "channels_last"),
            *("channels_last_3d", "per_tensor_affine", "per_tensor_symmetric"),
            *("per_channel_affine", "per_channel_symmetric", "per_channel_affine_float_qparams"),
            *("Tensor", "dtype", "layout", "memory_format", "qscheme"),
            *_OF_TENSORS,
            *_OF_STORAGES,
            *_ACTIVATIONS,
        )
    ),
    "torch.cuda": _OF_TENSORS | _OF_STORAGES,
    **dict.fromkeys(_SPARSE_MODULES, _OF_TENSORS),
    "torch.storage": frozenset(
        ("UntypedStorage", "TypedStorage", "_UntypedStorage", "_TypedStorage")
    ),
    "torch.nn.functional": _ACTIVATIONS,
    "torch._C._nn": _ACTIVATIONS,
    "torch.distributed.tensor": frozenset(("DTensor",)),
    "torch.distributed._tensor": frozenset(("DTensor",)),
    "torch.distributed.tensor.api": frozenset(("DTensor",)),
    "torch.distributed._tensor.api": frozenset(("DTensor",)),
    "torch.distributed._shard.sharded_tensor.api": frozenset(("ShardedTensor",)),
    "torch.nested._internal.nested_tensor": frozenset(("NestedTensor",)),
    "builtins": frozenset(("abs", "len", "max", "min", "round", "sum")),
    "types": frozenset(("NoneType",)),
    "numpy": frozenset(
        (
            *("bool", "bool_", "generic", "number", "integer", "floating", "inexact"),
            *("signedinteger", "unsignedinteger", "complexfloating", "void", "object_"),
            *("str_", "bytes_", "datetime64", "timedelta64", "intp", "uintp", "intc", "uintc"),
            *("byte", "ubyte", "short", "ushort", "longlong", "ulonglong", "half", "single"),
            *("double", "longdouble", "csingle", "cdouble", "clongdouble"),
            *(f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)),
            *("float16", "float32", "float64", "float128", "complex64", "complex128"),
        )
    ),
}
# Modules whose classes do nothing: those with a capital, but these.
_CLASSES: dict[str, tuple[str, ...]] = {
    "typing": ("ForwardRef",),
    "builtins": (),
    "numpy.dtypes": (),
}

# Enums of frameworks: calling one with a value looks up its member, and its module is imported.
_ENUMS: dict[str, tuple[str, ...]] = {
    "transformers.trainer_utils": (
        *("SchedulerType", "IntervalStrategy", "EvaluationStrategy", "SaveStrategy"),
        *("HubStrategy", "FSDPOption", "ShardedDDPOption"),
    ),
    "transformers.training_args": ("OptimizerNames", "ParallelMode"),
    "transformers.debug_utils": ("DebugOption",),
    "accelerate.utils.dataclasses": (
        *("DistributedType", "PrecisionType", "RNGType", "ComputeEnvironment", "DynamoBackend"),
        *("SageMakerDistributedType", "LoggerType", "FP8BackendType", "CustomDtype"),
    ),
    "deepspeed.runtime.zero.config": ("ZeroStageEnum",),
    "deepspeed.runtime.zero.offload_config": ("OffloadDeviceEnum",),
    "megatron.core.enums": ("ModelType", "Fp8Recipe"),
    "megatron.core.transformer.enums": ("AttnBackend", "AttnMaskType", "AttnType", "LayerType"),
}

# What is installed with Python itself, or almost everywhere, and runs what it is handed.
_EVERYWHERE = frozenset(
    ("pip", "setuptools", "pkg_resources", "_distutils_hack", "wheel", "distutils", "IPython")
)
# Modules whose classes are built and given a state by every saved nn.Module and optimizer.
BUILT_BY_TORCH = ("torch.nn", "torch.optim", "torch.ao.nn")


def is_of_libraries(name: Global) -> bool:
    """Whether it is Python's, torch's or numpy's own: not a class of whoever saved the file."""
    top = name.module.partition(".")[0]
    known = top in sys.stdlib_module_names or top in _EVERYWHERE
    return (known and top != "__main__") or top in ("torch", "numpy", "")


def is_built_by_torch(name: Global) -> bool:
    """Whether it is a class of modules or of optimizers: their names begin with a capital, and
    those of functions that they import don't (``torch.optim.lr_scheduler.partial``)."""
    return name.name.lstrip("_")[:1].isupper() and any(
        name.module == one or name.module.startswith(f"{one}.") for one in BUILT_BY_TORCH
    )


def is_data(name: Global) -> bool:
    """Whether it does nothing, whoever calls it, and with whatever."""
    if name.name in _DATA.get(name.module, ()):
        return True
    but = _CLASSES.get(name.module)
    return but is not None and name.name[:1].isupper() and name.name not in but


def is_of_script(name: Global) -> bool:
    """Whether it is a class of TorchScript: its code is in the archive, no Python imports it."""
    return name.module.partition(".")[0] == "__torch__"


def is_known_enum(name: Global) -> bool:
    """Whether it is an Enum of a framework that many train with."""
    return name.name in _ENUMS.get(name.module, ())


def judge_name(name: Global, offset: int) -> Finding | None:
    """What it means that a pickle names something that may not be called; None for what is data,
    or a class that torch's modules and optimizers are made of."""
    if is_data(name) or is_of_script(name) or ("." not in name.name and is_built_by_torch(name)):
        return None
    what = f"names {name}"
    if is_of_libraries(name) or "." in name.name:
        return Finding("dangerous", "name", what, str(name), "GLOBAL", offset)
    return Finding("suspicious", "custom-name", what, str(name), "GLOBAL", offset)
