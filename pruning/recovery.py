"""Recovery: what follows pruning without full training.

Compensation folds removed input channels into kept ones; batch normalisation recalibration measures the new
running statistics; a few optimiser steps are the third, optional part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.statistics import Statistics, reader_modules
from prunegym.pruning.inference import InferenceForm
from prunegym.pruning.layout import CONTIGUOUS, lay_out, layout_on
from prunegym.pruning.modes import training_mode
from prunegym.pruning.task import Inputs, Task, forward, running
from prunegym.pruning.training.schedule import trained_parameters

RECOVERY_BATCH = 128
"""Examples of each recovery step."""
RIDGE = 1e-3
"""Ridge term of the compensation, as a share of the mean variance of the kept channels."""


def compensated_tensors(
    model: nn.Module,
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    statistics: Statistics,
    ridge: float = RIDGE,
) -> dict[str, Tensor]:
    r"""Weights and biases of the layers that lose input channels, at full output width.

    Each removed input channel is replaced by its least-squares estimate from the kept ones. With ``S`` the
    covariance of the input channels, ``k`` kept and ``r`` removed,

    .. math:: W'_k = W_k + W_r S_{rk} (S_{kk} + \lambda I)^{-1}

    for every kernel position, and the shift of the mean goes into the bias where there is one. Only
    covariances of the unpruned network are needed, so the cost is one small linear solve per layer.

    Args:
        model: the unpruned network.
        graph: its channel graph.
        mask: units kept ``(units,)``.
        statistics: covariances from :func:`collect_statistics` of the unpruned network.
        ridge: regularisation relative to the mean kept variance.

    Returns:
        Replacement tensors by name: weights whose input dimension is cut, and biases.
    """
    padded = np.append(mask, True)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    result: dict[str, Tensor] = {}
    for name, (operation, module) in reader_modules(graph, model).items():
        keep = padded[operation.inputs]
        moments = statistics.inputs.get(name)
        if keep.all() or moments is None or moments.covariance is None:
            continue
        kept, gone = torch.from_numpy(np.flatnonzero(keep)), torch.from_numpy(np.flatnonzero(~keep))
        covariance = moments.covariance
        exact = torch.promote_types(module.weight.dtype, covariance.dtype)  # half precision is rounded at the end
        mixing = _estimate(covariance, kept, gone, ridge).to(exact)
        weight = module.weight.detach().to(exact).movedim(operation.reads, 0)
        flat = weight.reshape(weight.shape[0], -1)  # (C_in, everything else)
        lost = flat[gone]
        folded = (flat[kept] + mixing @ lost).reshape(len(kept), *weight.shape[1:])
        result[name] = folded.movedim(0, operation.reads).contiguous().to(module.weight.dtype)
        biases = _biases(graph, parameters, operation, module)
        if biases:
            mean = moments.mean.to(exact)
            shift = mean[gone] - mixing.T @ mean[kept]
            summed = lost.reshape(len(gone), *weight.shape[1:]).flatten(2).sum(2) if weight.ndim > 2 else lost
            if isinstance(module, nn.modules.conv._ConvTransposeNd):
                summed = summed / prod(module.stride)  # its taps are shared out among that many outputs
            for own, bias in biases.items():
                result[own] = (bias.detach() + shift @ summed).to(bias.dtype)
    return result


def _biases(
    graph: ChannelGraph, parameters: Mapping[str, Tensor], operation: Operation, module: nn.Module
) -> dict[str, Tensor]:
    """The bias of a layer by its name, and those of others that read with the same weight, where weights are tied."""
    tied = [one.bias for one in graph.operations if one.weight == operation.weight and one.bias is not None]
    found = {name: parameters[name] for name in tied if name in parameters}
    own = getattr(module, "bias", None)
    if operation.bias is not None and isinstance(own, Tensor):
        found[operation.bias] = own
    return found


def _estimate(covariance: Tensor, kept: Tensor, gone: Tensor, ridge: float) -> Tensor:
    """``(S_kk + ridge)^-1 S_kr``, ``(kept, removed)``."""
    block = covariance[kept][:, kept].clone()
    scale = block.diagonal().mean().clamp(min=1e-12)
    block.diagonal().add_(ridge * scale)
    factor, failed = torch.linalg.cholesky_ex(block)
    cross = covariance[kept][:, gone]
    if int(failed):
        solution: Tensor = torch.linalg.lstsq(block, cross).solution
        return solution
    return torch.cholesky_solve(cross, factor)


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


def train_steps(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float = 0.02,
    batch_size: int = RECOVERY_BATCH,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    form: InferenceForm | None = None,
    device: torch.device | str = "cpu",
) -> float:
    """A few optimiser steps on training batches, in place: the third form of recovery.

    Args:
        model: the pruned network.
        task: gives training batches and the loss.
        steps: optimiser steps; the learning rate falls linearly to 0 over them.
        learning_rate: of the first step.
        batch_size: examples per step.
        momentum: Nesterov momentum.
        weight_decay: share of each weight taken off per unit of learning rate.
        seed: of batches and dropout, the same for every plan, so that plans are compared on equal terms.
        form: layout and precision to compute in; weights stay in float32. By default float32.
        device: where to run.

    Returns:
        The last loss.

    Raises:
        PruningError: the loss became NaN or infinite, the network cannot learn, or there are no training batches.
    """
    if steps <= 0:
        return float("nan")
    form = form or InferenceForm((), half=False, layout=layout_on(model, task, "train", device))
    lay_out(model, form.layout)  # before the optimiser takes its layout from the weights
    optimiser = torch.optim.SGD(
        trained_parameters(model), lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, total_iters=steps)
    value = float("nan")
    # dropout draws from the global generator: seeded here, and left as it was
    with training_mode(model), torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        batches = training_batches(task, batch_size, seed, device)
        for step, (inputs, targets) in enumerate(islice(batches, steps)):
            with running("learn in training mode", task, batch_size):
                loss = task.loss(form.run(model, inputs), targets)
                value = float(loss.detach())
            if not np.isfinite(value):
                raise PruningError(
                    f"`learning_rate` should keep the loss finite. Received {learning_rate}, and the loss "
                    f"became {value} at recovery step {step}. Lower it."
                )
            with running("learn in training mode", task, batch_size):
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            optimiser.step()
            schedule.step()
    lay_out(model, CONTIGUOUS)
    return value


def training_batches(
    task: Task, batch_size: int, seed: int, device: torch.device | str
) -> Iterator[tuple[Inputs, Any]]:
    """Training batches without end, always the same for a seed.

    Raises:
        PruningError: there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        empty = True
        for batch in task.batches("train", batch_size=batch_size, train=True, generator=generator, device=device):
            empty = False
            yield batch
        if empty:
            raise PruningError(
                "`task` should give batches of the train split for recovery steps. Received none of "
                f"{batch_size} examples. Give it more training data, or set recovery_steps=0."
            )
