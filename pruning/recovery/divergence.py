"""How far a pruned network's outputs are from the unpruned one's, without labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from prunegym.pruning.errors import PruningError
from prunegym.pruning.nests import tensors_in
from prunegym.pruning.training.distillation import distillation_loss


def divergence(outputs: Any, wanted: Any, temperature: float = 1.0) -> Tensor:
    """Divergence of outputs from those of the unpruned network: a scalar, 0 where they are the same.

    Logits ``(B, classes)``, ``(B, classes, ...)`` are compared as distributions, by the Kullback-Leibler divergence in
    nats; where a network returns several tensors, each by its squared error as a share of the variance of what is
    wanted, and the mean is taken.

    Raises:
        PruningError: the two are of different kinds or shapes.
    """
    present, target = _tensors(outputs), _tensors(wanted)
    if [one.shape for one in present] != [one.shape for one in target] or not target:
        raise PruningError(
            "`network` should return what the unpruned network returns. Received outputs of the shapes "
            f"{[tuple(one.shape) for one in present]} for {[tuple(one.shape) for one in target]}. "
            "Choose another recovery than distill, or score it by its task."
        )
    if isinstance(outputs, Tensor) and outputs.ndim > 1 and outputs.shape[1] > 1:
        return distillation_loss(outputs, target[0], temperature)
    errors = [
        (one.float() - other.float()).square().mean() / other.float().var(correction=0).clamp(min=1e-6)
        for one, other in zip(present, target, strict=True)
    ]
    return torch.stack(errors).mean()


def _tensors(value: Any) -> list[Tensor]:
    return [one for one in tensors_in(value) if one.is_floating_point()]
