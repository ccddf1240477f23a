"""Optimisers and learning rates of network training."""

import math
from typing import Any

import pytest
import torch
from torch import nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.training.schedule import learning_rate_at, make_optimizer
from prunegym.pruning.training.settings import TrainingSettings


def rate(epoch: float, **changes: Any) -> float:
    """Learning rate of a schedule of ten epochs with two of warm-up."""
    return learning_rate_at(epoch, **{"epochs": 10, "warmup_epochs": 2, "peak": 0.4, **changes})


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    """Linear, then half a cosine, without a jump between them."""
    assert [rate(epoch) for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.2, 0.4, 0.2, 0])
    assert rate(1.9999) == pytest.approx(rate(2.0001), rel=1e-3)


def test_constant_learning_rate_warms_up_and_stays() -> None:
    """The warm-up is that of the cosine."""
    assert [rate(epoch, schedule="constant") for epoch in (0, 1, 2, 6, 10)] == pytest.approx([0, 0.2, 0.4, 0.4, 0.4])


@pytest.mark.parametrize(
    ("warmup", "epochs", "expected"), [(None, 10, 1.0), (None, 200, 5.0), (0.25, 200, 50.0), (0.0, 7, 0.0)]
)
def test_warmup_is_a_share_of_the_epochs(warmup: float | None, epochs: int, expected: float) -> None:
    """By default a tenth, at most five epochs."""
    assert TrainingSettings(epochs=epochs, warmup=warmup).warmup_epochs == pytest.approx(expected)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "adam"}, "`optimizer` should be one of 'adamw', 'sgd'.*Did you mean 'adamw'"),
        ({"schedule": "cosin"}, "`schedule` should be one of .*Did you mean 'cosine'"),
    ],
)
def test_unknown_name_is_refused(changes: dict[str, Any], message: str) -> None:
    """With the nearest."""
    with pytest.raises(PruningError, match=message):
        TrainingSettings(epochs=1, **changes)


def test_adamw_step_equals_the_formula() -> None:
    """The first step moves by the rate along the sign; the decay of the matrix is decoupled, the bias has none."""
    layer = nn.Linear(3, 2)
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    optimizer = make_optimizer(
        layer, TrainingSettings(epochs=1, optimizer="adamw", learning_rate=0.1, weight_decay=0.5)
    )

    layer(torch.ones(4, 3)).sum().backward()
    optimizer.step()

    assert torch.allclose(layer.weight, weight * (1 - 0.1 * 0.5) - 0.1, atol=1e-6)
    assert torch.allclose(layer.bias, bias - 0.1, atol=1e-6)


def test_momentum_is_the_first_beta_of_adamw() -> None:
    """One flag, the same meaning: how long gradients are remembered."""
    optimizer = make_optimizer(nn.Linear(3, 2), TrainingSettings(epochs=1, optimizer="adamw", momentum=0.7))

    assert optimizer.param_groups[0]["betas"][0] == 0.7
    assert math.isclose(optimizer.param_groups[0]["betas"][1], 0.999)
