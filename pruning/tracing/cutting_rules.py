"""Rules of the operations that take parts of tensors.

Parts along a dimension that bears channels fit the pruned network in three cases: all parts are equally large, so
that they stay so if the same channels go from each (``chunk``); the sizes are attributes of the running module,
which can follow; or the dimension is one of several of a product and stays whole.
"""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from torch import Tensor
from torch import bool as torch_bool

from prunegym.pruning.tracing.labels import Field, support
from prunegym.pruning.tracing.rule_parts import pass_on, where
from prunegym.pruning.tracing.tracer import Call, SizeAttribute, TensorRecord, Tracer


def cut(tracer: Tracer, call: Call) -> None:
    """``slice``, ``split``, ``split_with_sizes``: parts along one dimension."""
    data = call.args[0]
    source = tracer.record(data)
    position = 2 if call.name.startswith("split") else 1
    dim = int(call.arg(position, "dim", 0)) % data.ndim
    parts: list[Tensor] = list(call.result) if isinstance(call.result, list | tuple) else [call.result]
    starts = np.cumsum([0, *(part.shape[dim] for part in parts)])
    step = 1
    if call.name == "slice":
        start = call.arg(2, "start") or 0
        step = int(call.arg(4, "step", 1))
        starts = starts + (start + data.shape[dim] if start < 0 else start)
    fields: list[list[Field]] = [[] for _ in parts]
    for one in source.fields:
        if dim not in support(one) or all(part.shape == data.shape for part in parts):
            for own in fields:
                own.append(one)
            continue
        if len(support(one)) > 1:
            one = tracer.whole(one, dim, f"{where(tracer, call)} takes part of the channels")
            for own in fields:
                own.append(one)
            continue
        labels = one.ravel()
        _tie_parts(tracer, call, labels, [int(end) for end in starts], step)
        for own, part, begin in zip(fields, parts, starts, strict=False):
            span = labels[begin : begin + (part.shape[dim] - 1) * step + 1 : step]
            own.append(span.reshape([-1 if axis == dim else 1 for axis in range(data.ndim)]))
    for part, own in zip(parts, fields, strict=True):
        tracer.set(part, TensorRecord([one for one in own if support(one)], source.origin, source.parameter))


def _tie_parts(tracer: Tracer, call: Call, labels: Field, ends: list[int], step: int) -> None:
    """Unite the channels of equal parts, or find the attributes that say how large the parts are."""
    size = len(labels)
    bounds = sorted({0, *(min(end, size) for end in ends), size})
    lengths = np.diff(bounds)
    if step == 1 and len(lengths) > 1:
        if len(set(lengths.tolist())) == 1:
            parts = labels.reshape(len(lengths), -1)
            tracer.book.unite(parts, parts[:1])
            for span in (parts[0], labels):  # the size of a part may be told, or come from that of the whole
                tracer.sizes += [SizeAttribute(place, span, 0) for place in tracer.places_of(len(span))]
            return
        if _follow_attributes(tracer, labels, bounds):
            return
    tracer.book.freeze(labels, f"{where(tracer, call)} takes part of the channels")


def _follow_attributes(tracer: Tracer, labels: Field, bounds: list[int]) -> bool:
    """Whether every part, or every bound between parts, is an attribute of the running module."""
    spans = [labels[begin:end] for begin, end in pairwise(bounds)]
    for candidates in (spans, [labels[:bound] for bound in bounds[1:-1]]):
        found = [tracer.places_of(len(span)) for span in candidates]
        if all(places or len(span) == 1 for span, places in zip(candidates, found, strict=True)):
            for span in spans:
                tracer.book.freeze(span[:1], "kept so that no part of the channels is empty")
            for span, places in zip(candidates, found, strict=True):
                tracer.sizes += [SizeAttribute(place, span, 0) for place in places]
            return True
    return False


def pick(tracer: Tracer, call: Call) -> None:
    """``select`` and ``unbind``: the dimension disappears, and must stay whole."""
    data = call.args[0]
    source = tracer.record(data)
    dim = int(call.arg(1, "dim", 0)) % data.ndim
    parts: list[Tensor] = list(call.result) if isinstance(call.result, list | tuple) else [call.result]
    first = 0 if len(parts) > 1 else int(call.arg(2, "index", 0)) % max(data.shape[dim], 1)
    kept: list[list[Field]] = [[] for _ in parts]
    for one in source.fields:
        if dim in support(one):
            tracer.whole(one, dim, f"{where(tracer, call)} takes part of the channels")
        for index, own in enumerate(kept):
            own.append(np.asarray(one.take(first + index if one.shape[dim] > 1 else 0, axis=dim)))
    for part, own in zip(parts, kept, strict=True):
        tracer.set(part, TensorRecord([one for one in own if support(one)], source.origin, source.parameter))


def index(tracer: Tracer, call: Call) -> None:
    """``tensor[..., indices, ...]``: fine along dimensions without labels."""
    data, indices = call.args[0], list(call.args[1])
    source = tracer.record(data)
    used = [axis for axis, one in enumerate(indices) if one is not None]
    one_block = used == list(range(used[0], used[-1] + 1))
    boolean = any(indices[axis].dtype == torch_bool for axis in used)
    kept = []
    for one in source.fields:
        for axis in used:
            one = tracer.whole(one, axis, f"{where(tracer, call)} picks channels")
        if not support(one):
            continue
        if boolean or not one_block:
            tracer.book.freeze(one, f"{where(tracer, call)} rearranges dimensions")
            continue
        width = call.output.ndim - (data.ndim - len(used))  # dimensions that take the place of those indexed
        before, after = one.shape[: used[0]], one.shape[used[-1] + 1 :]
        kept.append(one.reshape((*before, *(1,) * width, *after)))
    pass_on(tracer, call, kept, source)


def index_along(tracer: Tracer, call: Call) -> None:
    """``index_select``, ``gather``, ``roll``, ``cumsum``, ``topk``: the dimension concerned must stay whole."""
    data = call.args[0]
    source = tracer.record(data)
    dims = call.arg(2 if call.name in {"roll", "topk"} else 1, "dims" if call.name in {"roll", "flip"} else "dim", -1)
    dims = [dims] if isinstance(dims, int) else dims or range(data.ndim)
    at = f"{where(tracer, call)} picks channels"
    kept = source.fields
    for dim in dims:
        kept = [tracer.whole(one, int(dim) % data.ndim, at) for one in kept]
    if call.name == "gather":
        for tensor in call.tensors[1:]:
            tracer.freeze(tracer.record(tensor).fields, at)
        # the index may be shorter along other dimensions too
        for one in kept:
            if any(call.output.shape[dim] != data.shape[dim] for dim in support(one)):
                tracer.book.freeze(one, at)
                kept = [left for left in kept if left is not one]
    outputs = call.result if isinstance(call.result, tuple | list) else [call.result]
    for output in outputs:
        tracer.set(output, TensorRecord([one for one in kept if support(one)], source.origin, source.parameter))
