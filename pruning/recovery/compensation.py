"""Compensation: removed input channels are folded into kept ones, by the covariances of the unpruned network."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.reading import reader_modules
from prunegym.pruning.importance.statistics import Statistics

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
