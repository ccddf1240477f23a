r"""What a network loses with a channel that better ones cannot replace: residual Taylor scores.

After pruning, each layer that reads a channel is fitted anew, and what correlates with channels that are left is made
up for. So a channel is worth only what is new in it: the residual of its regression on the channels that are kept in
its stead. Per reader the channels are ordered, the best by the Taylor criterion first, and the Cholesky factor ``L`` of
their covariance gives all these regressions at once: ``z = L^-1 (a - mean)`` are the residuals (of unit variance) of
each channel on all before it. The first-order change of a function ``f`` of the outputs when residual ``j`` is lost is

.. math:: \Delta_j = \sum_{positions} z_j (L^T \partial f / \partial a)_j

whatever of the channels after ``j`` is lost with it. The score of a channel is the mean over examples of the square of
its sum over readers, as in the Taylor criterion of Molchanov et al., CVPR 2019; here ``f`` is a random projection of
the outputs, each as a share of its deviation, so that no labels are used and networks that fit their data without error
have gradients too. The expectation is the change of the outputs, as a share of their variance, to first order.

Scores can be added and compared across groups.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.batch_axes import BatchAxes
from prunegym.pruning.importance.reading import InputMoments, channel_rows, per_example, reading_through, watched
from prunegym.pruning.nests import tensors_in

EXAMPLES = 256
"""Most examples that are run."""
RIDGE = 1e-3
"""Ridge of the regressions, as a share of the mean variance."""
PROBE_SEED = 0
"""Of the random projection, the same for every network."""
_TINY = 1e-12


def probe(outputs: Any, generator: torch.Generator) -> Tensor | None:
    """A random projection of all outputs that gradients go through, each as a share of its deviation; a scalar."""
    parts = []
    for one in tensors_in(outputs):
        if one.is_floating_point() and one.requires_grad:
            noise = torch.randn(one.shape, generator=generator).to(one)
            scale = one.detach().float().std(correction=0).clamp(min=_TINY) * (one.numel() / max(len(one), 1)) ** 0.5
            parts.append((one * noise).float().sum() / scale)
    return torch.stack(parts).sum() if parts else None


class ResidualChanges:
    """Accumulates the changes that residuals make.

    Args:
        graph: channel graph of the unpruned network.
        mask: units that are left ``(units,)``.
        moments: of what each layer reads, by weight name.
        taylor: criterion by which channels are ordered ``(units,)``.
        axes: which dimensions count examples.
    """

    def __init__(
        self,
        graph: ChannelGraph,
        mask: NDArray[np.bool_],
        moments: Mapping[str, InputMoments],
        taylor: NDArray[np.float64],
        axes: BatchAxes,
    ) -> None:
        self.graph = graph
        self.examples = 0
        self._padded = np.append(mask, True)
        self._moments = moments
        self._axes = axes
        self._place = np.append(_places(graph, taylor), -1.0)  # channels that always stay come first
        self._factors: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
        self._units: dict[str, Tensor] = {}
        self._changes = torch.zeros(0)
        self._squares = torch.zeros(graph.units + 1, dtype=torch.float64)

    @contextmanager
    def attached(self, model: nn.Module) -> Iterator[None]:
        """Watch what is read, and the gradients that come back."""
        with reading_through(model, self.graph, self._read) as operations:
            for operation in operations:
                self._prepare(operation)
            yield

    def add(self, outputs: Any, count: int, device: torch.device | str, generator: torch.Generator) -> None:
        """Run a batch of so many examples backwards from its outputs."""
        self._changes = torch.zeros(count, self.graph.units + 1, device=device)
        value = probe(outputs, generator)
        if value is not None:
            value.backward()
        self._squares += self._changes.double().square().sum(0).cpu()
        self.examples += count

    def scores(self) -> NDArray[np.float64]:
        """Mean squares ``(units,)``."""
        result: NDArray[np.float64] = (self._squares[:-1] / max(self.examples, 1)).numpy()
        return result

    def _prepare(self, operation: Operation) -> None:
        name = str(operation.weight)
        units = operation.inputs[self._padded[operation.inputs]]
        units = np.where(units < 0, self.graph.units, units)
        moments = self._moments.get(name)
        if moments is not None:  # else it did not run
            device = moments.mean.device
            order = torch.from_numpy(np.argsort(self._place[units], kind="stable")).to(device)
            self._units[name] = torch.from_numpy(units).to(device)
            self._factors[name] = (order, moments.mean, _factor(moments.covariance, order))

    def _read(self, operation: Operation, source: Tensor) -> Tensor:
        data = source.detach()
        return watched(source, lambda gradient: self._add_change(operation, data, gradient))

    def _add_change(self, operation: Operation, data: Tensor, gradient: Tensor) -> None:
        name, last = str(operation.weight), operation.kind == "linear"
        if name not in self._factors:
            return
        order, mean, factor = self._factors[name]
        rows = channel_rows(data, last).float() - mean[:, None]
        slopes = channel_rows(gradient, last).float()
        if factor is None:
            product = rows * slopes
        else:
            residuals = torch.linalg.solve_triangular(factor, rows[order], upper=False)
            product = torch.empty_like(rows).index_copy_(0, order, residuals * (factor.T @ slopes[order]))
        if last:
            product = product.T.reshape(data.shape)
        else:
            product = product.reshape(data.shape[1], data.shape[0], *data.shape[2:]).transpose(0, 1)
        count = len(self._changes)
        change = per_example(product, self._axes.of(operation, data, count), last, count)
        self._changes.index_add_(1, self._units[name], change)


def _places(graph: ChannelGraph, taylor: NDArray[np.float64]) -> NDArray[np.float64]:
    """Where each unit stands in its group, best first, from 0 to 1: one order for channels of several groups."""
    places = np.zeros(graph.units)
    for group in graph.groups:
        order = np.argsort(-taylor[group.units], kind="stable")
        places[group.start + order] = np.arange(group.size) / group.size
    return places


def _factor(covariance: Tensor | None, order: Tensor) -> Tensor | None:
    """Cholesky factor of an ordered covariance; None where there is none."""
    if covariance is None:
        return None
    ordered = covariance.double()[order][:, order]
    ordered.diagonal().add_(RIDGE * ordered.diagonal().mean().clamp(min=_TINY))
    factor, failed = torch.linalg.cholesky_ex(ordered)
    return None if int(failed) else factor.float()
