"""What the rules of all kinds of operations are made of."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.labels import Field, support
from prunegym.pruning.tracer import Call, TensorRecord, Tracer


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


def freeze_others(tracer: Tracer, record: TensorRecord, dims: set[int], reason: str) -> None:
    """Freeze fields that vary along anything but the given single dimensions."""
    for one in record.fields:
        if len(support(one)) > 1 or not support(one) <= dims:
            tracer.book.freeze(one, reason)
