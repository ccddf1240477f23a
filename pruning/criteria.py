"""Importance criteria: a score for each channel of a group, higher = keep.

Every criterion has one contract: it is given a prunable group and a :class:`Context` and returns a float
array ``(group.size,)``. Scores are comparable within a group; those of ``taylor`` and ``taylor_squared`` are
changes of the loss and comparable across groups too, which is why the allocators use them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.graph import ChannelGraph, ChannelGroup
from prunegym.pruning.statistics import Statistics

Scores: TypeAlias = NDArray[np.float64]


@dataclass
class Context:
    """What criteria may look at."""

    model: nn.Module
    graph: ChannelGraph
    statistics: Statistics | None = None
    """Needed by the data-aware criteria."""
    rng: np.random.Generator | None = None

    def data(self, criterion: str) -> Statistics:
        """The statistics, or an error that names the criterion that needs them."""
        if self.statistics is None:
            raise PruningError(
                f"`criterion` {criterion} needs calibration data. Received no statistics. "
                "Pass a task with a calibration split, or choose l1, l2, bn_scale or fpgm."
            )
        return self.statistics


Criterion: TypeAlias = Callable[[ChannelGroup, Context], Scores]


def filters(group: ChannelGroup, context: Context) -> list[Tensor]:
    """The weights that make each channel: one ``(group.size, weights)`` matrix per producing layer."""
    parameters = dict(context.model.named_parameters())
    rows = []
    seen: set[str] = set()  # a layer that is used twice has one matrix
    for operation in context.graph.operations:
        if operation.module not in group.producers or operation.weight is None or operation.weight in seen:
            continue
        local = operation.outputs - group.start
        mine = np.flatnonzero((operation.outputs >= 0) & (local >= 0) & (local < group.size))
        if len(mine) == 0:
            continue
        seen.add(operation.weight)
        # several channels of one layer may be one unit (grouped convolution): they stand side by side in its
        # row
        mine = mine[np.argsort(local[mine], kind="stable")]
        weight = parameters[operation.weight].detach()
        makes = 0 if operation.groups > 1 else 1 - operation.reads
        rows.append(weight.movedim(makes, 0)[torch.from_numpy(mine)].reshape(group.size, -1).double().cpu())
    return rows


def l1(group: ChannelGroup, context: Context) -> Scores:
    """Sum of absolute weights of the filters.

    References:
        Li et al., "Pruning Filters for Efficient ConvNets", ICLR 2017.
    """
    return _total([part.abs().sum(1) for part in filters(group, context)], group)


def l2(group: ChannelGroup, context: Context) -> Scores:
    """Euclidean norm of the filters."""
    return np.sqrt(_total([part.square().sum(1) for part in filters(group, context)], group))


def bn_scale(group: ChannelGroup, context: Context) -> Scores:
    """Absolute batch normalisation scale, summed (Liu et al., "Network Slimming", ICCV 2017).

    Groups without batch normalisation are ranked by :func:`l2`.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    found = False
    for name, module in context.model.named_modules():
        units = context.graph.axes.get((f"{name}.weight", 0))
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or units is None or module.weight is None:
            continue
        inside = (units >= group.start) & (units < group.start + group.size)
        if inside.any():
            found = True
            scale = module.weight.detach().abs().double().cpu()[torch.from_numpy(inside)]
            total.index_add_(0, torch.from_numpy(units[inside] - group.start), scale)
    return total.numpy() if found else l2(group, context)


def fpgm(group: ChannelGroup, context: Context) -> Scores:
    r"""Distance of each filter to all others; small means replaceable.

    .. math:: s_i = \sum_j \lVert W_i - W_j \rVert_2

    References:
        He et al., "Filter Pruning via Geometric Median", CVPR 2019.
    """
    parts = filters(group, context)
    if not parts:
        return np.zeros(group.size)
    weights = torch.cat(parts, dim=1)
    # the matrix-product form of cdist loses all digits for close filters
    distances = torch.cdist(weights, weights, compute_mode="donot_use_mm_for_euclid_dist")
    scores: Scores = distances.sum(1).numpy()
    return scores


def taylor(group: ChannelGroup, context: Context) -> Scores:
    """Mean absolute first-order change of the loss on removal (Molchanov et al., ICLR 2017)."""
    return context.data("taylor").taylor[group.units].copy()


def taylor_squared(group: ChannelGroup, context: Context) -> Scores:
    """Mean squared first-order change of the loss on removal (Molchanov et al., CVPR 2019)."""
    return context.data("taylor_squared").taylor_squared[group.units].copy()


def activation(group: ChannelGroup, context: Context) -> Scores:
    """Mean absolute activation where the channel is read."""
    return context.data("activation").activation_mean[group.units].copy()


def random(group: ChannelGroup, context: Context) -> Scores:
    """Random scores: the control that every criterion must beat."""
    rng = context.rng if context.rng is not None else np.random.default_rng(0)
    return rng.random(group.size)


CRITERIA: dict[str, Criterion] = {
    "l1": l1,
    "l2": l2,
    "bn_scale": bn_scale,
    "fpgm": fpgm,
    "taylor": taylor,
    "taylor_squared": taylor_squared,
    "activation": activation,
    "random": random,
}


def unit_scores(criterion: str, context: Context) -> Scores:
    """Scores of all units of a network ``(units,)``.

    Raises:
        PruningError: no such criterion, it needs data that are not there, or a score is not finite.
    """
    if criterion not in CRITERIA:
        raise unknown_name("criterion", criterion, CRITERIA)
    groups = context.graph.groups
    scores = np.concatenate([np.empty(0), *(CRITERIA[criterion](group, context) for group in groups)])
    if not np.isfinite(scores).all():
        raise PruningError(
            f"`criterion` {criterion} should give finite scores. Received "
            f"{int((~np.isfinite(scores)).sum())} non-finite ones. Check the weights and the calibration "
            "data for NaN or infinity."
        )
    return scores


def _total(parts: list[Tensor], group: ChannelGroup) -> Scores:
    total: Scores = sum(parts, torch.zeros(group.size, dtype=torch.float64)).numpy()
    return total
