"""What the rules of all kinds of operations are made of."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.tracing.labels import Field, lifted, support
from prunegym.pruning.tracing.tracer import Call, TensorRecord, Tracer


def where(tracer: Tracer, call: Call) -> str:
    """The operation and the module it runs in, for reasons."""
    return f"{call.name} in {tracer.module or 'the network'}"


def pass_on(tracer: Tracer, call: Call, fields: list[Field], source: TensorRecord) -> None:
    """Give the fields to the first output."""
    fields = [one for one in fields if support(one)]
    tracer.set(call.output, TensorRecord(fields, source.origin, source.parameter))


def labels_along(record: TensorRecord, dim: int) -> NDArray[np.int64] | None:
    """The labels along one dimension, if a field varies along it and nothing else."""
    for one in record.fields:
        if support(one) == {dim}:
            return one.ravel()
    return None


def whole(tracer: Tracer, fields: Iterable[Field], dims: Iterable[int], reason: str) -> list[Field]:
    """The fields without some dimensions, which an operation needs whole; empty ones are left out."""
    left = []
    for one in fields:
        for dim in dims:
            one = tracer.whole(one, dim, reason)
        if support(one):
            left.append(one)
    return left


def only_along(tracer: Tracer, record: TensorRecord, dim: int, reason: str) -> NDArray[np.int64] | None:
    """Labels along one dimension; whatever else varies together with it must stay whole."""
    for one in record.fields:
        if dim in support(one):
            for other in support(one) - {dim}:
                one = tracer.whole(one, other, reason)
            return one.ravel()
    return None


def freeze_others(tracer: Tracer, record: TensorRecord, dim: int, reason: str) -> None:
    """Freeze the fields that do not vary along a dimension."""
    tracer.freeze([one for one in record.fields if dim not in support(one)], reason)


def met(tracer: Tracer, call: Call, parts: list[tuple[list[Field], tuple[int, ...], str]], ndim: int) -> list[Field]:
    """Unite the fields of tensors that are combined element by element.

    Args:
        tracer: the tracer.
        call: the operation.
        parts: of each tensor its fields, its shape and its origin.
        ndim: dimensions of the result.

    Returns:
        The fields of the result. Fields that meet a full dimension without labels are frozen along it.
    """
    merged: list[Field] = []
    for fields, _, _ in parts:
        for one in (lifted(field, ndim) for field in fields):
            # one field may overlap several that did not overlap each other
            for other in [other for other in merged if support(one) & support(other)]:
                merged = [left for left in merged if left is not other]
                one = tracer.merged(other, one)
            if support(one):
                merged.append(one)
    for fields, sizes, origin in parts:
        own = frozenset().union(*(support(lifted(one, ndim)) for one in fields))
        shape = (1,) * (ndim - len(sizes)) + tuple(sizes)
        blocked = [dim for dim in range(ndim) if shape[dim] > 1 and dim not in own]
        reason = f"{where(tracer, call)} meets {origin}, whose size is fixed"
        merged = whole(tracer, merged, blocked, reason)
    return merged
