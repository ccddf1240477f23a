"""Where prunable channels are read, and how what is read is laid out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.functional_reads import FunctionalReads, functional_reads

Reader: TypeAlias = nn.Linear | nn.modules.conv._ConvNd


@dataclass
class InputMoments:
    """First and second moments of a layer's input channels over examples and positions."""

    mean: Tensor
    """``(C,)``"""
    covariance: Tensor | None
    """Centred, ``(C, C)``; None for very wide layers."""


def reader_modules(graph: ChannelGraph, model: nn.Module) -> dict[str, tuple[Operation, Reader]]:
    """Mixing layers that are modules of their own and read prunable channels, by weight name."""
    modules = dict(model.named_modules())
    readers: dict[str, tuple[Operation, Reader]] = {}
    for operation in graph.operations:
        module = modules.get(operation.module)
        if (
            operation.mixes
            and operation.weight == f"{operation.module}.weight"
            and isinstance(module, nn.Linear | nn.modules.conv._ConvNd)
            and (operation.inputs >= 0).any()
        ):
            readers[operation.weight] = (operation, module)
    return readers


def all_readers(graph: ChannelGraph, model: nn.Module) -> list[tuple[Operation, Reader]]:
    """Those modules, and others that read with the same weight: there are several where weights are tied."""
    modules, readers = dict(model.named_modules()), reader_modules(graph, model)
    found = {operation.module: (operation, module) for operation, module in readers.values()}
    for operation in graph.operations:
        first, module = readers.get(str(operation.weight)), modules.get(operation.module)
        if first is None or not isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            continue
        if module.weight is first[1].weight:
            found.setdefault(operation.module, (operation, module))
    return list(found.values())


@contextmanager
def reading_through(
    model: nn.Module, graph: ChannelGraph, read: Callable[[Operation, Tensor], Tensor]
) -> Iterator[list[Operation]]:
    """While it is entered, what layers and functions read of prunable channels passes through ``read`` first.

    Yields:
        The operations that read.
    """

    def hook(operation: Operation) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        return lambda _, args: (read(operation, args[0]), *args[1:])

    readers = all_readers(graph, model)
    others = functional_reads(graph, model, [operation.weight for operation, _ in readers])
    with ExitStack() as stack:
        for operation, module in readers:
            stack.callback(module.register_forward_pre_hook(hook(operation)).remove)
        if others:
            stack.enter_context(FunctionalReads(model, others, read))
        yield [*(operation for operation, _ in readers), *others]


def channel_rows(data: Tensor, last: bool) -> Tensor:
    """A layer's input as ``(channels, examples * positions)``; channels are its last dimension or its second."""
    return data.reshape(-1, data.shape[-1]).T if last else data.transpose(0, 1).reshape(data.shape[1], -1)


def watched(source: Tensor, on_gradient: Callable[[Tensor], object]) -> Tensor:
    """What is to be read in place of ``source``, so that the gradient of this reader alone is told when it comes back.

    Where nothing behind it is differentiated (the first readers), the graph starts here. A backbone under ``no_grad``
    matters to the loss all the same; its own ``with`` restores what held before.
    """
    torch.set_grad_enabled(True)
    alias = (source if source.requires_grad else source.detach().requires_grad_()).view_as(source)
    alias.register_hook(on_gradient)
    return alias


def per_example(product: Tensor, axis: int | None, last: bool, count: int) -> Tensor:
    """Sum what belongs to one example and one channel: ``(count, channels)``.

    Args:
        product: in the layout of what a layer reads.
        axis: the dimension that counts the examples; None where none is known: each gets the mean of the batch.
        last: whether channels are the last dimension, else the second.
        count: examples.
    """
    product = product.movedim(axis or 0, 0)
    if last:
        change = product.reshape(product.shape[0], -1, product.shape[-1]).sum(1)
    else:
        change = product.flatten(2).sum(2)
    if axis is None:
        return change.sum(0, keepdim=True).expand(count, -1) / count
    # several rows per example (windows, frames) stand one behind another; sum them
    return change.reshape(count, -1, change.shape[1]).sum(1)
