"""How each ATen operation carries channel labels from its inputs to its outputs.

A rule takes the tracer and the call. Rules never look at values, only at shapes and arguments, and where they
are not sure they freeze. To support a new operation, write a rule and name it in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import torch

from prunegym.pruning.tracing.cutting_rules import cut, index, index_along, pick
from prunegym.pruning.tracing.layer_rules import convolution
from prunegym.pruning.tracing.movement_rules import (
    concatenate,
    expand,
    flip,
    nothing,
    pad,
    permute,
    pixel_shuffle,
    pixel_unshuffle,
    repeat,
    restride,
    same,
    stack,
    unfold,
    view,
)
from prunegym.pruning.tracing.norm_rules import (
    batch_norm,
    group_norm,
    layer_norm,
    reduction,
    softmax,
    spatial,
    weight_norm,
)
from prunegym.pruning.tracing.product_rules import attention, linear, matrix_product
from prunegym.pruning.tracing.rule_parts import met
from prunegym.pruning.tracing.tracer import Call, TensorRecord, Tracer

Rule: TypeAlias = Callable[[Tracer, Call], None]


def rule_for(func: Any) -> Rule | None:
    """The rule of an ATen operation, or None if there is none."""
    name = str(func._schema.name).removeprefix("aten::")
    rule = RULES.get(name) or RULES.get(name.removesuffix("_"))
    if rule is None and (torch.Tag.pointwise in func.tags or _is_pointwise(name.removesuffix("_"))):
        return pointwise
    return rule


@cache
def _is_pointwise(name: str) -> bool:
    """In-place variants are not always tagged; what holds for ``hardswish`` holds for ``hardswish_``."""
    packet = getattr(torch.ops.aten, name, None)
    return packet is not None and any(
        torch.Tag.pointwise in getattr(packet, overload).tags for overload in packet.overloads()
    )


def pointwise(tracer: Tracer, call: Call) -> None:
    """Sum, product, activation, ...: labels that meet at one element become one."""
    tensors = [tensor for tensor in call.tensors if tensor.ndim <= call.output.ndim]
    records = [tracer.record(tensor) for tensor in tensors]
    parts = [(one.fields, tuple(tensor.shape), one.origin) for one, tensor in zip(records, tensors, strict=True)]
    fields = met(tracer, call, parts, call.output.ndim)
    origin = next((record.origin for record in records if not record.fields), "a tensor made inside forward")
    parameter = bool(records) and all(record.parameter for record in records)
    tracer.set(call.output, TensorRecord(fields, origin, parameter))


_MATRIX = ("mm", "bmm", "addmm", "baddbmm")
_NORMS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
    "batch_norm",
)
_SPATIAL = (
    *("max_pool1d", "max_pool2d", "max_pool2d_with_indices", "max_pool3d_with_indices", "mkldnn_max_pool2d"),
    *(
        "avg_pool1d",
        "avg_pool2d",
        "avg_pool3d",
        "_adaptive_avg_pool2d",
        "_adaptive_avg_pool3d",
        "adaptive_avg_pool1d",
    ),
    *(
        "adaptive_max_pool2d",
        "adaptive_max_pool3d",
        "upsample_nearest2d",
        "upsample_bilinear2d",
        "upsample_bicubic2d",
    ),
    *("_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "reflection_pad2d", "replication_pad2d"),
)
_REDUCTIONS = (
    "mean",
    "sum",
    "amax",
    "amin",
    "max",
    "min",
    "var",
    "std",
    "var_mean",
    "linalg_vector_norm",
    "norm",
)
_SAME = (
    *("clone", "contiguous", "detach", "alias", "_to_copy", "to", "lift_fresh", "lift_fresh_copy"),
    *("dropout", "native_dropout"),
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
_FACTORIES = (
    *("arange", "zeros", "ones", "empty", "full", "scalar_tensor", "rand", "randn", "linspace", "eye"),
    *("new_zeros", "new_ones", "new_empty", "new_full", "zeros_like", "ones_like", "empty_like", "full_like"),
    *("fill", "zero", "normal", "uniform", "bernoulli", "rand_like", "randn_like"),
)

# element-wise, but not tagged so by PyTorch
_POINTWISE = (
    "hardswish",
    "hardsigmoid",
    "mish",
    "log_sigmoid_forward",
    "rrelu",
    "prelu",
    "_prelu_kernel",
    "celu",
)

RULES: dict[str, Rule] = {
    "convolution": convolution,
    "cat": concatenate,
    "constant_pad_nd": pad,
    "as_strided": restride,
    "expand": expand,
    "linear": linear,
    "native_layer_norm": layer_norm,
    "native_group_norm": group_norm,
    "_fused_rms_norm": layer_norm,
    "_weight_norm_interface": weight_norm,
    "index": index,
    "repeat": repeat,
    "flip": flip,
    "stack": stack,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "im2col": unfold,
    **dict.fromkeys(("_softmax", "_safe_softmax", "_log_softmax", "softmax", "log_softmax"), softmax),
    **dict.fromkeys(("index_select", "gather", "roll", "cumsum", "topk"), index_along),
    **dict.fromkeys(_POINTWISE, pointwise),
    **dict.fromkeys(_MATRIX, matrix_product),
    **dict.fromkeys(_NORMS, batch_norm),
    **dict.fromkeys(_SPATIAL, spatial),
    **dict.fromkeys(_REDUCTIONS, reduction),
    **dict.fromkeys(_SAME, same),
    **dict.fromkeys(_ATTENTION, attention),
    **dict.fromkeys(_FACTORIES, nothing),
    **dict.fromkeys(("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "_reshape_alias"), view),
    **dict.fromkeys(("permute", "transpose", "t"), permute),
    **dict.fromkeys(("slice", "split", "split_with_sizes"), cut),
    **dict.fromkeys(("select", "unbind"), pick),
}
