"""Criteria that look at weights alone."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.importance.context import Context, Scores


def filters(group: ChannelGroup, context: Context) -> list[Tensor]:
    """The weights that make each channel: one ``(group.size, weights)`` matrix per producing layer.

    Rows of channels that are gone are 0, and layers of blocks that are left out make nothing.
    """
    parameters = dict(context.model.named_parameters())
    parts = []
    seen: set[str] = set()  # a layer that is used twice has one matrix
    for operation in context.graph.operations:
        if operation.module not in group.producers or operation.weight is None or operation.weight in seen:
            continue
        if operation.weight not in parameters:
            continue
        # a grouped weight holds all groups along its first dimension, and with it all units: along the outputs, or if
        # it is that of a transposed convolution along the inputs, which are one unit with the outputs of their group
        transposed = operation.reads == 0
        rows_of = operation.inputs if operation.groups > 1 and transposed else operation.outputs
        units = context.remaining(rows_of)
        local = units - group.start
        mine = np.flatnonzero((units >= 0) & (local >= 0) & (local < group.size))
        if len(mine) == 0:
            continue
        seen.add(operation.weight)
        # several channels of one layer may be one unit (grouped convolution): they stand side by side in its
        # row
        mine = mine[np.argsort(local[mine], kind="stable")]
        weight = parameters[operation.weight].detach()
        makes = 0 if operation.groups > 1 else 1 - operation.reads
        left = torch.from_numpy(np.unique(local[mine]))
        rows = weight.movedim(makes, 0)[torch.from_numpy(mine)].reshape(len(left), -1).double().cpu()
        parts.append(rows.new_zeros(group.size, rows.shape[1]).index_copy(0, left, rows))
    return parts


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
    """Absolute batch normalisation scale, summed.

    Groups without batch normalisation are ranked by :func:`l2`.

    References:
        Liu et al., "Learning Efficient Convolutional Networks through Network Slimming", ICCV 2017.
    """
    total = torch.zeros(group.size, dtype=torch.float64)
    found = False
    for name, module in context.model.named_modules():
        units = context.graph.axes.get((f"{name}.weight", 0))
        if not isinstance(module, nn.modules.batchnorm._BatchNorm) or units is None or module.weight is None:
            continue
        units = context.remaining(units)
        inside = (units >= group.start) & (units < group.start + group.size)
        if inside.any():
            found = True
            scale = module.weight.detach().abs().double().cpu()[torch.from_numpy(inside)]
            total.index_add_(0, torch.from_numpy(units[inside] - group.start), scale)
    return total.numpy() if found else l2(group, context)


def fpgm(group: ChannelGroup, context: Context) -> Scores:
    r"""Distance of each filter to all others that are left; small means replaceable.

    .. math:: s_i = \sum_j \lVert W_i - W_j \rVert_2

    References:
        He et al., "Filter Pruning via Geometric Median", CVPR 2019.
    """
    scores = np.zeros(group.size)
    parts, left = filters(group, context), context.left(group)
    if parts:
        weights = torch.cat(parts, dim=1)[torch.from_numpy(left)]
        # by matrix product, many times faster in wide layers; less their mean, filters are no longer than the
        # distances asked for, and no digits are lost where they are all close
        weights = weights - weights.mean(0)
        distances = torch.cdist(weights, weights, compute_mode="use_mm_for_euclid_dist").fill_diagonal_(0.0)
        scores[left] = distances.sum(1).numpy()
    return scores


def cosine(group: ChannelGroup, context: Context) -> Scores:
    r"""How little a filter resembles the most similar larger one that is left, in [0, 2].

    .. math:: s_i = 1 - \max_{j:\ \lVert W_j \rVert > \lVert W_i \rVert}
        \frac{W_i \cdot W_j}{\lVert W_i \rVert \lVert W_j \rVert}

    A filter whose work a larger one does is replaceable; the larger one is not, nor is a filter by its
    negative, which means something else behind a ReLU. The nearest decides and not the mean, because one is
    enough. (Compared with *all* others, both of two twins would go, and small filters of noise, which resemble
    nothing, would stay: on ResNet-20 that was worse than random.) Of filters of one size the first counts as
    larger. A filter of zeros scores 0, the largest of a group 2.

    References:
        Ayinde et al., "Redundant Feature Pruning for Accelerated Inference in Deep Neural Networks", Neural
        Networks 2019, who cluster filters by this similarity and keep one of each cluster.
    """
    scores = np.zeros(group.size)
    parts, left = filters(group, context), context.left(group)
    if parts:
        weights = torch.cat(parts, dim=1)[torch.from_numpy(left)]
        # largest first, so that the larger ones of a filter are those before it
        size, order = weights.norm(dim=1).sort(descending=True, stable=True)
        directions = F.normalize(weights[order], dim=1, eps=1e-300)
        similarity = (directions @ directions.T).clamp(max=1.0)  # rounding can take a cosine above 1
        before = torch.ones_like(similarity, dtype=torch.bool).tril(-1)
        nearest = similarity.masked_fill(~before, -1.0).max(1).values
        scores[np.flatnonzero(left)[order.numpy()]] = torch.where(size > 0, 1 - nearest, 0.0).numpy()
    return scores


def _total(parts: list[Tensor], group: ChannelGroup) -> Scores:
    total: Scores = sum(parts, torch.zeros(group.size, dtype=torch.float64)).numpy()
    return total
