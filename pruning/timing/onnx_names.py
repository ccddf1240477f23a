"""Nodes of ONNX files, named after the operations of the channel graph: so that profilers can tell them apart.

Runtimes rename what they fuse, after a node or after its output; so both carry the name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.graph import Operation

_NAME = re.compile(r"op(\d+)!")
#: Nodes that multiply and accumulate.
_CONVOLUTIONS, _PRODUCTS = ("Conv", "ConvTranspose"), ("Gemm", "MatMul")


def operation_of(name: str) -> int | None:
    """Number of the operation that a node was named after; None for what a runtime put in between."""
    found = _NAME.findall(name)
    return int(found[-1]) if found else None


def named_after_operations(
    data: bytes,
    operations: Sequence[Operation],
    inputs: NDArray[np.int64],
    outputs: NDArray[np.int64],
) -> bytes:
    """Name every node after the last operation that begins at or before it, in the order of the file.

    A node is the beginning of the next operation that has its kind and the size of its weight.

    Args:
        data: a serialised ONNX model.
        operations: of the unpruned network.
        inputs: channels that each output reads, in this network ``(operations,)``.
        outputs: output channels, in this network ``(operations,)``.

    Returns:
        The model with new names.
    """
    import onnx

    model = onnx.load_from_string(data)
    graph = model.graph
    sizes = _weight_sizes(graph)
    names: dict[str, str] = {}
    current, following = 0, 0
    for node in graph.node:
        for number in range(following, len(operations)):
            if _begins(node, sizes, operations[number], int(inputs[number]), int(outputs[number])):
                current, following = number, number + 1
                break
        node.name = f"op{current}!{node.name}"
        names |= {output: f"op{current}!{output}" for output in node.output if output}
    for node in graph.node:
        node.input[:] = [names.get(one, one) for one in node.input]
        node.output[:] = [names.get(one, one) for one in node.output]
    for result in graph.output:
        result.name = names.get(result.name, result.name)
    del graph.value_info[:]
    named: bytes = model.SerializeToString()
    return named


def _weight_sizes(graph: Any) -> dict[str, tuple[int, ...]]:
    """Shapes of the constants by name, and by the names of their copies."""
    sizes = {one.name: tuple(one.dims) for one in graph.initializer}
    for node in graph.node:
        if node.op_type in ("Identity", "Transpose") and node.input[0] in sizes:
            sizes[node.output[0]] = sizes[node.input[0]]
    return sizes


def _begins(node: Any, sizes: Mapping[str, tuple[int, ...]], one: Operation, inputs: int, outputs: int) -> bool:
    """True if a node may be an operation of these widths."""
    weight = sizes.get(node.input[1]) if len(node.input) > 1 else None
    if node.op_type in _CONVOLUTIONS:
        if weight is None or weight[2:] != one.kernel:
            return False
        return one.reads == 0 if node.op_type == "ConvTranspose" else weight[:2] == (outputs, inputs)
    if node.op_type not in _PRODUCTS or one.kernel:
        return False
    return one.kind == "product" if weight is None else sorted(weight) == sorted((inputs, outputs))
