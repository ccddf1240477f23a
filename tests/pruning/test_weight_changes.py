"""Mean squares from the means of batches."""

import itertools

import numpy as np
import pytest
import torch

from prunegym.pruning.importance.weight_changes import mean_square


def test_mean_square_from_batches_is_unbiased() -> None:
    """Over all ways to pair six examples, the mean estimate is the mean square of the examples."""
    values = torch.tensor([3.0, -1.0, 0.5, 2.0, -4.0, 1.0], dtype=torch.float64)
    estimates = []
    for order in itertools.permutations(range(6)):
        means = values[list(order)].reshape(3, 2).mean(1)
        estimates.append(float(mean_square(2 * means.sum(), 2 * means.square().sum(), 6, 3)))

    assert np.mean(estimates) == pytest.approx(float(values.square().mean()))


def test_mean_square_is_exact_for_batches_of_one() -> None:
    """Nothing is estimated."""
    values = torch.tensor([3.0, -1.0, 0.5], dtype=torch.float64)

    estimate = mean_square(values.sum(), values.square().sum(), 3, 3)

    assert float(estimate) == pytest.approx(float(values.square().mean()))


def test_mean_square_of_one_batch_is_that_of_its_mean() -> None:
    """How much its examples differ is not known."""
    assert float(mean_square(torch.tensor(6.0), torch.tensor(12.0), 3, 1)) == pytest.approx(4.0)
