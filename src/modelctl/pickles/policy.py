"""What a pickle may call without running anything (docs/safety.md#pickles).

This judges what would happen if *somebody else* unpickled the file; modelctl itself calls
nothing that a file names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..core.checkpoint import Finding
from ..core.nodes import Global, Obj
from .names import is_built_by_torch, is_known_enum, is_of_libraries, is_of_script, judge_name

_REBUILDS = (
    "_rebuild_tensor",
    "_rebuild_tensor_v2",
    "_rebuild_tensor_v3",
    "_rebuild_parameter",
    "_rebuild_parameter_with_state",
    "_rebuild_qtensor",
    "_rebuild_sparse_tensor",
    "_rebuild_sparse_csr_tensor",
    "_rebuild_meta_tensor_no_storage",
    "_rebuild_nested_tensor",
    "_rebuild_wrapper_subclass",
    "_rebuild_device_tensor_from_cpu_tensor",
    "_rebuild_device_tensor_from_numpy",
    "_rebuild_xla_tensor",
)

_CALLABLE: dict[str, tuple[str, ...]] = {
    "torch._utils": _REBUILDS,
    "torch._tensor": ("_rebuild_from_type_v2",),
    "torch.tensor": ("_rebuild_from_type_v2",),
    "torch": ("Size", "device"),
    "torch.serialization": ("_get_layout",),
    "torch.torch_version": ("TorchVersion",),  # a text
    "torch.jit._pickle": (
        *("build_intlist", "build_tensorlist", "build_doublelist", "build_boollist"),
        *("build_tensor_from_id", "restore_type_tag"),
    ),
    "torch.nn.parameter": (
        *("Parameter", "Buffer", "UninitializedParameter", "UninitializedBuffer"),
    ),
    "torch.nn.backends.thnn": ("_get_thnn_function_backend",),  # in every module up to torch 1.3
    "torch.nested._internal.nested_tensor": ("_rebuild_njt", "NestedTensor"),
    "torch._dynamo.decorators": ("_DimRange",),
    "torch.distributed.checkpoint.metadata": (
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "TensorProperties"),
        *("ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING"),
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    **dict.fromkeys(
        ("torch.distributed.tensor._dtensor_spec", "torch.distributed._tensor._dtensor_spec"),
        ("DTensorSpec", "TensorMeta", "ShardOrderEntry"),
    ),
    **dict.fromkeys(
        ("torch.distributed.tensor.placement_types", "torch.distributed._tensor.placement_types"),
        ("Shard", "Replicate", "Partial", "_Partial", "_StridedShard"),
    ),
    "torch.distributed.device_mesh": ("DeviceMesh",),
    "torch.distributed._mesh_layout": ("_MeshLayout", "_FlatLayout"),
    "torch.distributed._shard.sharded_tensor.metadata": (
        *("TensorProperties", "MEM_FORMAT_ENCODING", "ShardedTensorMetadata"),
    ),
    "torch.distributed._shard.sharded_tensor.shard": ("Shard",),
    "torch.distributed._shard.metadata": ("ShardMetadata",),
    "torch.distributed._shard.sharding_spec.chunk_sharding_spec": ("ChunkShardingSpec",),
    "torch.distributed._shard.sharding_spec.api": ("EnumerableShardingSpec",),
    "torch.distributed.remote_device": ("_remote_device",),
    "functools": ("partial",),
    "collections": ("OrderedDict", "defaultdict", "Counter", "deque"),
    "builtins": (
        *("set", "frozenset", "complex", "slice", "range", "bytearray", "bytes", "dict", "list"),
        *("tuple", "int", "float", "bool", "str", "object"),
    ),
    "_codecs": ("encode",),
    "_io": ("BytesIO",),  # bytes
    "copyreg": ("_reconstructor",),
    "argparse": ("Namespace",),
    "types": ("SimpleNamespace",),
    "pathlib": ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath"),
    "pathlib._local": ("Path", "PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath"),
    "datetime": ("datetime", "date", "time", "timedelta", "timezone"),
    "decimal": ("Decimal",),
    "fractions": ("Fraction",),
    "uuid": ("UUID",),
    "numpy": ("dtype", "ndarray"),
    "numpy.core.multiarray": ("scalar", "_reconstruct"),
    "numpy._core.multiarray": ("scalar", "_reconstruct"),
    "numpy.core.numeric": ("_frombuffer",),
    "numpy._core.numeric": ("_frombuffer",),
    "numpy.random._pickle": ("__randomstate_ctor", "__generator_ctor", "__bit_generator_ctor"),
    "numpy.random.bit_generator": ("__pyx_unpickle_SeedSequence", "SeedSequence"),
    "numpy.random._mt19937": ("MT19937",),
    "numpy.random._pcg64": ("PCG64", "PCG64DXSM"),
    "numpy.random._philox": ("Philox",),
    "numpy.random._sfc64": ("SFC64",),
}
MAY_CALL = frozenset(Global(module, name) for module, names in _CALLABLE.items() for name in names)


def _is_regex(args: tuple[Any, ...]) -> bool:
    """A pattern and flags: compiling them runs nothing."""
    return (
        len(args) == 2
        and isinstance(args[0], str | bytes)
        and type(args[1]) is int
        and len(args[0]) <= _MOST_PATTERN
    )


def _is_logger(args: tuple[Any, ...]) -> bool:
    return all(isinstance(name, str) for name in args) and len(args) <= 1


def _is_generic(args: tuple[Any, ...]) -> bool:
    """``typing.Tuple[int, str]``: names of types behind a name of ``typing``."""
    if len(args) != 2 or not isinstance(args[0], Global) or "." in args[0].name:
        return False
    return args[0].module == "typing" and all(
        one is None or isinstance(one, Global | Obj | str)
        for one in (args[1] if isinstance(args[1], tuple) else args[1:])
    )


def _is_none(args: tuple[Any, ...]) -> bool:
    """``type(None)``, as in ``Optional[int]``."""
    return args == (None,)


# Enums of torch's that say how a tensor lies: in a DCP folder's metadata.
_LAYOUTS = (
    Global("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
    Global("torch.distributed._shard.sharded_tensor.metadata", "MEM_FORMAT_ENCODING"),
)


# A class in a class, which protocol 2 has no other way to name: in what FSDP1 saves.
_IN_CLASS = (
    Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor"),
    "ProcessGroupState",
)

_GETS_IT = (Global("builtins", "getattr"), _IN_CLASS)


def _is_layout(args: tuple[Any, ...]) -> bool:
    """A member of such an Enum as the first Pythons 3.11 wrote it: by its name; a class in one."""
    return args == _IN_CLASS or (
        len(args) == 2
        and args[0] in _LAYOUTS
        and isinstance(args[1], str)
        and args[1].startswith("TORCH_")
    )


_MOST_PATTERN = 1000
# Harmless where their arguments are what they are meant to be.
MAY_CALL_WITH: dict[Global, Callable[[tuple[Any, ...]], bool]] = {
    Global("re", "_compile"): _is_regex,
    Global("builtins", "getattr"): _is_layout,
    Global("logging", "getLogger"): _is_logger,
    Global("_operator", "getitem"): _is_generic,
    Global("operator", "getitem"): _is_generic,
    Global("builtins", "type"): _is_none,
}

# Callables of the list above that call or construct some of their arguments: which, and how.
_PASSED_ON: dict[tuple[str, str], tuple[tuple[int, str], ...]] = {
    ("copyreg", "_reconstructor"): ((0, "NEWOBJ"), (1, "NEWOBJ")),
    ("collections", "defaultdict"): ((0, "NEWOBJ"),),
    ("functools", "partial"): ((0, "NEWOBJ"),),
    ("numpy.random._pickle", "__randomstate_ctor"): ((0, "NEWOBJ"), (1, "REDUCE")),
    ("numpy.random._pickle", "__generator_ctor"): ((0, "NEWOBJ"), (1, "REDUCE")),
    ("numpy.random._pickle", "__bit_generator_ctor"): ((0, "NEWOBJ"),),
    ("numpy.random.bit_generator", "__pyx_unpickle_SeedSequence"): ((0, "NEWOBJ"),),
}
_FROM_TYPE = {
    Global(module, "_rebuild_from_type_v2") for module in ("torch._tensor", "torch.tensor")
}
_MOST_NESTED = 4


def judge_global(name: Global, offset: int) -> Finding | None:
    """What it means that a pickle names something, called or not; None where that is no finding,
    as of what may be called with some arguments and is called so."""
    if name in MAY_CALL:
        return None
    return judge_name(name, offset)


def judge_call(func: Any, opcode: str, offset: int) -> Finding | None:
    """What calling ``func`` (REDUCE, INST, OBJ) or constructing it (NEWOBJ) would mean."""
    if not isinstance(func, Global):
        if opcode == "NEWOBJ" and isinstance(func, Obj) and (func.func, func.args) == _GETS_IT:
            return None
        return Finding("dangerous", "computed-call", "calls a computed value", "?", opcode, offset)
    if func in MAY_CALL:
        return None
    name = str(func)
    if "." in func.name:
        return Finding("dangerous", "dotted-call", f"calls {name}", name, opcode, offset)
    builds = opcode in ("NEWOBJ", "NEWOBJ_EX")
    if builds and is_of_script(func):
        return None
    if builds and is_built_by_torch(func):
        return Finding("suspicious", "custom-class", f"builds {name}", name, opcode, offset)
    if builds and not is_of_libraries(func):
        return Finding("suspicious", "custom-class", f"builds {name}", name, opcode, offset)
    return Finding("dangerous", "call", f"calls {name}", name, opcode, offset)


def judge(func: Any, args: Any, opcode: str, offset: int) -> Finding | None:
    """As :func:`judge_call`, with the arguments: some harmless callables call those."""
    found = judge_call(func, opcode, offset)
    if opcode == "REDUCE" and isinstance(func, Global) and isinstance(args, tuple):
        known = MAY_CALL_WITH.get(func)
        if known is not None and known(args):
            return None
        if is_known_enum(func) and len(args) == 1 and type(args[0]) in (str, int):
            return Finding(
                "suspicious", "custom-class", f"builds {func}", str(func), opcode, offset
            )
    for _ in range(_MOST_NESTED):
        if found is not None or not isinstance(args, tuple) or not isinstance(func, Global):
            return found
        if func not in _FROM_TYPE:
            break
        if len(args) != 4:
            return None
        func, args = args[0], args[2]  # it calls its first argument with its third
        found = judge_call(func, "REDUCE", offset)
    else:
        return Finding("dangerous", "call", f"calls {func} in itself", str(func), opcode, offset)
    for index, how in _PASSED_ON.get((func.module, func.name), ()):
        if index < len(args) and isinstance(args[index], Global):
            one = judge_call(args[index], how, offset)
            if one is not None and (found is None or one.level == "dangerous"):
                found = one
    return found


def judge_subclass(cls: Global, offset: int) -> Finding | None:
    """What it means that a tensor becomes one of ``cls``, a subclass of torch.Tensor."""
    if cls.module.partition(".")[0] == "torch":
        return None
    return judge_call(cls, "NEWOBJ", offset)


def judge_state(func: Any, state: Any, opcode: str, offset: int) -> Finding | None:
    """What setting ``state`` on what ``func`` made would mean."""
    name = planted(state)
    if name is not None:
        what = f"sets {name[:100]} of an object"
        return Finding("dangerous", "dunder-state", what, name[:200], opcode, offset)
    if func == Global("functools", "partial") and isinstance(state, tuple) and state:
        return judge_call(state[0], "NEWOBJ", offset)  # a partial's state says what it calls
    return None


def planted(state: Any) -> str | None:
    """A ``__*__`` attribute that a state would set: it changes what an object is."""
    for part in state if isinstance(state, tuple) else (state,):
        for name in part if isinstance(part, dict) else ():
            if isinstance(name, str) and name.startswith("__") and name.endswith("__"):
                return name
    return None
