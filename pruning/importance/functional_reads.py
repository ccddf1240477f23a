"""Layers that are no modules: channels read by ``F.conv2d(x, self.weight)`` and the like."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from prunegym.pruning.graph import ChannelGraph, Operation

_READING = {
    *(torch.conv1d, torch.conv2d, torch.conv3d),
    *(torch.conv_transpose1d, torch.conv_transpose2d, torch.conv_transpose3d),
    *(F.linear, torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__),
}


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
        self._operations = {id(parameters[str(one.weight)]): one for one in operations}
        self._read = read

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Run the function, on another input where it is one of the reads."""
        kwargs = kwargs or {}
        weight = args[1] if len(args) > 1 else kwargs.get("weight")
        if func in _READING and args and isinstance(weight, Tensor):
            operation = self._operations.get(id(weight if weight._base is None else weight._base))
            if operation is not None:
                args = (self._read(operation, args[0]), *args[1:])
        return func(*args, **kwargs)


def functional_reads(graph: ChannelGraph, model: nn.Module, modules: Sequence[str | None]) -> list[Operation]:
    """Reads of prunable channels by parameters that are no weights of reading modules.

    Args:
        graph: channel graph of the network.
        model: the network.
        modules: weights of those modules.
    """
    names = {name for name, _ in model.named_parameters()} - {*modules}
    return [one for one in graph.operations if one.mixes and one.weight in names and (one.inputs >= 0).any()]
