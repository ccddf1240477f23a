"""Rules of the operations that move, join and cut tensors without computing anything."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.labels import Field, along, lifted, reshaped, support
from prunegym.pruning.rule_parts import labels_along, pass_on, where
from prunegym.pruning.tracer import Call, ChannelPadding, TensorRecord, Tracer, give_up


def same(tracer: Tracer, call: Call) -> None:
    """Copies and casts."""
    source = tracer.record(call.args[0])
    pass_on(tracer, call, source.fields, source)


def restride(tracer: Tracer, call: Call) -> None:
    """``as_strided``: global average pooling of channels-last maps ends in one that moves nothing."""
    size, stride = list(call.args[1]), list(call.args[2])
    still = len(size) > 2 and prod(size[2:]) == 1 and stride[:2] == [size[1], 1]
    if still and not call.arg(3, "storage_offset"):
        same(tracer, call)
    else:
        give_up(tracer, call, f"no rule for {where(tracer, call)}")


def view(tracer: Tracer, call: Call) -> None:
    """Reshape. A channel dimension may be flattened together with others; splitting it freezes it."""
    data = call.args[0]
    source = tracer.record(data)
    fields = []
    for one in source.fields:
        moved = one if data.numel() == 0 else reshaped(one, data.shape, call.output.shape)
        if len(support(moved)) > 1:
            tracer.book.freeze(one, f"{where(tracer, call)} splits the channel dimension")
        fields.append(moved)
    pass_on(tracer, call, fields, source)


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
                tracer.book.freeze(one, f"{where(tracer, call)} takes part of the channels")
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
        labels = labels_along(record, dim)
        labelled |= labels is not None
        if labels is None:
            labels = tracer.book.fresh(part.shape[dim])
            tracer.book.freeze(labels, f"{where(tracer, call)} joins {record.origin}")
        joined.append(labels)
        for one in record.fields:
            if dim in support(one) and len(support(one)) > 1:
                tracer.book.freeze(one, f"{where(tracer, call)} joins a reshaped channel dimension")
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
                tracer.book.freeze(one, f"{where(tracer, call)} joins {tracer.record(part).origin}")
    tracer.set(call.output, TensorRecord([*fields, *others], where(tracer, call)))


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
