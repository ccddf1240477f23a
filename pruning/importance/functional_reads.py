"""Layers that are no modules: channels read by ``F.conv2d(x, self.weight)`` and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunegym.pruning.graph import ChannelGraph, Operation

_READING: dict[Any, tuple[str, str, int]] = {
    **dict.fromkeys(
        (
            *(torch.conv1d, torch.conv2d, torch.conv3d),
            *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d, F.linear),
        ),
        ("input", "weight", 0),
    ),
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__), ("input", "other", 0)),
    **dict.fromkeys((torch.mm, Tensor.mm), ("input", "mat2", 0)),
    **dict.fromkeys((torch.addmm, Tensor.addmm), ("mat1", "mat2", 1)),
}
"""What a function calls its input and its weight, and the place among its arguments of the input, which goes before."""


class FunctionalReads(TorchFunctionMode):
    """While it is entered, what functions read by some weights passes through ``read`` first.

    Args:
        model: the network.
        operations: the reads, each with a weight of its own.
        read: is given the operation and its input, and returns what is to be read instead.
    """

    def __init__(
        self, model: nn.Module, operations: Sequence[Operation], read: Callable[[Operation, Tensor], Tensor]
    ) -> None:
        super().__init__()
        parameters = dict(model.named_parameters())
        self._operations = {_identity(parameters[str(one.weight)]): one for one in operations}
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the function, on another input where it is one of the reads."""
        kwargs = dict(kwargs or {})
        if func in _READING:
            input_name, weight_name, place = _READING[func]
            weight = args[place + 1] if len(args) > place + 1 else kwargs.get(weight_name)
            operation = self._operations.get(_identity(weight)) if isinstance(weight, Tensor) else None
            if operation is not None and len(args) > place:
                args = (*args[:place], self._read(operation, args[place]), *args[place + 1 :])
            elif operation is not None:
                kwargs[input_name] = self._read(operation, kwargs[input_name])
        return func(*args, **kwargs)


def _identity(weight: Tensor) -> int:
    """By which a weight is known, a view of it too."""
    return id(weight if weight._base is None else weight._base)


def functional_reads(graph: ChannelGraph, model: nn.Module, modules: Sequence[str | None]) -> list[Operation]:
    """Reads of prunable channels by parameters that are no weights of reading modules.

    Args:
        graph: channel graph of the network.
        model: the network.
        modules: weights of those modules.
    """
    names = {name for name, _ in model.named_parameters()} - {*modules}
    return [one for one in graph.operations if one.mixes and one.weight in names and (one.inputs >= 0).any()]
