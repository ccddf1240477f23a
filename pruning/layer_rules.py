"""Rules of the operations that make channels: convolutions and matrix products."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prunegym.pruning.labels import along, support
from prunegym.pruning.rule_parts import freeze_others, labels_along, where
from prunegym.pruning.tracer import Call, TensorRecord, TracedOperation, Tracer, give_up


def convolution(tracer: Tracer, call: Call) -> None:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    data, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    source, kernel = tracer.record(data), tracer.record(weight)
    freeze_others(tracer, source, {1}, f"{where(tracer, call)} reads a reshaped channel dimension")
    reads, makes = (0, 1) if transposed else (1, 0)
    channels, fan_in, filters = labels_along(source, 1), labels_along(kernel, reads), labels_along(kernel, makes)
    if transposed and groups > 1:
        give_up(tracer, call, f"grouped transposed {where(tracer, call)}")
        channels = fan_in = filters = None
    elif groups > 1:
        _tie_groups(tracer, call, channels, filters, groups, source)
    else:
        _feed(tracer, channels, fan_in, source, where(tracer, call))
    if filters is not None:
        tracer.book.produce(filters)
        _unite_bias(tracer, bias, filters)
        tracer.set(call.output, TensorRecord([along(filters, 1, call.output.ndim)], where(tracer, call)))
    else:
        tracer.set(call.output, TensorRecord([], where(tracer, call)))
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
            tracer.book.freeze(part, f"{where(tracer, call)} (grouped) reads {source.origin}")
        return
    first = known[0].reshape(groups, -1)[:, :1]
    for part in known:
        tracer.book.unite(part.reshape(groups, -1), first)


def _unite_bias(tracer: Tracer, bias: Tensor | None, outputs: NDArray[np.int64]) -> None:
    if bias is None:
        return
    labels = labels_along(tracer.record(bias), bias.ndim - 1)
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
    inner_a, inner_b = labels_along(a, last), labels_along(b, rows)
    at = where(tracer, call)
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
    columns = labels_along(b, last)
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
    give_up(tracer, call, f"{where(tracer, call)} mixes channels by attention")
