"""Exact cost of any plan without running the network.

The cost of a network depends on how many channels each group keeps, not on which: with ``k`` the vector of
kept counts, a layer's input and output widths are affine in ``k``, and so are the heads it runs on; its
multiply-accumulates (MACs) are their product times a constant. MACs are counted for one example; convolutions,
linear layers and matrix products count, nothing else does. Parameters are all learnable parameters of the rebuilt
network.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.blocks import in_any
from prunegym.pruning.graph import ChannelGraph, Units

Counts = NDArray[np.int64]


@dataclass(frozen=True)
class Cost:
    """What a network costs for one example."""

    macs: int
    parameters: int


class CostModel:
    """Costs of all plans of one network, from kept counts per group.

    Args:
        graph: the network's channel graph.
        model: the unpruned network, for the shapes of its parameters.
        removed: paths of residual blocks that are left out of all plans.
        full: cost of the unpruned network; by default that of all channels.
    """

    def __init__(
        self, graph: ChannelGraph, model: nn.Module, removed: Collection[str] = (), full: Cost | None = None
    ) -> None:
        groups = len(graph.groups)
        self._out, self._out_fixed = _affine(graph, [one.outputs for one in graph.operations], groups)
        inputs = [one.inputs if one.groups == 1 else np.full(one.fan_in, -1) for one in graph.operations]
        self._in, self._in_fixed = _affine(graph, inputs, groups)
        left = [not in_any(one.module, removed) for one in graph.operations]
        self._repeats = np.array([one.repeats for one in graph.operations], dtype=np.float64) * left
        batches = [(row, one) for row, operation in enumerate(graph.operations) for one in operation.batch]
        self._batch_row = np.array([row for row, _ in batches], dtype=np.int64)
        self._batch, self._batch_fixed = _affine(graph, [one for _, one in batches], groups)
        self._batch_full = np.array([len(one) for _, one in batches], dtype=np.float64)
        self._parameters, self._fixed_parameters = self._parameter_terms(graph, model, removed)
        self.full = full or self.cost(graph.sizes)

    @staticmethod
    def _parameter_terms(
        graph: ChannelGraph, model: nn.Module, removed: Collection[str]
    ) -> tuple[list[list[tuple[NDArray[np.float64], float]]], int]:
        """Per prunable parameter its dimensions as affine forms; and the size of all the others together."""
        terms = []
        fixed = 0
        for name, tensor in model.named_parameters():
            if in_any(name, removed):
                continue
            dims = [(dim, graph.axes[name, dim]) for dim in range(tensor.ndim) if (name, dim) in graph.axes]
            if not dims:
                fixed += tensor.numel()
                continue
            matrix, constant = _affine(graph, [units for _, units in dims], len(graph.groups))
            rest = tensor.numel() / np.prod([len(units) for _, units in dims])
            forms = [(matrix[row], float(constant[row])) for row in range(len(dims))]
            terms.append([(np.zeros(len(graph.groups)), float(rest)), *forms])
        return terms, fixed

    def widths(self, counts: Counts) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Input and output channels of each operation ``(operations,)`` for kept counts ``(groups,)``."""
        return self._in @ counts + self._in_fixed, self._out @ counts + self._out_fixed

    def batch_shares(self, counts: Counts) -> NDArray[np.float64]:
        """Share of the rows or heads that each operation still runs on ``(operations,)``."""
        shares = np.ones(len(self._repeats))
        np.multiply.at(shares, self._batch_row, (self._batch @ counts + self._batch_fixed) / self._batch_full)
        return shares

    def operation_macs(self, counts: Counts) -> NDArray[np.float64]:
        """MACs of each operation ``(operations,)``."""
        fan_in, outputs = self.widths(counts)
        return self._repeats * fan_in * outputs * self.batch_shares(counts)

    def soft_macs(self, counts: Tensor, left: Tensor) -> Tensor:
        """MACs at real-valued counts, which can be differentiated; at whole ones the same as :meth:`macs`.

        Args:
            counts: channels kept in each group ``(groups,)`` float64, such as expected ones.
            left: factor on the MACs of each operation ``(operations,)`` float64, such as how likely its block stays.
        """

        def widths(matrix: NDArray[np.float64], fixed: NDArray[np.float64]) -> Tensor:
            return torch.from_numpy(matrix) @ counts + torch.from_numpy(fixed)

        inputs, outputs = widths(self._in, self._in_fixed), widths(self._out, self._out_fixed)
        macs = torch.from_numpy(self._repeats) * left * inputs * outputs
        shares = widths(self._batch, self._batch_fixed) / torch.from_numpy(self._batch_full)
        return macs.scatter_reduce(0, torch.from_numpy(self._batch_row), shares, "prod").sum()

    def macs(self, counts: Counts) -> int:
        """MACs for one example."""
        return round(float(self.operation_macs(counts).sum()))

    def parameters(self, counts: Counts) -> int:
        """Learnable parameters of the rebuilt network."""
        total = float(self._fixed_parameters)
        for forms in self._parameters:
            size = 1.0
            for row, constant in forms:
                size *= float(row @ counts) + constant
            total += size
        return round(total)

    def cost(self, counts: Counts) -> Cost:
        """Both costs."""
        return Cost(self.macs(counts), self.parameters(counts))


def _affine(graph: ChannelGraph, sides: list[Units], groups: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Widths as ``matrix @ counts + fixed``: channels per kept unit of a group, and channels always kept."""
    matrix = np.zeros((len(sides), groups))
    fixed = np.zeros(len(sides))
    sizes = graph.sizes
    for row, units in enumerate(sides):
        free = units[units >= 0]
        fixed[row] = len(units) - len(free)
        if len(free):
            matrix[row] = np.bincount(graph.group_of[free], minlength=groups) / sizes
    return matrix, fixed
