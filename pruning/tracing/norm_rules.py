"""Rules of normalisation layers, and of operations that reduce or normalise over dimensions."""

from __future__ import annotations

from prunegym.pruning.tracing.labels import Field, along, support
from prunegym.pruning.tracing.rule_parts import freeze_others, labels_along, only_along, pass_on, where, whole
from prunegym.pruning.tracing.size_tags import Place
from prunegym.pruning.tracing.tracer import Call, SizeAttribute, TensorRecord, Tracer


def batch_norm(tracer: Tracer, call: Call) -> None:
    """Batch normalisation acts on each channel alone: its four tensors are tied to dimension 1."""
    data = call.args[0]
    source = tracer.record(data)
    reshaped = f"{where(tracer, call)} reads a reshaped channel dimension"
    freeze_others(tracer, source, 1, reshaped)
    channels = only_along(tracer, source, 1, reshaped)
    fields = [] if channels is None else [along(channels, 1, data.ndim)]
    for tensor in call.tensors[1:]:
        labels = labels_along(tracer.record(tensor), 0)
        if labels is not None and channels is not None:
            tracer.book.unite(labels, channels)
        elif labels is not None:
            tracer.book.freeze(labels, f"{where(tracer, call)} reads {source.origin}")
        elif channels is not None and tensor.numel() > 1:
            tracer.book.freeze(channels, f"{where(tracer, call)} scales by {tracer.record(tensor).origin}")
    tracer.note_normalisation(data)
    pass_on(tracer, call, fields, source)


def group_norm(tracer: Tracer, call: Call) -> None:
    """Statistics are those of a group of channels: whole groups may go, and ``num_groups`` follows."""
    data, groups = call.args[0], int(call.args[6])
    source = tracer.record(data)
    at = f"{where(tracer, call)} normalises across channels"
    channels = only_along(tracer, source, 1, at)
    tensors = [tensor for tensor in call.args[1:3] if tensor is not None]
    labels = [labels_along(tracer.record(tensor), 0) for tensor in tensors]
    if groups == 1 or channels is None or any(one is None for one in labels):
        for one in (channels, *labels):
            if one is not None:
                tracer.book.freeze(one, at)
    else:
        first = channels.reshape(groups, -1)[:, :1]
        for one in (channels, *labels):
            assert one is not None
            tracer.book.unite(one.reshape(groups, -1), first)
        tracer.sizes.append(SizeAttribute(Place(tracer.module, "num_groups"), first.ravel(), 0))
    others = [one for one in source.fields if 1 not in support(one)]
    pass_on(tracer, call, [*others, *([] if channels is None else [along(channels, 1, data.ndim)])], source)


def layer_norm(tracer: Tracer, call: Call) -> None:
    """Layer and RMS normalisation compute statistics over the last dimensions, which must stay whole."""
    data = call.args[0]
    source = tracer.record(data)
    last = range(data.ndim - len(call.args[1]), data.ndim)
    at = f"{where(tracer, call)} normalises across channels"
    for tensor in call.tensors[1:]:
        tracer.freeze(tracer.record(tensor).fields, at)
    alone = [one for one in source.fields if support(one) and support(one) <= set(last)]
    others = whole(tracer, [one for one in source.fields if not support(one) <= set(last)], last, at)
    tracer.freeze(alone, at)
    pass_on(tracer, call, [*others, *alone], source)


def weight_norm(tracer: Tracer, call: Call) -> None:
    """A weight is its direction, scaled along one dimension: the others are normalised over."""
    direction, scale, dim = call.args[0], call.args[1], int(call.arg(2, "dim", 0))
    source = tracer.record(direction)
    channels, scales = labels_along(source, dim), labels_along(tracer.record(scale), dim)
    at = f"{where(tracer, call)} normalises across channels"
    if channels is not None and scales is not None:
        tracer.book.unite(channels, scales)
    tracer.freeze([one for one in source.fields if support(one) != {dim}], at)
    pass_on(tracer, call, source.fields, source)


def reduction(tracer: Tracer, call: Call) -> None:
    """Mean, sum, maximum: the dimensions reduced over must stay whole."""
    data = call.args[0]
    dims = call.arg(2 if "norm" in call.name else 1, "dim")  # norms take their order first
    dims = range(data.ndim) if dims is None or dims == [] else [dims] if isinstance(dims, int) else dims
    reduced = {dim % data.ndim for dim in dims} if data.ndim else set()
    source = tracer.record(data)
    at = f"{where(tracer, call)} reduces over channels"
    kept: list[Field] = []
    # of no consequence if nobody looks at the result, such as the average weights of attention
    lost = [one for one in source.fields if support(one) and support(one) <= reduced]
    for one in whole(tracer, [one for one in source.fields if not support(one) <= reduced], reduced, at):
        if call.output.ndim == data.ndim:
            kept.append(one)
        elif support(one):
            kept.append(one.reshape([size for dim, size in enumerate(one.shape) if dim not in reduced]))
    outputs = call.result if isinstance(call.result, tuple | list) else [call.result]
    for output in outputs:  # several: values and indices, variance and mean
        unread = [(one, at) for one in lost]
        tracer.set(output, TensorRecord(kept, source.origin, source.parameter, unread))


def softmax(tracer: Tracer, call: Call) -> None:
    """Softmax, and sums along a dimension: it must stay whole."""
    source = tracer.record(call.args[0])
    dim = int(call.args[1]) % call.args[0].ndim
    alone = [one for one in source.fields if support(one) == {dim}]
    at = f"{where(tracer, call)} normalises across channels"
    tracer.freeze(alone, at)
    others = whole(tracer, [one for one in source.fields if support(one) != {dim}], [dim], at)
    pass_on(tracer, call, [*others, *alone], source)


def spatial(tracer: Tracer, call: Call) -> None:
    """Pooling, interpolation and other operations on the dimensions after the channels."""
    source = tracer.record(call.args[0])
    at = f"{where(tracer, call)} pools over channels"
    first = 2 if call.args[0].ndim > 2 else 1
    kept = whole(tracer, source.fields, range(first, call.args[0].ndim), at)
    if call.output.ndim != call.args[0].ndim:
        tracer.freeze(kept, at)
        kept = []
    pass_on(tracer, call, kept, source)
