"""Imitation of a teacher."""

import pytest
import torch
from torch import nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.training.distillation import Imitation, distillation_loss


def test_distillation_loss_is_the_softened_divergence() -> None:
    """Equal to the formula written out, and 0 for the teacher itself."""
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 6, 10, generator=generator)

    loss = distillation_loss(student, teacher, 4.0)

    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    assert torch.allclose(loss, 16 * (p * (p / q).log()).sum(1).mean(), atol=1e-6)
    assert distillation_loss(teacher, teacher, 4.0) == pytest.approx(0, abs=1e-6)


def test_imitation_is_mixed_by_its_weight() -> None:
    """And the teacher learns nothing."""
    teacher, inputs = nn.Linear(3, 5), torch.randn(4, 3)
    outputs, loss = torch.randn(4, 5, requires_grad=True), torch.tensor(2.0)

    mixed = Imitation(teacher, 0.25, 3.0).mixed(loss, inputs, outputs)
    mixed.backward()

    expected = 0.75 * 2.0 + 0.25 * distillation_loss(outputs, teacher(inputs), 3.0)
    assert mixed.item() == pytest.approx(expected.item(), rel=1e-6)
    assert teacher.weight.grad is None


def test_teacher_of_another_kind_is_refused() -> None:
    """A network of several outputs has to be wrapped."""
    with pytest.raises(PruningError, match=r"`teacher` should return one tensor.*Received \(4, 5\) for list"):
        Imitation(nn.Linear(3, 5), 0.5, 1.0).mixed(torch.tensor(0.0), torch.randn(4, 3), [torch.randn(4, 5)])
