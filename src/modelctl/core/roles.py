"""What a state_dict doesn't say and its names and shapes suggest: parameters, buffers, layers."""

from __future__ import annotations

from .tensors import Role, TensorRef

# Buffers of torch's and torchvision's own modules that are floating, like parameters.
STATISTICS = frozenset(("running_mean", "running_var", "num_batches_tracked"))
_BUFFERS = STATISTICS | {"inv_freq", "attn_mask", "relative_coords_table", "n_averaged"}
_INTEGER_WEIGHTS = ("weight", "qweight")


def role_of(name: str, ref: TensorRef) -> tuple[Role, bool]:
    """(role, inferred): whether a tensor is a parameter or a buffer.

    Known where the file says so (a whole module, a ``keep_vars`` state_dict); else running
    statistics and integer tensors that are no weights are taken for buffers.
    """
    if ref.role is not None:
        return ref.role, False
    last = name.rpartition(".")[2]
    if last in _BUFFERS or not (ref.dtype.is_floating or last in _INTEGER_WEIGHTS):
        return "buffer", True
    return "parameter", True


def parameters(tensors: dict[str, TensorRef]) -> dict[str, TensorRef]:
    """Those that are (or seem to be) parameters, in order."""
    return {name: ref for name, ref in tensors.items() if role_of(name, ref)[0] == "parameter"}
