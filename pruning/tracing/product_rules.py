"""Rules of matrix products and attention."""

from __future__ import annotations

from math import prod

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from prunegym.pruning.tracing.labels import Field, along, support
from prunegym.pruning.tracing.layer_rules import feed, keep_if_computed, outputs_of, unite_bias
from prunegym.pruning.tracing.rule_parts import only_along, pass_on, where, whole
from prunegym.pruning.tracing.tracer import Call, TensorRecord, TracedOperation, Tracer


def matrix_product(tracer: Tracer, call: Call) -> None:
    """``mm``, ``bmm``, ``addmm``: a linear layer, or a product of two activations."""
    bias = call.args[0] if call.name in {"addmm", "baddbmm"} else None
    left, right = call.args[1:3] if bias is not None else call.args[:2]
    if tracer.record(right).parameter and right.ndim == 2 and not tracer.record(left).parameter:
        _linear(tracer, call, left, right, bias)
    else:
        _product(tracer, call, left, right)


def linear(tracer: Tracer, call: Call) -> None:
    """``linear(input, weight, bias)`` where it is one operation."""
    data, weight, bias = call.args[0], call.args[1], call.arg(2, "bias")
    _linear(tracer, call, data, weight, bias, out_first=True)


def _linear(
    tracer: Tracer, call: Call, data: Tensor, weight: Tensor, bias: Tensor | None, out_first: bool = False
) -> None:
    """A product with a weight ``(in, out)``, or ``(out, in)``: its columns are new channels."""
    source, kernel = tracer.record(data), tracer.record(weight)
    last, at = data.ndim - 1, where(tracer, call)
    reads, makes = (1, 0) if out_first else (0, 1)
    inputs = only_along(tracer, source, last, f"{at} reads a reshaped channel dimension")
    fan_in = only_along(tracer, kernel, reads, f"{at} multiplies by a reshaped weight")
    outputs = only_along(tracer, kernel, makes, f"{at} multiplies by a reshaped weight")
    outputs = outputs_of(tracer, outputs, weight.shape[makes], kernel, at)
    feed(tracer, inputs, fan_in, source, at)
    # a field that varies along the inputs was cut down to them; what varies along rows only stays
    rows = [one for one in source.fields if last not in support(one)]
    fields = list(rows)
    if outputs is not None:
        tracer.book.produce(outputs)
        unite_bias(tracer, bias, outputs)
        fields.append(along(outputs, last, call.output.ndim))
    tracer.set(call.output, TensorRecord(fields, at))
    tracer.note_output(call.output, len(tracer.operations))
    name, transposed = _weight_of(tracer, weight, out_first)
    keep_if_computed(tracer, inputs, name, at)
    tracer.operations.append(
        TracedOperation(
            module=tracer.module,
            kind="linear",
            weight=name,
            bias=tracer.name_of(bias),
            inputs=inputs if kernel.parameter else None,
            outputs=outputs,
            input_count=data.shape[-1],
            output_count=call.output.shape[-1],
            repeats=prod(data.shape[:-1]) / tracer.examples(data, weight),
            batch=_flat(rows),
            reads=1 if transposed else 0,  # `x @ weight.t()` or `x @ weight`
            input_shape=tuple(data.shape),
            output_shape=tuple(call.output.shape),
        )
    )


def _weight_of(tracer: Tracer, weight: Tensor, out_first: bool) -> tuple[str | None, bool]:
    """Name of the parameter behind a weight, and whether it holds the inputs in its second dimension."""
    if tracer.name_of(weight) is not None or weight._base is None:
        return tracer.weight_name(weight), out_first
    base, inputs = weight._base, weight.shape[1 if out_first else 0]
    whole_input = base.ndim > 1 and base.shape[1] == inputs and prod(base.shape[2:]) == 1
    return (tracer.weight_name(base) if whole_input else None), True


def _product(tracer: Tracer, call: Call, left: Tensor, right: Tensor) -> None:
    """A product of two activations ``(..., M, K) @ (..., K, P)``, or of two weights."""
    a, b = tracer.record(left), tracer.record(right)
    last, rows, at = left.ndim - 1, left.ndim - 2, where(tracer, call)
    # a channel that is summed over reaches all results, and no weight of a reader can be set to zero instead
    whole(tracer, a.fields, [last], f"{at} multiplies two activations")
    whole(tracer, b.fields, [rows], f"{at} multiplies two activations")
    ours = [part for part in (one.take([0], axis=last) for one in a.fields) if support(part)]
    theirs = [part for part in (one.take([0], axis=rows) for one in b.fields) if support(part)]
    fields: list[Field] = []
    for one in (*ours, *theirs):
        for other in [other for other in fields if support(one) & support(other)]:
            fields = [kept for kept in fields if kept is not other]
            one = tracer.merged(other, one)
        if support(one):
            fields.append(one)
    # both factors have the same batch: where one is labelled and the other is not, it must stay whole
    for factor, own in ((left, ours), (right, theirs)):
        labelled = frozenset().union(*(support(one) for one in own))
        blocked = [dim for dim in range(rows) if factor.shape[dim] > 1 and dim not in labelled]
        fields = whole(tracer, fields, blocked, f"{at} multiplies along a batch of channels")
    tracer.set(call.output, TensorRecord(fields, at, a.parameter and b.parameter))
    _note_product(tracer, left, right, call.output, fields)


def _note_product(
    tracer: Tracer,
    left: Tensor,
    right: Tensor,
    output: Tensor,
    fields: list[Field],
) -> None:
    """Note what the product costs: rows and columns, and the batch in front of them."""
    columns = next((one for one in fields if support(one) == {output.ndim - 1}), None)
    tracer.operations.append(
        TracedOperation(
            module=tracer.module,
            kind="product",
            weight=None,
            bias=None,
            inputs=None,
            outputs=None if columns is None else columns.ravel(),
            input_count=left.shape[-1],
            output_count=right.shape[-1],
            repeats=prod(left.shape[:-1]) / tracer.examples(left, right),
            batch=_flat([one for one in fields if output.ndim - 1 not in support(one)]),
            input_shape=tuple(left.shape),
            output_shape=tuple(output.shape),
        )
    )


def attention(tracer: Tracer, call: Call) -> None:
    """Scaled dot product attention of ``(B, heads, N, D)``: heads may go, widths stay (they set the scale)."""
    query, key, value = call.args[:3]
    at = f"{where(tracer, call)} mixes channels by attention"
    records = [tracer.record(tensor) for tensor in (query, key, value)]
    axis = query.ndim - 3  # of the heads
    sides: list[list[Field]] = []
    for record, tensor in zip(records, (query, key, value), strict=True):
        dims = [dim for dim in range(tensor.ndim) if dim != axis]
        sides.append(whole(tracer, record.fields, dims, at))
    mask = call.arg(5, "attn_mask") if call.name.endswith("for_cpu") else call.arg(3, "attn_mask")
    if isinstance(mask, Tensor) and mask.ndim == query.ndim and mask.shape[axis] > 1:
        sides.append(whole(tracer, tracer.record(mask).fields, [dim for dim in range(mask.ndim) if dim != axis], at))
    heads: list[Field] = []
    if all(sides):
        for side in sides[1:]:
            tracer.book.unite(sides[0][0], side[0])
        heads = [sides[0][0]]
    else:
        for side in sides:
            tracer.freeze(side, at)
    pass_on(tracer, call, heads, TensorRecord([], at))
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
                repeats=prod(query.shape[:-1]) / tracer.examples(query, key, value),
                batch=_flat(heads),
            )
        )


def _flat(fields: list[Field]) -> tuple[NDArray[np.int64], ...]:
    """Labels of rows, batches and heads, each in a row."""
    return tuple(one.ravel() for one in fields)
