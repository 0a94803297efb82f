"""Multiply-accumulates (MACs) of a forward, operator by operator, at torch's dispatcher.

Counted is what the field counts (torchvision's published figures, fvcore, timm): matrix products
and convolutions, whoever calls them: modules, attention, einsum, functions. A MAC is one
multiplication and one addition, so two FLOPs. By the same convention element-wise operators, norms,
pooling, reductions and what only moves data have none. What is neither is uncounted, and said so.

The formulas are those of ``torch.utils.flop_counter``, and the few below that it lacks or takes
long for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

_FREE = frozenset(
    """
    _aminmax _assert_async _assert_tensor_metadata _chunk_cat _conj_copy _ctc_loss
    _cummax_helper _cummin_helper _functional_assert_async _functional_assert_scalar
    _is_all_true _is_any_true _lazy_clone _linalg_check_errors _logcumsumexp _masked_scale
    _masked_softmax _sample_dirichlet _stack _standard_gamma _transform_bias_rescale_qkv
    _unsafe_index_put
    _unsafe_masked_index_put_accumulate _upsample_lanczos2d_aa addr alias_copy as_strided_copy
    binomial block_diag cauchy detach_copy dist floor_divide histogram is_pinned is_same_size
    lift_fresh_copy linalg_cross linspace logspace lu_unpack multi_margin_loss
    multilabel_margin_loss_forward native_norm nonzero_static polar range record_stream resize_as
    rsub segment_reduce t_copy transpose_copy unique_dim_consecutive unsafe_split
    unsafe_split_with_sizes view_as_complex_copy view_as_real_copy
    _cudnn_init_dropout_state _efficientzerotensor _fused_dropout _fused_rms_norm _index_put_impl
    _local_scalar_dense _log_softmax _log_softmax_backward_data _nested_tensor_from_mask
    _pack_padded_sequence _pad_packed_sequence _pin_memory _prelu_kernel _reshape_alias
    _reshape_copy _resize_output _safe_softmax _softmax _sparse_coo_tensor_unsafe
    _thnn_fused_gru_cell _thnn_fused_lstm_cell _to_copy _unique _unique2 _unsafe_index
    _unsafe_masked_index _unsafe_view
    _upsample _weight_norm_interface
    affine_grid_generator alias all allclose amax amin aminmax any argmax argmin argsort as_strided
    as_strided_scatter avg_pool1d avg_pool2d avg_pool3d bernoulli bincount binary_cross_entropy
    binary_cross_entropy_with_logits broadcast_tensors bucketize cat channel_shuffle clone col2im
    combinations complex concat constant_pad_nd contiguous copy count_nonzero cross cummax cummin
    cumprod cumsum detach diag diag_embed diagonal_copy diagonal_scatter diff dropout
    embedding embedding_bag _embedding_bag _embedding_bag_forward_only embedding_renorm empty_like
    equal expand_copy exponential eye fill flatten flip fmod fractional_max_pool2d
    fractional_max_pool3d full_like gather geometric glu grid_sampler_2d grid_sampler_3d hardsigmoid
    hardswish hardtanh histc huber_loss im2col index index_add index_copy index_fill index_put
    index_reduce index_select isin item kl_div kthvalue l1_loss
    lift lift_fresh linalg_vector_norm log_normal log_sigmoid_forward logcumsumexp logsumexp
    masked_fill masked_scatter masked_select max max_pool2d_with_indices max_pool3d_with_indices
    max_unpool2d max_unpool3d mean median min mode mse_loss multinomial nan_to_num nanmedian
    nansum narrow_copy native_batch_norm native_dropout native_group_norm native_layer_norm
    _native_batch_norm_legit _native_batch_norm_legit_no_training _batch_norm_with_update
    _batch_norm_no_update batch_norm cudnn_batch_norm miopen_batch_norm
    new_empty new_empty_strided new_full new_ones new_zeros nll_loss_forward nll_loss2d_forward
    nonzero norm normal one_hot ones_like permute_copy pixel_shuffle pixel_unshuffle poisson
    prelu prod put quantile rand_like randint_like randn_like random reflection_pad1d
    reflection_pad2d reflection_pad3d renorm repeat repeat_interleave replication_pad1d
    replication_pad2d replication_pad3d resize roll rot90 rrelu_with_noise scalar_tensor scatter
    scatter_add scatter_reduce searchsorted select_copy select_scatter set slice_copy
    slice_scatter smooth_l1_loss soft_margin_loss softplus softshrink sort split_copy
    split_with_sizes_copy squeeze_copy stack std std_mean sum sym_numel sym_size sym_stride
    sym_storage_offset take topk trace tril
    threshold triu unsafe_chunk unsafe_split unsafe_split_with_sizes
    unbind_copy unfold unfold_copy uniform unique_consecutive unique_dim unsqueeze_copy
    upsample_bicubic2d upsample_bilinear2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa
    upsample_linear1d upsample_nearest1d _upsample_nearest_exact1d upsample_nearest2d
    _upsample_nearest_exact2d upsample_nearest3d _upsample_nearest_exact3d upsample_trilinear3d
    var var_mean view_copy where zero zeros_like
    _adaptive_avg_pool2d _adaptive_avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d
    adaptive_avg_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    """.split()  # noqa: SIM905
)
# pooling of boxes, and choosing among them
_FREE_OF_TORCHVISION = frozenset(
    f"torchvision::{name}"
    for name in ("nms", "ps_roi_align", "ps_roi_pool", "roi_align", "roi_pool")
)


def _mv(matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _addmv(_: Tensor, matrix: Tensor, vector: Tensor, **__: Any) -> int:
    return 2 * matrix.numel()


def _dot(a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel()


def _mm(a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _addmm(_: Tensor, a: Tensor, b: Tensor, **__: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _grouped_mm(a: Tensor, b: Tensor, *_: Any, **__: Any) -> int:
    """Of experts: each row of a 2-d ``a``, or column of a 2-d ``b``, is of one group alone."""
    if a.dim() == 3 and b.dim() == 2:
        return 2 * a.shape[1] * b.numel()
    return 2 * a.numel() * b.shape[-1]


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Queries by keys, and what comes of that by values; heads may share keys and values."""
    return 2 * prod(query.shape[:-1]) * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _conv_tbc(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    return 2 * out_val.numel() * weight.shape[0] * weight.shape[1]


def _deform_conv2d(_: Tensor, weight: Tensor, *__: Any, out_val: Tensor, **___: Any) -> int:
    """As a convolution; where it reads from is pooling."""
    return 2 * out_val.numel() * prod(weight.shape[1:])


def _trilinear(
    a: Tensor, b: Tensor, c: Tensor, xa: list[int], xb: list[int], xc: list[int], *_: Any, **__: Any
) -> int:
    """nn.Bilinear: a MAC for each of all combinations of indices."""
    dims = len(xa) + a.dim()
    shapes = []
    for tensor, expanded in ((a, xa), (b, xb), (c, xc)):
        shape = list(tensor.shape)
        for dim in sorted(expanded):
            shape.insert(dim, 1)
        shapes.append(shape)
    return 2 * prod(max(shape[i] for shape in shapes) for i in range(dims))


_OWN: dict[str, Callable[..., int]] = {
    "aten::mv": _mv,
    "aten::addmv": _addmv,
    "aten::dot": _dot,
    "aten::vdot": _dot,
    **dict.fromkeys(("aten::mm", "aten::bmm", "aten::_int_mm"), _mm),
    **dict.fromkeys(
        ("aten::addmm", "aten::baddbmm", "aten::addbmm", "aten::_addmm_activation"), _addmm
    ),
    "aten::_grouped_mm": _grouped_mm,
    **dict.fromkeys(
        (
            "aten::_scaled_dot_product_attention_math_for_mps",
            "aten::_scaled_dot_product_cudnn_attention",
            "aten::_scaled_dot_product_efficient_attention",
            "aten::_scaled_dot_product_flash_attention",
            "aten::_scaled_dot_product_flash_attention_for_cpu",
            "aten::_scaled_dot_product_fused_attention_overrideable",
        ),
        _attention,
    ),
    "aten::_trilinear": _trilinear,
    "aten::conv_tbc": _conv_tbc,
    "torchvision::deform_conv2d": _deform_conv2d,
}


@cache
def formula(op: Any) -> Callable[..., int] | None:
    """FLOPs of an operator from its arguments and ``out_val``; None where there is no formula."""
    known: Any = flop_registry
    for packet in _packets(op):
        if _name(packet) in _OWN:
            return _OWN[_name(packet)]
        found: Callable[..., int] | None = known.get(packet)
        if found is not None:
            of_shapes = getattr(found, "__wrapped__", None)
            return found if of_shapes is None else _of_shapes(of_shapes)
    return None


def _of_shapes(formula: Callable[..., int]) -> Callable[..., int]:
    """A formula of torch's that takes shapes for tensors, without torch's slow way to them."""

    def flops(*args: Any, out_val: Any, **kwargs: Any) -> int:
        named = {name: _shape(value) for name, value in kwargs.items()}
        return formula(*map(_shape, args), out_shape=_shape(out_val), **named)

    return flops


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape
    return type(value)(map(_shape, value)) if type(value) in (list, tuple) else value


@cache
def is_free(op: Any) -> bool:
    """Whether an operator has no MACs by the convention."""
    if _name(op).startswith("prim::") or _name(op) in _FREE_OF_TORCHVISION:
        return True
    if not any("Tensor" in str(argument.type) for argument in op._schema.arguments):
        return True  # a factory
    for packet in _packets(op):
        if _name(packet).startswith("aten::") and packet.__name__ in _FREE:
            return True
        overloads = [getattr(packet, name) for name in packet.overloads()]
        if any(torch.Tag.pointwise in one.tags or _is_view(one) for one in overloads):
            return True
    return False


def _packets(op: Any) -> list[Any]:
    """An operator in all its overloads; after it, of one in place, that which is not."""
    packet = op._overloadpacket
    namespace, _, name = _name(op).partition("::")
    plain = getattr(getattr(torch.ops, namespace), name[:-1], None) if name.endswith("_") else None
    return [packet] if plain is None else [packet, plain]


def _name(op: Any) -> str:
    return str(getattr(op, "_qualified_op_name", None) or op._schema.name)


def _is_view(op: Any) -> bool:
    aliases = [returned.alias_info for returned in op._schema.returns]
    return bool(aliases) and all(one is not None and not one.is_write for one in aliases)
