"""Optimisers, and the learning rate of each of their steps."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from prunegym.pruning.errors import PruningError
from prunegym.pruning.training.settings import ScheduleName, TrainingSettings

#: Decay of AdamW's mean squared gradient, its second beta.
_SQUARES_DECAY = 0.999


def learning_rate_at(
    epoch: float, *, epochs: int, warmup_epochs: float, peak: float, schedule: ScheduleName = "cosine"
) -> float:
    """Learning rate of a step: linear from 0 to ``peak``, then half a cosine to 0, or ``peak`` to the end.

    Args:
        epoch: Time in the middle of the step, in epochs since the start.
        epochs: Length of the schedule.
        warmup_epochs: Length of its linear part.
        peak: Highest value.
        schedule: What follows the linear part.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    if schedule == "constant":
        return peak
    remaining = max(epochs - warmup_epochs, 1e-9)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup_epochs) / remaining)))


def make_optimizer(model: nn.Module, settings: TrainingSettings) -> Optimizer:
    """The optimiser of a training. Its state takes device and layout from the parameters as they are now.

    Raises:
        PruningError: There is nothing to train.

    References:
        Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019 (AdamW).
    """
    groups, rate, momentum = _parameter_groups(model, settings.weight_decay), settings.learning_rate, settings.momentum
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, betas=(momentum, _SQUARES_DECAY))
    return torch.optim.SGD(groups, lr=rate, momentum=momentum, nesterov=momentum > 0)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into those that decay and those that do not."""
    trained = trained_parameters(model)
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """What a training changes.

    Raises:
        PruningError: There is nothing.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PruningError(
            "`model` should have parameters that require a gradient. Received one without. Unfreeze it, or do without "
            "training (epochs=0, recovery_steps=0)."
        )
    return trained
