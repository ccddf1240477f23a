"""Rules of the operations that move, join and cut tensors without computing anything."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.tracing.labels import Field, along, lifted, reshaped, support
from prunegym.pruning.tracing.rule_parts import met, only_along, pass_on, where
from prunegym.pruning.tracing.size_tags import Tagged
from prunegym.pruning.tracing.tracer import Call, ChannelPadding, TensorRecord, Tracer, give_up


def same(tracer: Tracer, call: Call) -> None:
    """Copies and casts."""
    source = tracer.record(call.args[0])
    pass_on(tracer, call, source.fields, source)
    if call.output is not call.args[0]:
        tracer.note_copy(call.output, call.args[0])


def restride(tracer: Tracer, call: Call) -> None:
    """``as_strided``: global average pooling of channels-last maps ends in one that moves nothing."""
    size, stride = list(call.args[1]), list(call.args[2])
    still = len(size) > 2 and prod(size[2:]) == 1 and stride[:2] == [size[1], 1]
    if still and not call.arg(3, "storage_offset"):
        same(tracer, call)
    else:
        give_up(tracer, call, f"no rule for {where(tracer, call)}")


def view(tracer: Tracer, call: Call) -> None:
    """Reshape. A channel dimension may be flattened together with others, or be split into a product."""
    data = call.args[0]
    source = tracer.record(data)
    shape = tuple(call.output.shape)
    fields: list[Field] = []
    for one in source.fields:
        moved = one if data.numel() == 0 else reshaped(one, data.shape, shape)
        if len(support(moved)) > 1:
            moved = _without_constants(tracer, call, moved)
            tracer.book.product(moved)
        tracer.note_sizes(moved, shape)
        if any(support(moved) & support(other) for other in fields):
            reason = f"{where(tracer, call)} joins two channel dimensions"
            tracer.freeze([one, *fields], reason)
            continue
        fields.append(moved)
    pass_on(tracer, call, fields, source)


def _without_constants(tracer: Tracer, call: Call, moved: Field) -> Field:
    """Where one size of a view is left open (-1), those written as plain numbers are constants of the code."""
    ndim = call.output.ndim
    written = {dim: tracer.watch.at(dim, ndim) for dim in support(moved)}
    if -1 in written.values():
        for dim, size in written.items():
            if size != -1 and not isinstance(size, Tagged):
                moved = tracer.whole(moved, dim, f"{where(tracer, call)} splits channels by a fixed number")
    return moved


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
    pass_on(tracer, call, [one.transpose(order) for one in source.fields], source)


def expand(tracer: Tracer, call: Call) -> None:
    """Broadcasting to a larger shape adds dimensions without labels."""
    source = tracer.record(call.args[0])
    pass_on(tracer, call, [lifted(one, call.output.ndim) for one in source.fields], source)


def repeat(tracer: Tracer, call: Call) -> None:
    """``repeat``: copies of a tensor stand side by side, and so do their labels."""
    data, times = call.args[0], list(call.args[1])
    source = tracer.record(data)
    fields = []
    for one in source.fields:
        one = lifted(one, call.output.ndim)
        copies = [many if one.shape[dim] > 1 else 1 for dim, many in enumerate(times)]
        fields.append(np.tile(one, copies))
    pass_on(tracer, call, fields, source)


def flip(tracer: Tracer, call: Call) -> None:
    """``flip`` turns labels around."""
    source = tracer.record(call.args[0])
    pass_on(tracer, call, [np.flip(one, call.args[1]) for one in source.fields], source)


def stack(tracer: Tracer, call: Call) -> None:
    """Tensors along a new dimension, which must stay whole: their channels meet element by element."""
    tensors = list(call.args[0])
    dim = int(call.arg(1, "dim", 0)) % call.output.ndim
    records = [tracer.record(tensor) for tensor in tensors]
    parts = [(one.fields, tuple(tensor.shape), one.origin) for one, tensor in zip(records, tensors, strict=True)]
    fields = [np.expand_dims(one, dim) for one in met(tracer, call, parts, tensors[0].ndim)]
    tracer.set(call.output, TensorRecord(fields, where(tracer, call), all(one.parameter for one in records)))


def pixel_shuffle(tracer: Tracer, call: Call) -> None:
    """``(B, C r r, H, W)`` to ``(B, C, H r, W r)``: channels come in blocks of ``r * r``."""
    source = tracer.record(call.args[0])
    factor = int(call.args[1]) ** 2
    labels = only_along(tracer, source, call.args[0].ndim - 3, f"{where(tracer, call)} moves a reshaped channel")
    fields = []
    if labels is not None:
        blocks = labels.reshape(-1, factor)
        tracer.book.unite(blocks, blocks[:, :1])
        fields = [along(blocks[:, 0], call.output.ndim - 3, call.output.ndim)]
    pass_on(tracer, call, fields, source)


def pixel_unshuffle(tracer: Tracer, call: Call) -> None:
    """The reverse of :func:`pixel_shuffle`."""
    source = tracer.record(call.args[0])
    labels = only_along(tracer, source, call.args[0].ndim - 3, f"{where(tracer, call)} moves a reshaped channel")
    fields = []
    if labels is not None:
        fields = [along(np.repeat(labels, int(call.args[1]) ** 2), call.output.ndim - 3, call.output.ndim)]
    pass_on(tracer, call, fields, source)


def unfold(tracer: Tracer, call: Call) -> None:
    """``im2col``: each channel becomes one row for every place of the kernel."""
    data = call.args[0]
    source = tracer.record(data)
    labels = only_along(tracer, source, 1, f"{where(tracer, call)} moves a reshaped channel")
    fields = []
    if labels is not None:
        fields = [along(np.repeat(labels, call.output.shape[1] // len(labels)), 1, call.output.ndim)]
    pass_on(tracer, call, fields, source)


def concatenate(tracer: Tracer, call: Call) -> None:
    """Labels stand one behind another along the joined dimension; others meet element by element."""
    parts = [part for part in call.args[0] if part.numel() or part.ndim > 1]
    dim = int(call.arg(1, "dim", 0)) % call.output.ndim
    joined: list[NDArray[np.int64]] = []
    labelled = False
    for part in parts:
        record = tracer.record(part)
        labels = only_along(tracer, record, dim, f"{where(tracer, call)} joins a reshaped channel dimension")
        labelled |= labels is not None
        if labels is None:
            labels = tracer.book.fresh(part.shape[dim])
            tracer.book.freeze(labels, f"{where(tracer, call)} joins {record.origin}")
        joined.append(labels)
    fields = [along(np.concatenate(joined), dim, call.output.ndim)] if labelled else []
    rest = [
        (
            [one for one in tracer.record(part).fields if dim not in support(one)],
            tuple(1 if axis == dim else size for axis, size in enumerate(part.shape)),
            tracer.record(part).origin,
        )
        for part in parts
    ]
    parameter = all(tracer.record(part).parameter for part in parts)
    others = met(tracer, call, rest, call.output.ndim)
    tracer.set(call.output, TensorRecord([*fields, *others], where(tracer, call), parameter))


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
                tracer.book.freeze(one, f"{where(tracer, call)} crops or pads a reshaped channel dimension")
                one = along(tracer.book.fresh(call.output.shape[dim]), dim, data.ndim)
                tracer.book.freeze(one, f"{where(tracer, call)} crops channels")
                continue
            one = _padded(tracer, call, one, dim, before, after)
        fields.append(one)
    pass_on(tracer, call, fields, source)


def _padded(tracer: Tracer, call: Call, one: Field, dim: int, before: int, after: int) -> Field:
    path, module = tracer.modules[-1]
    left, right = tracer.book.fresh(before), tracer.book.fresh(after)
    if getattr(module, "channel_padding", None) == (before, after) and not call.arg(2, "value", 0):
        tracer.paddings.append(ChannelPadding(path, left, right))
    else:
        for labels in (left, right):
            tracer.book.freeze(labels, f"{where(tracer, call)} adds a fixed number of channels")
    return along(np.concatenate([left, one.ravel(), right]), dim, one.ndim)


def nothing(tracer: Tracer, call: Call) -> None:
    """Operations that make tensors from sizes alone."""
