"""How each ATen operation carries channel labels from its inputs to its outputs.

A rule takes the tracer and the call. Rules never look at values, only at shapes and arguments, and where they
are not sure they freeze. To support a new operation, write a rule and name it in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from prunegym.pruning.labels import Field, lifted, support
from prunegym.pruning.layer_rules import attention, convolution, matrix_product
from prunegym.pruning.movement_rules import concatenate, expand, nothing, pad, permute, piece, restride, same, view
from prunegym.pruning.rule_parts import freeze_others, labels_along, pass_on, where
from prunegym.pruning.tracer import Call, TensorRecord, Tracer

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
    fields = _met(tracer, tensors, call)
    records = [tracer.record(tensor) for tensor in tensors]
    origin = next((record.origin for record in records if not record.fields), "a tensor made inside forward")
    parameter = bool(records) and all(record.parameter for record in records)
    tracer.set(call.output, TensorRecord(fields, origin, parameter))


def _met(tracer: Tracer, tensors: list[Tensor], call: Call) -> list[Field]:
    """Unite the fields of tensors that are combined element by element; freeze those that meet no label."""
    ndim = call.output.ndim
    merged: list[Field] = []
    for tensor in tensors:
        for one in tracer.record(tensor).fields:
            one = lifted(one, ndim)
            for index, other in enumerate(merged):
                if support(one) & support(other):
                    tracer.book.unite(one, other)
                    merged[index] = np.broadcast_arrays(other, one)[0]
                    break
            else:
                merged.append(one)
    for tensor in tensors:
        record = tracer.record(tensor)
        own = frozenset().union(*(support(lifted(one, ndim)) for one in record.fields))
        shape = (1,) * (ndim - tensor.ndim) + tuple(tensor.shape)
        for one in merged:
            blocked = [dim for dim in support(one) - own if shape[dim] > 1]
            if blocked and not support(one) & own:
                tracer.book.freeze(one, f"{where(tracer, call)} meets {record.origin}, whose size is fixed")
    return merged


def batch_norm(tracer: Tracer, call: Call) -> None:
    """Batch normalisation acts on each channel alone: its four tensors are tied to dimension 1."""
    data = call.args[0]
    source = tracer.record(data)
    freeze_others(tracer, source, {1}, f"{where(tracer, call)} reads a reshaped channel dimension")
    channels = labels_along(source, 1)
    for tensor in call.tensors[1:]:
        labels = labels_along(tracer.record(tensor), 0)
        if labels is not None and channels is not None:
            tracer.book.unite(labels, channels)
        elif labels is not None:
            tracer.book.freeze(labels, f"{where(tracer, call)} reads {source.origin}")
    tracer.note_normalisation(data)
    pass_on(tracer, call, source.fields, source)


def mixing_norm(tracer: Tracer, call: Call) -> None:
    """Layer and group normalisation compute statistics across channels: removing one changes the others."""
    source = tracer.record(call.args[0])
    for tensor in call.tensors:
        tracer.freeze(tracer.record(tensor).fields, f"{where(tracer, call)} normalises across channels")
    pass_on(tracer, call, source.fields, source)


def spatial(tracer: Tracer, call: Call) -> None:
    """Pooling, interpolation and other operations on the dimensions after the channels."""
    source = tracer.record(call.args[0])
    kept = []
    for one in source.fields:
        if support(one) <= {0, 1} and call.output.ndim == one.ndim:
            kept.append(one)
        else:
            tracer.book.freeze(one, f"{where(tracer, call)} pools over channels")
    pass_on(tracer, call, kept, source)


def reduction(tracer: Tracer, call: Call) -> None:
    """Mean, sum, maximum over dimensions that bear no channels."""
    data = call.args[0]
    dims = call.arg(2 if "norm" in call.name else 1, "dim")  # norms take their order first
    dims = range(data.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % data.ndim for dim in dims} if data.ndim else set()
    source = tracer.record(data)
    kept = []
    for one in source.fields:
        if support(one) & reduced:
            tracer.book.freeze(one, f"{where(tracer, call)} reduces over channels")
        elif call.output.ndim == data.ndim:
            kept.append(one)
        else:
            kept.append(one.reshape([size for dim, size in enumerate(one.shape) if dim not in reduced]))
    pass_on(tracer, call, kept, source)


def softmax(tracer: Tracer, call: Call) -> None:
    """Softmax over a dimension that bears no channels passes labels on."""
    source = tracer.record(call.args[0])
    dim = int(call.args[1]) % call.args[0].ndim
    for one in source.fields:
        if dim in support(one):
            tracer.book.freeze(one, f"{where(tracer, call)} normalises across channels")
    pass_on(tracer, call, source.fields, source)


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
    *("dropout", "native_dropout", "zeros_like", "ones_like", "empty_like", "full_like"),
)
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_attention_math",
)
_FACTORIES = ("arange", "zeros", "ones", "empty", "full", "scalar_tensor", "rand", "randn", "linspace", "eye")

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
    "native_layer_norm": mixing_norm,
    "native_group_norm": mixing_norm,
    "_fused_rms_norm": mixing_norm,
    "_softmax": softmax,
    "_log_softmax": softmax,
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
    **dict.fromkeys(("slice", "select", "split", "split_with_sizes", "unbind"), piece),
}
