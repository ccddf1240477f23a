"""Rules of convolutions."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.tracing.labels import along
from prunegym.pruning.tracing.rule_parts import freeze_others, labels_along, only_along, where
from prunegym.pruning.tracing.size_tags import Place
from prunegym.pruning.tracing.tracer import Call, SizeAttribute, TensorRecord, TracedOperation, Tracer


def convolution(tracer: Tracer, call: Call) -> None:
    """``convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups)``."""
    data, weight, bias = call.args[0], call.args[1], call.args[2]
    transposed, groups = bool(call.args[6]), int(call.args[8])
    source, kernel = tracer.record(data), tracer.record(weight)
    reads, makes = (0, 1) if transposed else (1, 0)
    reshaped = f"{where(tracer, call)} reads a reshaped channel dimension"
    freeze_others(tracer, source, 1, reshaped)
    channels = only_along(tracer, source, 1, reshaped)
    fan_in = only_along(tracer, kernel, reads, f"{where(tracer, call)} slides over a reshaped weight")
    filters = only_along(tracer, kernel, makes, f"{where(tracer, call)} slides over a reshaped weight")
    filters = outputs_of(tracer, filters, weight.shape[makes], kernel, where(tracer, call))
    if groups > 1:
        if transposed:  # its weight holds the outputs of one group only
            for part in (labels for labels in (filters, fan_in) if labels is not None):
                if part is fan_in and channels is not None:
                    tracer.book.unite(part, channels)
                else:
                    tracer.book.freeze(part, f"{where(tracer, call)} (grouped) keeps the size of its groups")
            filters = None if channels is None else tracer.book.fresh(call.output.shape[1])
        _tie_groups(tracer, call, channels, filters, groups, source)
    else:
        feed(tracer, channels, fan_in, source, where(tracer, call))
        keep_if_computed(tracer, channels, tracer.weight_name(weight), where(tracer, call))
    if filters is not None:
        tracer.book.produce(filters)
        unite_bias(tracer, bias, filters)
        tracer.set(call.output, TensorRecord([along(filters, 1, call.output.ndim)], where(tracer, call)))
    else:
        tracer.set(call.output, TensorRecord([], where(tracer, call)))
    tracer.note_output(call.output, len(tracer.operations))
    spatial = data.shape[2:] if transposed else call.output.shape[2:]
    tracer.operations.append(
        TracedOperation(
            module=tracer.module,
            kind="depthwise" if 1 < groups == data.shape[1] else "convolution",
            weight=tracer.weight_name(weight),
            bias=tracer.name_of(bias),
            inputs=channels,
            outputs=filters,
            input_count=data.shape[1] // groups,
            output_count=call.output.shape[1],
            repeats=call.output.shape[0] * prod(spatial) * prod(weight.shape[2:]) / tracer.examples(data, weight),
            reads=reads,
            groups=groups,
            input_shape=tuple(data.shape),
            output_shape=tuple(call.output.shape),
            kernel=tuple(weight.shape[2:]),
            stride=tuple(call.args[3]),
        )
    )


def outputs_of(
    tracer: Tracer, labels: NDArray[np.int64] | None, size: int, kernel: TensorRecord, at: str
) -> NDArray[np.int64] | None:
    """Labels of a layer's outputs: those of its weight, or frozen ones, so that nobody wonders where the layer is."""
    if labels is None and size > 1:
        labels = tracer.book.fresh(size)
        tracer.book.freeze(labels, f"the weight of {at} is computed: {kernel.origin}")
    return labels


def keep_if_computed(tracer: Tracer, inputs: NDArray[np.int64] | None, weight: str | None, at: str) -> None:
    """Freeze what is read by a weight that is no parameter: its masked twin could not leave it unread."""
    if inputs is not None and weight is None:
        tracer.book.freeze(inputs, f"{at} reads these channels with a weight that is computed")


def feed(
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
    own = isinstance(tracer.modules[-1][1], nn.modules.conv._ConvNd)
    # a convolution called in the forward of another module takes its number of groups from there
    places = [Place(tracer.module, "groups")] if own else tracer.places_of(groups)
    tracer.sizes += [SizeAttribute(place, first.ravel(), 0) for place in places]


def unite_bias(tracer: Tracer, bias: Tensor | None, outputs: NDArray[np.int64]) -> None:
    """Tie a layer's bias to its output channels."""
    if bias is None:
        return
    labels = labels_along(tracer.record(bias), bias.ndim - 1)
    if labels is not None:
        tracer.book.unite(labels, outputs)
    elif bias.shape[-1] > 1:
        tracer.book.freeze(outputs, f"the bias of {tracer.module} cannot be followed")
