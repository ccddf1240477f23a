"""What calibration data show of a network: activations, covariances, and the loss each channel is worth.

Everything is measured where channels are *read*: at the input of each layer that sums over channels. Removing
a channel means removing exactly those reads, so the first-order change of the loss is the sum over readers of
activation times gradient.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegym.pruning.attention import headwise
from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.batch_axes import BATCH_SIZES, BatchAxes, rows_beside_examples
from prunegym.pruning.importance.reading import InputMoments, channel_rows, per_example, reading_through, watched
from prunegym.pruning.importance.residuals import EXAMPLES, PROBE_SEED, ResidualChanges
from prunegym.pruning.modes import differentiating, evaluating
from prunegym.pruning.task import Inputs, Task, forward, running

MAX_COVARIANCE = 4096
"""Layers with more input channels than this get no covariance (64 MiB in float32) and no compensation."""


@dataclass
class Statistics:
    """Data-aware statistics per unit ``(units,)``; units that are gone hold 0."""

    examples: int
    loss: float
    activation_mean: NDArray[np.float64]
    """Mean of the absolute activation where the channel is read."""
    activation_variance: NDArray[np.float64]
    activation_sparsity: NDArray[np.float64]
    """Share of exact zeros."""
    taylor: NDArray[np.float64]
    """Mean absolute first-order change of the loss when the channel is removed."""
    taylor_squared: NDArray[np.float64]
    """Mean squared first-order change per example (Molchanov et al., CVPR 2019)."""
    residual_taylor: NDArray[np.float64]
    """Mean squared first-order change of the outputs, as a share of their variance, when what better channels cannot
    replace of the channel is lost, see :mod:`~prunegym.pruning.importance.residuals`."""
    inputs: dict[str, InputMoments] = field(default_factory=dict)
    """Moments of the inputs of each mixing layer, by weight name."""


def collect_statistics(
    model: nn.Module,
    graph: ChannelGraph,
    task: Task,
    *,
    mask: NDArray[np.bool_] | None = None,
    examples: int = 512,
    batch_size: int = 64,
    split: str = "calibration",
    covariances: bool = True,
    device: torch.device | str = "cpu",
) -> Statistics:
    """Run calibration examples forward and backward through a network.

    Args:
        model: the network, unpruned or pruned by ``mask``; run in eval mode, not changed.
        graph: channel graph of the unpruned network.
        task: gives batches and the loss.
        mask: units that ``model`` still has ``(units,)``; all by default.
        examples: calibration examples used.
        batch_size: examples per backward pass.
        split: the split they come from.
        covariances: also collect the second moments that compensation needs.
        device: where to run.
    """

    def few(size: int) -> Iterable[tuple[Inputs, Any]]:
        return task.batches(split, batch_size=size, limit=size, device=device)

    left = np.ones(graph.units, dtype=np.bool_) if mask is None else mask
    observer = _Observer(graph, left, covariances)
    losses = 0.0
    # gradients of activations are all that is needed; those of weights would cost another third
    with evaluating(model), headwise(model), differentiating(model):
        observer.axes = find_batch_axes(model, graph, few)
        with observer.attached(model), torch.enable_grad():
            for inputs, targets in task.batches(split, batch_size=batch_size, limit=examples, device=device):
                count = _examples_in(inputs)
                with running("run on batches of any size, and pass gradients back", task, count):
                    observer.start_batch(count, device)
                    loss = task.loss(forward(model, inputs), targets)
                    if loss.requires_grad:  # else no reader ran: every change is 0
                        (loss * count).backward()
                    observer.end_batch()
                losses += float(loss.detach()) * count
        observer.warn_of_untold()
        statistics = observer.statistics(losses)
        residuals = ResidualChanges(graph, left, statistics.inputs, statistics.taylor, observer.axes)
        generator = torch.Generator().manual_seed(PROBE_SEED)
        with residuals.attached(model), torch.enable_grad():
            for inputs, _ in task.batches(split, batch_size=batch_size, limit=min(examples, EXAMPLES), device=device):
                residuals.add(forward(model, inputs), _examples_in(inputs), device, generator)
        return replace(statistics, residual_taylor=residuals.scores())


def without_gradient(graph: ChannelGraph, statistics: Statistics) -> list[str]:
    """Names of groups whose channels are active, and yet all change the loss by exactly 0: no gradient came through.

    A ``detach()`` after them does that. Where it is so of every group, the loss is at its least, and nothing is told.
    """
    blind = [
        group.name
        for group in graph.groups
        if statistics.activation_mean[group.units].any() and not statistics.taylor[group.units].any()
    ]
    return blind if len(blind) < len(graph.groups) else []


def find_batch_axes(
    model: nn.Module, graph: ChannelGraph, batches: Callable[[int], Iterable[tuple[Inputs, Any]]]
) -> BatchAxes:
    """Run a network on a few examples, twice, to see which dimensions of what its linear layers read count them.

    Args:
        model: the network, in eval mode and with attention by heads.
        graph: channel graph of the unpruned network.
        batches: gives batches of a size.

    Returns:
        What was found; nothing if linear layers read one row per example, or if the network does not run so.
    """
    if not rows_beside_examples(graph):
        return BatchAxes()  # networks of convolutions are spared the two runs
    seen: list[tuple[int, dict[tuple[str, int], list[tuple[int, ...]]]]] = []

    def note(operation: Operation, source: Tensor) -> Tensor:
        if operation.kind == "linear":
            seen[-1][1][str(operation.weight), source.ndim].append(tuple(source.shape))
        return source

    try:
        with reading_through(model, graph, note), torch.no_grad():
            for size in BATCH_SIZES:
                inputs, _ = next(iter(batches(size)))
                seen.append((_examples_in(inputs), defaultdict(list)))
                forward(model, inputs)
    except Exception:  # where it matters, the error is raised again, and told, by the run on whole batches
        return BatchAxes()
    (few, small), (more, large) = seen
    return BatchAxes.compared(few, small, more, large)


def _examples_in(inputs: Inputs) -> int:
    return next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))


class _Observer:
    """Accumulates moments in forward hooks and first-order changes in backward hooks."""

    def __init__(self, graph: ChannelGraph, mask: NDArray[np.bool_], covariances: bool) -> None:
        self.graph = graph
        self.covariances = covariances
        self.examples = 0
        self.axes = BatchAxes()
        self._untold: dict[str, tuple[int, ...]] = {}
        self._padded = np.append(mask, True)
        self._sums: dict[str, tuple[int, Tensor, Tensor | None]] = {}
        self._units: dict[str, Tensor] = {}
        units = graph.units
        self._absolute, self._square, self._zeros, self._reads = (torch.zeros(units + 1) for _ in range(4))
        self._mean = torch.zeros(units + 1)
        self._taylor, self._taylor_squared = torch.zeros(units + 1), torch.zeros(units + 1)
        self._changes = torch.zeros(0)
        self._pending: list[tuple[Tensor, Tensor]] = []

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        with reading_through(model, self.graph, self._read) as operations:
            for operation in operations:
                units = operation.inputs[self._padded[operation.inputs]]
                self._units[str(operation.weight)] = torch.from_numpy(np.where(units < 0, self.graph.units, units))
            yield

    def _read(self, operation: Operation, source: Tensor) -> Tensor:
        """Look at what an operation reads; what it should read instead is an alias."""
        name, last = str(operation.weight), operation.kind == "linear"
        data = source.detach()
        axis = self.axes.of(operation, data, len(self._changes))
        if axis is None:
            self._untold.setdefault(name, tuple(data.shape))
        self._accumulate(name, channel_rows(data, last), data.shape[axis or 0])
        return watched(source, lambda gradient: self._add_change(name, axis, last, data, gradient))

    def _accumulate(self, name: str, rows: Tensor, examples: int) -> None:
        """Add a layer's input ``(channels, positions)``; batches weigh as many as their examples."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))  # sums of half precision lose too much
        channels, count = rows.shape
        total = rows.sum(1, dtype=torch.float64)
        product = (rows @ rows.T).double() if self.covariances and channels <= MAX_COVARIANCE else None
        seen, old_total, old_product = self._sums.get(name, (0, torch.zeros_like(total), None))
        if product is not None and old_product is not None:
            product += old_product
        self._sums[name] = (seen + count, old_total + total, product)
        units = self._units[name].to(rows.device)
        for store, values in (
            (self._absolute, rows.abs().mean(1)),
            (self._mean, rows.mean(1)),
            (self._square, rows.square().mean(1)),
            (self._zeros, (rows == 0).float().mean(1)),
            (self._reads, torch.ones(channels)),
        ):
            store.index_add_(0, units.cpu(), values.cpu().float(), alpha=examples)

    def _add_change(self, name: str, axis: int | None, last: bool, data: Tensor, gradient: Tensor) -> None:
        change = per_example(data * gradient, axis, last, len(self._changes))
        self._changes.index_add_(1, self._units[name].to(change.device), change.float())

    def start_batch(self, count: int, device: torch.device | str) -> None:
        self._changes = torch.zeros(count, self.graph.units + 1, device=device)

    def end_batch(self) -> None:
        changes = self._changes.cpu()
        self.examples += len(changes)
        self._taylor += changes.abs().sum(0)
        self._taylor_squared += changes.square().sum(0)

    def warn_of_untold(self) -> None:
        """Tell of layers whose changes of the loss are not known example by example."""
        if not self._untold:
            return
        names = [name.removesuffix(".weight") for name in self._untold]
        some = f"{', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"
        warnings.warn(
            f"no dimension of the inputs of {some} counts the examples of a batch (that of {names[0]} has the shape "
            f"{next(iter(self._untold.values()))}), so that Taylor criteria, the knapsack and policies take the mean "
            "change of the loss over a batch for that of each example, which is too small. Let one dimension of these "
            "inputs be the batch, or `--keep` their channels",
            stacklevel=3,
        )

    def statistics(self, losses: float) -> Statistics:
        count = max(self.examples, 1)
        reads = self._reads.clamp(min=1)
        mean = self._mean / reads
        inputs = {}
        for name, (seen, total, product) in self._sums.items():
            first = total / seen
            covariance = None if product is None else (product / seen - torch.outer(first, first)).float()
            inputs[name] = InputMoments(first.float(), covariance)

        def units(values: Tensor) -> NDArray[np.float64]:
            return values[:-1].double().numpy()

        return Statistics(
            examples=self.examples,
            loss=losses / count,
            activation_mean=units(self._absolute / reads),
            activation_variance=units((self._square / reads - mean.square()).clamp(min=0)),
            activation_sparsity=units(self._zeros / reads),
            taylor=units(self._taylor / count),
            taylor_squared=units(self._taylor_squared / count),
            residual_taylor=np.zeros(self.graph.units),  # of another run, which needs these moments
            inputs=inputs,
        )
