"""How a rank says which part of a tensor it holds: DTensor's mesh and placements
(torch/distributed/tensor/_utils.py), ShardedTensor's list of shards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

from ...core.dtypes import DType
from ...core.nodes import Composite, Global, Obj, attributes, mapping
from ...core.numbers import numbers
from ...core.tensors import TensorRef
from ...errors import ModelctlError, UnreadableError, UnsupportedError
from .metadata import torch_size

_DTENSOR = {
    Global(module, "DTensor")
    for module in (
        *("torch.distributed.tensor", "torch.distributed.tensor._api"),
        *("torch.distributed._tensor", "torch.distributed._tensor.api"),
    )
}
_SHARDED = Global("torch.distributed._shard.sharded_tensor.api", "ShardedTensor")
_FROM_TYPE = "_rebuild_from_type_v2"
_MOST_RANKS = 1 << 20
_CONTRADICTIONS = (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError)


class Held(NamedTuple):
    """A box of a tensor that one rank holds."""

    offsets: tuple[int, ...]
    ref: TensorRef


class Sharded(NamedTuple):
    """What one rank says of a tensor: the whole's dtype and shape, and what it holds of it."""

    dtype: DType
    shape: tuple[int, ...]
    held: Sequence[Held]


def is_sharded(node: Any) -> bool:
    """Whether it is a part of a tensor of several ranks."""
    inner = _plain(node)
    return inner is not None and (inner.args[1] in _DTENSOR or inner.args[1] == _SHARDED)


def sharded(node: Composite, rank: int) -> Sharded:
    """What ``rank`` holds of a tensor.

    Raises:
        UnreadableError: it contradicts itself.
        UnsupportedError: a placement that is not known, or of sums that are still to be made.
    """
    inner = _plain(node)
    assert inner is not None
    of = _of_sharded_tensor if inner.args[1] == _SHARDED else _of_dtensor
    try:
        return of(inner, rank)
    except _CONTRADICTIONS as e:
        raise UnreadableError(f"a part of a tensor that does not say which: {e!r:.100}") from None


def ranks_of(node: Composite) -> int | None:
    """How many ranks share a tensor; None where it does not say."""
    inner = _plain(node)
    assert inner is not None
    try:
        spec = attributes(_fields(inner)["_spec"])
        return int(_table(attributes(spec["mesh"])).size)
    except (*_CONTRADICTIONS, ModelctlError):
        return None


def _plain(node: Any) -> Composite | None:
    """The wrapped tensor itself, where a parameter wraps it."""
    while isinstance(node, Composite) and isinstance(node.func, Global):
        if node.func.name == _FROM_TYPE and len(node.args) == 4:
            return node if isinstance(node.args[1], Global) else None
        node = node.args[0] if node.args else None
    return None


def _of_dtensor(node: Composite, rank: int) -> Sharded:
    fields = _fields(node)
    local, spec = fields["_local_tensor"], attributes(fields["_spec"])
    if not isinstance(local, TensorRef):
        raise UnsupportedError(
            "a DTensor over a tensor that is no plain one",
            hint="torch.distributed.checkpoint.save writes a folder that can be read",
        )
    sizes, at = _mesh(attributes(spec["mesh"]), rank)
    dims = _splits(spec["placements"], len(sizes))
    offsets, shape = [0] * len(node.shape), list(node.shape)
    for mesh_dim, dim in dims:
        size, count = shape[dim], sizes[mesh_dim]
        each = -(-size // count)  # as torch.chunk
        low = min(at[mesh_dim] * each, size)
        offsets[dim] += low
        shape[dim] = min(each, size - low)
    if tuple(shape) != local.shape:
        raise UnreadableError(
            f"rank {rank} would hold {shape} of a tensor of {list(node.shape)}, "
            f"and holds {list(local.shape)}: is the file another rank's?"
        )
    return Sharded(node.dtype, node.shape, [Held(tuple(offsets), local)])


def _fields(node: Composite) -> dict[Any, Any]:
    """The attributes of a DTensor."""
    fields: dict[Any, Any] = {}
    for part in node.args[3] if isinstance(node.args[3], tuple) else (node.args[3],):
        fields.update(mapping(part) or {})
    return fields


def _splits(placements: Any, dims: int) -> list[tuple[int, int]]:
    """Which dimension of the mesh splits which of the tensor, in the order in which they do: from
    left to right, but those that are strided after the ones on their right."""
    first: list[tuple[int, int]] = []
    after: list[tuple[int, int]] = []
    if not isinstance(placements, tuple | list) or len(placements) != dims:
        raise ValueError("placements")
    for i, one in enumerate(placements):
        kind = one.func.name
        if kind == "Replicate":
            continue
        if kind not in ("Shard", "_StridedShard"):
            raise UnsupportedError(
                f"a tensor that is {kind} over its ranks",
                hint="redistribute it before it is saved, or save with "
                "torch.distributed.checkpoint",
            )
        dim = attributes(one)["dim"] if attributes(one) else one.args[0]
        (after if kind == "_StridedShard" else first).append((i, dim))
    return first + after[::-1]


def _mesh(mesh: Mapping[Any, Any], rank: int) -> tuple[list[int], list[int]]:
    """The sizes of a mesh of ranks, and where in it a rank is."""
    import numpy as np

    ranks = _table(mesh)
    found = np.argwhere(ranks == rank)
    if len(found) != 1:
        raise UnreadableError(f"rank {rank} is not in the mesh of {ranks.size} ranks")
    return list(ranks.shape), [int(n) for n in found[0]]


def _table(mesh: Mapping[Any, Any]) -> Any:
    """The ranks of a mesh, in its shape."""
    import numpy as np

    table = mesh.get("mesh", mesh.get("_mesh"))
    if isinstance(table, TensorRef):
        return _integers(table).reshape(table.shape)
    axes = [attributes(axis) for axis in attributes(mesh["_layout"])["axes"]]
    index: Any = np.zeros(1, dtype=np.int64)
    for axis in axes:  # each is some sizes, with the steps in the map of ranks that they make
        for size, step in zip(axis["shape"], axis["stride"], strict=True):
            if not 0 < size * index.size <= _MOST_RANKS:
                raise ValueError("a mesh of too many ranks")
            index = (index[:, None] + np.arange(size) * step).reshape(-1)
    ranks = _integers(mesh["_rank_map"])[index]
    return ranks.reshape([prod(axis["shape"]) for axis in axes])


def _integers(ref: TensorRef) -> Any:
    if ref.numel > _MOST_RANKS or ref.dtype.kind != "int":
        raise ValueError("no ranks")
    return numbers(ref.tobytes(), ref.dtype)


def _of_sharded_tensor(node: Composite, rank: int) -> Sharded:
    state = node.args[3]
    if isinstance(state, Obj):
        raise ValueError("state")
    held = []
    for shard in state[0]:
        fields = attributes(shard)
        about = attributes(fields["metadata"])
        offsets, sizes = about["shard_offsets"], about["shard_sizes"]
        ref = fields["tensor"]
        if not isinstance(ref, TensorRef) or list(ref.shape) != list(sizes):
            raise ValueError("shard_sizes")
        held.append(Held(torch_size(offsets), ref))
    return Sharded(node.dtype, node.shape, held)
