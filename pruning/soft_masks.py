"""Soft masks: channels and residual blocks that are there in part, so that a loss can be differentiated by how much.

At 0 and 1 the network computes what its masked twin does (:mod:`prunegym.pruning.surgery`): channels are masked where
they are read, and a block at 0 gives back its input.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegym.pruning.attention import headwise
from prunegym.pruning.graph import ChannelGraph, Operation, Units
from prunegym.pruning.importance.reading import reading_through


class SoftMasks:
    """Multiplies channels by a factor each, and blends residual blocks with their input.

    Channels are multiplied where layers read them. Those that no layer reads, such as the queries and keys of an
    attention, are multiplied where modules make them.

    Args:
        model: the network.
        graph: its channel graph.
        blocks: paths of residual blocks.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, blocks: Collection[str] = ()) -> None:
        self._model, self._graph = model, graph
        self.units = torch.ones(graph.units + 1)
        """Factor of each unit ``(units + 1,)``; the last stands for channels that are always kept, and is 1."""
        self.blocks = {path: torch.ones(()) for path in blocks}
        """How much of each block is there, in [0, 1]."""

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the masks work while the network runs."""
        with headwise(self._model), ExitStack() as stack:
            modules = dict(self._model.named_modules())
            read = np.zeros(self._graph.units + 1, dtype=np.bool_)
            for operation in stack.enter_context(reading_through(self._model, self._graph, self._masked_read)):
                read[operation.inputs] = True
            for operation in self._graph.operations:
                maker, units = modules.get(operation.module), operation.outputs
                unread = np.where(read[units], -1, units)
                if isinstance(maker, nn.Linear | nn.modules.conv._ConvNd) and (unread >= 0).any():
                    stack.callback(maker.register_forward_hook(self._making(unread)).remove)
            for path in self.blocks:
                hook = self._blending(path)
                stack.callback(modules[path].register_forward_hook(hook, with_kwargs=True).remove)
            yield

    def _masked_read(self, operation: Operation, data: Tensor) -> Tensor:
        return self._masked(data, torch.from_numpy(operation.inputs), last=operation.kind == "linear")

    def _making(self, units: Units) -> Any:
        where = torch.from_numpy(units)

        def mask(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            return self._masked(output, where, last=isinstance(module, nn.Linear))

        return mask

    def _blending(self, path: str) -> Any:
        def blend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
            there = self.blocks[path].to(output)
            blended: Tensor = there * output + (1 - there) * args[0]
            return blended

        return blend

    def _masked(self, data: Tensor, units: Tensor, *, last: bool) -> Tensor:
        """Data of a layer with its channels multiplied; unit -1 is the last factor."""
        factor = self.units.to(data)[units.to(data.device)]
        masked: Tensor = data * (factor if last else factor.view(-1, *[1] * (data.ndim - 2)))
        return masked
