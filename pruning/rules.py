"""How each ATen operation carries channel labels from its inputs to its outputs.

A rule takes the tracer and the call. Rules never look at values, only at shapes and arguments, and where they
are not sure they freeze. To support a new operation, write a rule and name it in ``RULES``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from math import prod
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from prunegym.pruning.labels import Field, along, lifted, reshaped, support
from prunegym.pruning.trace import Call, ChannelPadding, TensorRecord, TracedOperation, Tracer, give_up

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


def _where(tracer: Tracer, call: Call) -> str:
    return f"{call.name} in {tracer.module or 'the network'}"


def _pass_on(tracer: Tracer, call: Call, fields: list[Field], source: TensorRecord) -> None:
    """Give the fields to the first output."""
    fields = [one for one in fields if support(one)]
    tracer.set(call.output, TensorRecord(fields, source.origin, source.parameter))


# ---- element-wise ------------------------------------------------------------------------------------------


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
                tracer.book.freeze(one, f"{_where(tracer, call)} meets {record.origin}, whose size is fixed")
    return merged


# ---- layers ------------------------------------------------------------------------------------------------


def _only(record: TensorRecord, dim: int) -> NDArray[np.int64] | None:
    """The labels along one dimension, if a field varies along it and nothing else."""
    for one in record.fields:
        if support(one) == {dim}:
            return one.ravel()
    return None


def _freeze_others(tracer: Tracer, record: TensorRecord, dims: set[int], reason: str) -> None:
    """Freeze fields that vary along anything but the given single dimensions."""
    for one in record.fields:
        if len(support(one)) > 1 or not support(one) <= dims:
            tracer.book.freeze(one, reason)


def convolution(tracer: Tracer, call: Call) -> None:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    data, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    source, kernel = tracer.record(data), tracer.record(weight)
    _freeze_others(tracer, source, {1}, f"{_where(tracer, call)} reads a reshaped channel dimension")
    reads, makes = (0, 1) if transposed else (1, 0)
    channels, fan_in, filters = _only(source, 1), _only(kernel, reads), _only(kernel, makes)
    if transposed and groups > 1:
        give_up(tracer, call, f"grouped transposed {_where(tracer, call)}")
        channels = fan_in = filters = None
    elif groups > 1:
        _tie_groups(tracer, call, channels, filters, groups, source)
    else:
        _feed(tracer, channels, fan_in, source, _where(tracer, call))
    if filters is not None:
        tracer.book.produce(filters)
        _unite_bias(tracer, bias, filters)
        tracer.set(call.output, TensorRecord([along(filters, 1, call.output.ndim)], _where(tracer, call)))
    else:
        tracer.set(call.output, TensorRecord([], _where(tracer, call)))
    tracer.note_output(call.output, len(tracer.operations))
    spatial = data.shape[2:] if transposed else call.output.shape[2:]
    tracer.operations.append(
        TracedOperation(
            module=tracer.module,
            kind="depthwise" if 1 < groups == data.shape[1] else "convolution",
            weight=tracer.name_of(weight),
            bias=tracer.name_of(bias),
            inputs=channels,
            outputs=filters,
            input_count=data.shape[1] // groups,
            output_count=call.output.shape[1],
            repeats=call.output.shape[0] * prod(spatial) * prod(weight.shape[2:]) / tracer.batch_size,
            reads=reads,
            groups=groups,
            input_shape=tuple(data.shape),
            output_shape=tuple(call.output.shape),
            kernel=tuple(weight.shape[2:]),
            stride=tuple(call.args[3]),
        )
    )


def _feed(
    tracer: Tracer,
    channels: NDArray[np.int64] | None,
    fan_in: NDArray[np.int64] | None,
    source: TensorRecord,
    at: str,
) -> None:
    """Tie a layer's input channels to the slices of its weight that read them."""
    if channels is not None and fan_in is not None:
        tracer.book.unite(channels, fan_in)
    elif fan_in is not None:
        tracer.book.freeze(fan_in, f"{at} reads {source.origin}")
    elif channels is not None:
        tracer.book.freeze(channels, f"the weight of {at} cannot be followed")


def _tie_groups(
    tracer: Tracer,
    call: Call,
    channels: NDArray[np.int64] | None,
    filters: NDArray[np.int64] | None,
    groups: int,
    source: TensorRecord,
) -> None:
    """A grouped or depthwise convolution loses whole groups: inputs and outputs of one group are one unit."""
    known = [part for part in (channels, filters) if part is not None]
    if len(known) < 2:
        for part in known:
            tracer.book.freeze(part, f"{_where(tracer, call)} (grouped) reads {source.origin}")
        return
    first = known[0].reshape(groups, -1)[:, :1]
    for part in known:
        tracer.book.unite(part.reshape(groups, -1), first)


def _unite_bias(tracer: Tracer, bias: Tensor | None, outputs: NDArray[np.int64]) -> None:
    if bias is None:
        return
    labels = _only(tracer.record(bias), bias.ndim - 1)
    if labels is not None:
        tracer.book.unite(labels, outputs)
    elif bias.shape[-1] > 1:
        tracer.book.freeze(outputs, f"the bias of {tracer.module} cannot be followed")


def matrix_product(tracer: Tracer, call: Call) -> None:
    """``mm``, ``bmm``, ``addmm``: rows of the first factor, columns of the second; inner ones united."""
    bias = call.args[0] if call.name in {"addmm", "baddbmm"} else None
    left, right = call.args[1:3] if bias is not None else call.args[:2]
    a, b = tracer.record(left), tracer.record(right)
    last, rows = left.ndim - 1, left.ndim - 2
    inner_a, inner_b = _only(a, last), _only(b, rows)
    at = _where(tracer, call)
    for record, inner in ((a, last), (b, rows)):
        for one in record.fields:
            if inner in support(one) and len(support(one)) > 1:
                tracer.book.freeze(one, f"{at} reads a reshaped channel dimension")
    if a.parameter or b.parameter:
        _feed(tracer, inner_a, inner_b, a, at)
    else:
        for labels in (inner_a, inner_b):
            if labels is not None:
                tracer.book.freeze(labels, f"{at} multiplies two activations")
    # batched factors (attention) keep their batch dimensions: those fields pass through and are united
    batched = [one for one in (*a.fields, *b.fields) if support(one) and max(support(one)) < rows]
    for one in batched:
        tracer.book.freeze(one, f"{at} multiplies along a batch of channels")
    fields = [one for one in a.fields if support(one) == {rows}]
    columns = _only(b, last)
    if columns is not None:
        if b.parameter:
            tracer.book.produce(columns)
            _unite_bias(tracer, bias, columns)
        fields.append(along(columns, last, call.output.ndim))
    origin = at if columns is None else a.origin
    tracer.set(call.output, TensorRecord(fields, origin, a.parameter and b.parameter))
    _note_product(tracer, call, left, right, bias, inner_a if b.parameter else None, columns)


def _note_product(
    tracer: Tracer,
    call: Call,
    left: Tensor,
    right: Tensor,
    bias: Tensor | None,
    inputs: NDArray[np.int64] | None,
    outputs: NDArray[np.int64] | None,
) -> None:
    if tracer.record(left).parameter and tracer.record(right).parameter:
        return  # a product of weights is not paid for each example
    tracer.operations.append(
        TracedOperation(
            module=tracer.module,
            kind="linear" if tracer.record(right).parameter else "product",
            weight=_base_name(tracer, right),
            bias=tracer.name_of(bias),
            inputs=inputs,
            outputs=outputs,
            input_count=left.shape[-1],
            output_count=right.shape[-1],
            repeats=prod(left.shape[:-1]) / tracer.batch_size,
            reads=1 if tracer.name_of(right) is None else 0,  # `x @ weight.t()` or `x @ weight`
            input_shape=tuple(left.shape),
            output_shape=tuple(call.output.shape),
        )
    )


def _base_name(tracer: Tracer, tensor: Tensor) -> str | None:
    """The parameter behind ``weight.t()``."""
    name = tracer.name_of(tensor)
    return name if name is not None or tensor._base is None else tracer.name_of(tensor._base)


def attention(tracer: Tracer, call: Call) -> None:
    """Scaled dot product attention: its cost is counted, its channels are frozen."""
    query, key, value = call.args[:3]
    for depth, width in ((query.shape[-1], key.shape[-2]), (key.shape[-2], value.shape[-1])):
        tracer.operations.append(
            TracedOperation(
                module=tracer.module,
                kind="product",
                weight=None,
                bias=None,
                inputs=None,
                outputs=None,
                input_count=depth,
                output_count=width,
                repeats=prod(query.shape[:-1]) / tracer.batch_size,
            )
        )
    give_up(tracer, call, f"{_where(tracer, call)} mixes channels by attention")


def batch_norm(tracer: Tracer, call: Call) -> None:
    """Batch normalisation acts on each channel alone: its four tensors are tied to dimension 1."""
    data = call.args[0]
    source = tracer.record(data)
    _freeze_others(tracer, source, {1}, f"{_where(tracer, call)} reads a reshaped channel dimension")
    channels = _only(source, 1)
    for tensor in call.tensors[1:]:
        labels = _only(tracer.record(tensor), 0)
        if labels is not None and channels is not None:
            tracer.book.unite(labels, channels)
        elif labels is not None:
            tracer.book.freeze(labels, f"{_where(tracer, call)} reads {source.origin}")
    tracer.note_normalisation(data)
    _pass_on(tracer, call, source.fields, source)


def mixing_norm(tracer: Tracer, call: Call) -> None:
    """Layer and group normalisation compute statistics across channels: removing one changes the others."""
    source = tracer.record(call.args[0])
    for tensor in call.tensors:
        tracer.freeze(tracer.record(tensor).fields, f"{_where(tracer, call)} normalises across channels")
    _pass_on(tracer, call, source.fields, source)


# ---- pooling and reductions --------------------------------------------------------------------------------


def spatial(tracer: Tracer, call: Call) -> None:
    """Pooling, interpolation and other operations on the dimensions after the channels."""
    source = tracer.record(call.args[0])
    kept = []
    for one in source.fields:
        if support(one) <= {0, 1} and call.output.ndim == one.ndim:
            kept.append(one)
        else:
            tracer.book.freeze(one, f"{_where(tracer, call)} pools over channels")
    _pass_on(tracer, call, kept, source)


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
            tracer.book.freeze(one, f"{_where(tracer, call)} reduces over channels")
        elif call.output.ndim == data.ndim:
            kept.append(one)
        else:
            kept.append(one.reshape([size for dim, size in enumerate(one.shape) if dim not in reduced]))
    _pass_on(tracer, call, kept, source)


def softmax(tracer: Tracer, call: Call) -> None:
    """Softmax over a dimension that bears no channels passes labels on."""
    source = tracer.record(call.args[0])
    dim = int(call.args[1]) % call.args[0].ndim
    for one in source.fields:
        if dim in support(one):
            tracer.book.freeze(one, f"{_where(tracer, call)} normalises across channels")
    _pass_on(tracer, call, source.fields, source)


# ---- movement ----------------------------------------------------------------------------------------------


def same(tracer: Tracer, call: Call) -> None:
    """Copies and casts."""
    source = tracer.record(call.args[0])
    _pass_on(tracer, call, source.fields, source)


def view(tracer: Tracer, call: Call) -> None:
    """Reshape. A channel dimension may be flattened together with others; splitting it freezes it."""
    data = call.args[0]
    source = tracer.record(data)
    fields = []
    for one in source.fields:
        moved = one if data.numel() == 0 else reshaped(one, data.shape, call.output.shape)
        if len(support(moved)) > 1:
            tracer.book.freeze(one, f"{_where(tracer, call)} splits the channel dimension")
        fields.append(moved)
    _pass_on(tracer, call, fields, source)


def permute(tracer: Tracer, call: Call) -> None:
    """``permute``, ``transpose`` and ``t``."""
    data = call.args[0]
    order = list(range(data.ndim))
    if call.name == "permute":
        order = [dim % data.ndim for dim in call.args[1]]
    elif data.ndim > 1:
        i, j = (0, 1) if call.name == "t" else (call.args[1] % data.ndim, call.args[2] % data.ndim)
        order[i], order[j] = order[j], order[i]
    source = tracer.record(data)
    _pass_on(tracer, call, [one.transpose(order) for one in source.fields], source)


def expand(tracer: Tracer, call: Call) -> None:
    """Broadcasting to a larger shape adds dimensions without labels."""
    source = tracer.record(call.args[0])
    _pass_on(tracer, call, [lifted(one, call.output.ndim) for one in source.fields], source)


def piece(tracer: Tracer, call: Call) -> None:
    """``slice``, ``select``, ``split``, ``unbind``: fine along dimensions without labels, else frozen."""
    data = call.args[0]
    source = tracer.record(data)
    position = {"split": 2, "split_with_sizes": 2}.get(call.name, 1)
    dim = int(call.arg(position, "dim", 0)) % data.ndim
    for index, part in enumerate(call.result if isinstance(call.result, list | tuple) else [call.result]):
        fields: list[Field] = []
        for one in source.fields:
            if dim in support(one) and part.shape != data.shape:
                tracer.book.freeze(one, f"{_where(tracer, call)} takes part of the channels")
                if part.ndim == data.ndim:
                    start = sum(other.shape[dim] for other in call.result[:index]) if index else 0
                    one = one.take(range(start, start + part.shape[dim]), axis=dim)
            fields.append(one if part.ndim == data.ndim else np.asarray(one.take(0, axis=dim)))
        fields = [one for one in fields if support(one)]
        tracer.set(part, TensorRecord(fields, source.origin, source.parameter))


def concatenate(tracer: Tracer, call: Call) -> None:
    """Labels stand one behind another along the joined dimension; others meet element by element."""
    parts = [part for part in call.args[0] if part.numel() or part.ndim > 1]
    dim = int(call.arg(1, "dim", 0)) % call.output.ndim
    joined: list[NDArray[np.int64]] = []
    labelled = False
    for part in parts:
        record = tracer.record(part)
        labels = _only(record, dim)
        labelled |= labels is not None
        if labels is None:
            labels = tracer.book.fresh(part.shape[dim])
            tracer.book.freeze(labels, f"{_where(tracer, call)} joins {record.origin}")
        joined.append(labels)
        for one in record.fields:
            if dim in support(one) and len(support(one)) > 1:
                tracer.book.freeze(one, f"{_where(tracer, call)} joins a reshaped channel dimension")
    fields = [along(np.concatenate(joined), dim, call.output.ndim)] if labelled else []
    others: list[Field] = []
    for part in parts:
        for one in tracer.record(part).fields:
            if dim in support(one):
                continue
            match = next((other for other in others if support(other) & support(one)), None)
            if match is None:
                others.append(one)
            else:
                tracer.book.unite(match, one)
    for part in parts:
        for one in others:
            if not any(support(one) & support(own) for own in tracer.record(part).fields):
                tracer.book.freeze(one, f"{_where(tracer, call)} joins {tracer.record(part).origin}")
    tracer.set(call.output, TensorRecord([*fields, *others], _where(tracer, call)))


def pad(tracer: Tracer, call: Call) -> None:
    """Zero padding; padded channels are prunable only where ``channel_padding`` says how many there are."""
    data, amounts = call.args[0], list(call.args[1])
    source = tracer.record(data)
    fields = []
    for one in source.fields:
        for dim in support(one):
            place = 2 * (data.ndim - 1 - dim)
            before, after = amounts[place : place + 2] if place < len(amounts) else (0, 0)
            if not before and not after:
                continue
            if len(support(one)) > 1 or before < 0 or after < 0:
                tracer.book.freeze(one, f"{_where(tracer, call)} crops or pads a reshaped channel dimension")
                one = along(tracer.book.fresh(call.output.shape[dim]), dim, data.ndim)
                tracer.book.freeze(one, f"{_where(tracer, call)} crops channels")
                continue
            one = _padded(tracer, call, one, dim, before, after)
        fields.append(one)
    _pass_on(tracer, call, fields, source)


def _padded(tracer: Tracer, call: Call, one: Field, dim: int, before: int, after: int) -> Field:
    path, module = tracer.modules[-1]
    left, right = tracer.book.fresh(before), tracer.book.fresh(after)
    if getattr(module, "channel_padding", None) == (before, after) and not call.arg(2, "value", 0):
        tracer.paddings.append(ChannelPadding(path, left, right))
    else:
        for labels in (left, right):
            tracer.book.freeze(labels, f"{_where(tracer, call)} adds a fixed number of channels")
    return along(np.concatenate([left, one.ravel(), right]), dim, one.ndim)


def nothing(tracer: Tracer, call: Call) -> None:
    """Operations that make tensors from sizes alone."""


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
