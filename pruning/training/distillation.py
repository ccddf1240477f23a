"""Imitation of a teacher's outputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.task import Inputs, forward


def distillation_loss(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    r"""Divergence of softened outputs from the teacher's.

    .. math:: T^2 \; \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    Args:
        outputs: Logits :math:`s`, ``(B, classes, ...)``.
        teacher_outputs: Logits :math:`t` of the same shape.
        temperature: :math:`T`; the factor keeps the gradient's size comparable across temperatures.

    Returns:
        Mean over everything but the classes: a scalar, in nats.

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    target = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


@dataclass(frozen=True)
class Imitation:
    """What of a loss is imitation.

    Args:
        teacher: The network that is imitated, in evaluation mode and on the device of the inputs.
        weight: Share of the imitation in the loss, in [0, 1].
        temperature: Softens the outputs that are compared.
    """

    teacher: nn.Module
    weight: float
    temperature: float

    def mixed(self, loss: Tensor, inputs: Inputs, outputs: Any) -> Tensor:
        """Mix the imitation into the loss that ``outputs`` have for ``inputs``.

        Raises:
            PruningError: The teacher's outputs are of another kind or shape.
        """
        with torch.no_grad():
            wanted = forward(self.teacher, inputs)
        if not isinstance(outputs, Tensor) or not isinstance(wanted, Tensor) or outputs.shape != wanted.shape:
            raise PruningError(
                "`teacher` should return one tensor of the shape the network returns. Received "
                f"{_shape(wanted)} for {_shape(outputs)}. Train without a teacher, or with a fitting one."
            )
        return (1 - self.weight) * loss + self.weight * distillation_loss(outputs, wanted, self.temperature)


def _shape(value: Any) -> str:
    """Describe what a network returned."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__
