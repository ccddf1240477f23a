"""Recalibration: batch normalisation measures its running statistics anew on calibration examples."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunegym.pruning.task import Inputs, forward


@contextmanager
def recalibrating(model: nn.Module) -> Iterator[bool]:
    """Batch normalisation layers average what runs through them, each value once; all else is in eval mode.

    Yields:
        True if the network has such layers. Their momentum is restored at the end: left as it is here, the
        running statistics of a later fine-tuning would be an average over the whole run.
    """
    layers = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
    states = [(layer, layer.momentum) for layer in layers]
    modes = [(module, module.training) for module in model.modules()]
    handles = []
    model.eval()
    for layer in layers:
        layer.reset_running_stats()
        layer.train()
        handles.append(layer.register_forward_pre_hook(_Average()))
    try:
        yield bool(layers)
    finally:
        for handle in handles:
            handle.remove()
        for layer, momentum in states:
            layer.momentum = momentum
        for module, mode in modes:
            module.training = mode


class _Average:
    """Sets a layer's momentum so that a small last batch counts no more than its share.

    On a processor the statistics of channels-last maps are gathered several times slower than those of contiguous
    ones, so these are brought into that order first.
    """

    def __init__(self) -> None:
        self.seen = 0

    def __call__(self, layer: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if args[0].ndim < 2:
            return None  # the layer will say that this is no batch
        count = args[0].numel() // args[0].shape[1]
        layer.training = count > 1  # a single value has no variance: PyTorch refuses it
        if layer.training:
            self.seen += count
            setattr(layer, "momentum", count / self.seen)  # noqa: B010 (a module's attributes are tensors)
        return (args[0].contiguous(), *args[1:]) if args[0].device.type == "cpu" else None


def recalibrate(model: nn.Module, batches: Iterable[Inputs]) -> None:
    """Measure the running statistics of batch normalisation anew, in place.

    Args:
        model: the pruned network.
        batches: inputs of calibration batches.
    """
    if not any(isinstance(module, _BatchNorm) and module.track_running_stats for module in model.modules()):
        return
    with recalibrating(model), torch.no_grad():
        for inputs in batches:
            forward(model, inputs)
