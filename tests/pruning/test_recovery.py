"""Compensation against an explicit least-squares fit, recalibration against plain averages."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.importance.statistics import Statistics, collect_statistics
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.recovery import compensated_tensors, recalibrate, recalibrating, train_steps
from prunegym.pruning.recovery.compensation import RIDGE

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]


def without(graph: ChannelGraph, units: list[int]) -> np.ndarray:
    """A mask with some units removed."""
    mask = np.ones(graph.units, dtype=np.bool_)
    mask[units] = False
    return mask


def measured(network: PrunableNetwork, task: Any) -> Statistics:
    """Statistics of all calibration examples."""
    return collect_statistics(network.model, network.graph, task, examples=40)


def all_inputs(task: Any) -> Tensor:
    """All calibration examples as one batch."""
    (((x,), _),) = task.batches("calibration", batch_size=40, limit=40)
    return x


def fitted(rows: Tensor, kept: list[int], gone: list[int]) -> tuple[Tensor, Tensor]:
    """Ridge regression of removed channels on kept ones by `lstsq`.

    Args:
        rows: What was read, ``(positions, channels)``.
        kept: Channels that stay.
        gone: Channels that are estimated.

    Returns:
        Coefficients ``(kept, gone)`` and intercepts ``(gone,)``.
    """
    rows = rows.double()
    mean = rows.mean(0)
    x, y = (rows - mean)[:, kept], (rows - mean)[:, gone]
    ridge = (RIDGE * x.square().mean() * len(x)).sqrt()
    x = torch.cat([x, ridge * torch.eye(len(kept))])  # ridge regression as extra equations
    y = torch.cat([y, torch.zeros(len(kept), len(gone))])
    mixing = torch.linalg.lstsq(x, y).solution
    return mixing, mean[gone] - mean[kept] @ mixing


def test_compensated_convolution_is_the_least_squares_fit(toys: Toys, task_for: TaskFor) -> None:
    """Kernel position by kernel position, from explicit activations."""
    network = toys("sequential")
    task = task_for(network)
    gone, kept = [1, 4, 6], [0, 2, 3, 5, 7]
    with torch.no_grad():
        rows = network.model[:4](all_inputs(task)).movedim(1, -1).flatten(0, -2)

    tensors = compensated_tensors(network.model, network.graph, without(network.graph, gone), measured(network, task))

    mixing, _ = fitted(rows, kept, gone)
    weight = network.model[4].weight.detach().double()
    expected = weight[:, kept] + torch.einsum("orhw,kr->okhw", weight[:, gone], mixing)
    torch.testing.assert_close(tensors["4.weight"].double(), expected, rtol=1e-3, atol=1e-4)


def test_compensated_bias_takes_the_shift_of_the_mean(toys: Toys, task_for: TaskFor) -> None:
    """The intercept of the fit, through all kernel positions."""
    network = toys("unnormalised")
    task = task_for(network)
    gone, kept = [0, 5], [1, 2, 3, 4, 6, 7]
    with torch.no_grad():
        rows = network.model[:2](all_inputs(task)).movedim(1, -1).flatten(0, -2)

    tensors = compensated_tensors(network.model, network.graph, without(network.graph, gone), measured(network, task))

    _, intercept = fitted(rows, kept, gone)
    layer = network.model[2]
    expected = layer.bias.detach() + layer.weight.detach()[:, gone].double().sum((2, 3)) @ intercept
    torch.testing.assert_close(tensors["2.bias"].double(), expected, rtol=1e-3, atol=1e-4)


def test_compensated_linear_layer_keeps_the_mean_of_its_output(toys: Toys, task_for: TaskFor) -> None:
    """On the calibration data, for a layer after flattening."""
    network = toys("flattened")
    task = task_for(network)
    mask = without(network.graph, [2, 3])
    with torch.no_grad():
        rows = network.model[:4](all_inputs(task))

    tensors = compensated_tensors(network.model, network.graph, mask, measured(network, task))

    columns = [column for column in range(24) if column // 4 not in (2, 3)]
    before = network.model[4](rows).mean(0)
    after = (rows[:, columns] @ tensors["4.weight"].T + tensors["4.bias"]).mean(0)
    torch.testing.assert_close(after, before.detach(), rtol=1e-4, atol=1e-4)


def test_compensated_transposed_convolution_keeps_the_mean_of_its_output(toys: Toys, task_for: TaskFor) -> None:
    """Each output sees one tap of a 2x2 kernel at stride 2, not all four."""
    network = toys("transposed")
    task = task_for(network)
    mask = without(network.graph, [1, 2, 7])
    with torch.no_grad():
        rows = network.model.down(all_inputs(task)).relu()

    tensors = compensated_tensors(network.model, network.graph, mask, measured(network, task))

    up = network.model.up
    after = torch.nn.functional.conv_transpose2d(rows[:, mask[:8]], tensors["up.weight"], tensors["up.bias"], up.stride)
    torch.testing.assert_close(after.mean((0, 2, 3)), up(rows).mean((0, 2, 3)).detach(), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """Two layers with one weight, and biases of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 6, 3)
        self.one, self.two = nn.Conv2d(6, 5, 3), nn.Conv2d(6, 5, 3)
        self.two.weight = self.one.weight
        self.head = nn.Linear(5, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).relu()
        return self.head((self.one(x) + self.two(x).relu()).mean((2, 3)))


def test_all_biases_beside_a_tied_weight_take_the_shift(task_for: TaskFor) -> None:
    """The same one, because what they read has the same mean."""
    network = PrunableNetwork(Tied(), torch.randn(2, 3, 8, 8))
    task = task_for(network)

    tensors = compensated_tensors(network.model, network.graph, without(network.graph, [1, 4]), measured(network, task))

    shifts = [tensors[f"{name}.bias"] - network.model.get_submodule(name).bias for name in ("one", "two")]
    torch.testing.assert_close(*shifts)
    assert shifts[0].abs().min() > 1e-4


def test_duplicate_channel_is_compensated_without_loss(task_for: TaskFor) -> None:
    """A channel that equals another can go: its weights move to the twin."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 5, 3), nn.Flatten(), nn.Linear(80, 5))
    with torch.no_grad():
        model[0].weight[4], model[0].bias[4] = model[0].weight[1], model[0].bias[1]
    network = PrunableNetwork(model, torch.randn(2, 3, 8, 8))
    task = task_for(network)
    mask = without(network.graph, [4])

    tensors = compensated_tensors(model, network.graph, mask, measured(network, task), ridge=1e-7)

    expected = model[2].weight[:, [0, 1, 2, 3, 5]].clone()
    expected[:, 1] += model[2].weight[:, 4]
    torch.testing.assert_close(tensors["2.weight"], expected.detach(), rtol=1e-2, atol=2e-3)


def test_layers_that_lose_no_inputs_are_not_replaced(toys: Toys, task_for: TaskFor) -> None:
    """Only the readers of the removed channels change."""
    network = toys("sequential")

    tensors = compensated_tensors(
        network.model, network.graph, without(network.graph, [0]), measured(network, task_for(network))
    )

    assert set(tensors) == {"4.weight"}


def batches() -> list[Tensor]:
    """Batches of unequal size, of inputs that are not centred."""
    generator = torch.Generator().manual_seed(0)
    return [1.5 + 2 * torch.randn(count, 3, 4, 4, generator=generator) for count in (8, 8, 2)]


def test_recalibrated_statistics_are_means_over_all_examples() -> None:
    """The small last batch counts no more than its share."""
    model = nn.Sequential(nn.BatchNorm2d(3), nn.Identity()).eval()

    recalibrate(model, batches())

    torch.testing.assert_close(model[0].running_mean, torch.cat(batches()).mean((0, 2, 3)))
    within = sum(one.var((0, 2, 3)) * len(one) for one in batches()) / 18
    torch.testing.assert_close(model[0].running_var, within)


def test_recalibration_counts_each_use_of_a_shared_layer() -> None:
    """A layer that runs twice per batch averages over both."""

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(x) + self.norm(3 * x)

    model = Both()

    recalibrate(model, batches())

    torch.testing.assert_close(model.norm.running_mean, 2 * torch.cat(batches()).mean((0, 2, 3)))


def test_momentum_and_modes_are_restored() -> None:
    """Left at the cumulative average, a later fine-tuning would average over its whole run."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3), nn.Dropout(), nn.BatchNorm2d(3, momentum=None))
    model[1].eval()

    recalibrate(model, batches())

    assert [model[0].momentum, model[2].momentum] == [0.3, None]
    assert [one.training for one in model] == [True, False, True]
    assert not model[0]._forward_pre_hooks


def test_momentum_is_restored_after_a_failure() -> None:
    """Even if a batch cannot be run."""
    model = nn.Sequential(nn.BatchNorm2d(3, momentum=0.3))

    with pytest.raises(ValueError, match="expected 4D input"), recalibrating(model):
        model(torch.zeros(3))
    assert model[0].momentum == 0.3


def test_dropout_stays_off_during_recalibration() -> None:
    """Only batch normalisation measures; the network runs as it will be used."""
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))

    recalibrate(model, batches())

    torch.testing.assert_close(model[1].running_mean, torch.cat(batches()).mean((0, 2, 3)))


def test_last_batch_of_a_single_value_is_passed_over() -> None:
    """PyTorch refuses the variance of one value."""
    model = nn.Sequential(nn.BatchNorm1d(3))
    full = torch.randn(5, 3)

    recalibrate(model, [full, torch.randn(1, 3)])

    torch.testing.assert_close(model[0].running_mean, full.mean(0))


def test_network_without_batch_norm_is_not_run() -> None:
    """There is nothing to measure."""

    def none() -> Iterator[Tensor]:
        raise AssertionError("no batch should be asked for")
        yield

    recalibrate(nn.Linear(2, 2), none())


def test_training_steps_repeat_exactly(toys: Toys, task_for: TaskFor) -> None:
    """Also with dropout, and whatever was drawn before: plans are compared on equal terms."""
    network = toys("sequential")
    task = task_for(network)

    def trained() -> list[Tensor]:
        model = nn.Sequential(*copy.deepcopy(network.model)[:-1], nn.Dropout(0.5), nn.Linear(10, 5))
        model[-1].load_state_dict(network.model[-1].state_dict())
        torch.rand(3)
        train_steps(model, task, steps=3, batch_size=16)
        return [one.detach() for one in model.parameters()]

    assert all(torch.equal(a, b) for a, b in zip(trained(), trained(), strict=True))


def test_training_steps_leave_the_global_generator_alone(toys: Toys, task_for: TaskFor) -> None:
    """Scoring a plan must not change what an agent samples next."""
    network = toys("sequential")
    state = torch.get_rng_state()

    train_steps(copy.deepcopy(network.model), task_for(network), steps=2, batch_size=16)

    assert torch.equal(torch.get_rng_state(), state)


def test_training_steps_run_over_several_epochs(toys: Toys, task_for: TaskFor) -> None:
    """64 examples are one batch; a few steps on it lower its loss."""
    network = toys("sequential")
    task = task_for(network)

    losses = [
        train_steps(copy.deepcopy(network.model), task, steps=steps, batch_size=64, learning_rate=0.1)
        for steps in (1, 8)
    ]

    assert losses[1] < losses[0]


def test_no_steps_change_nothing(toys: Toys, task_for: TaskFor) -> None:
    """As where a recovery trains nothing."""
    network = toys("sequential")
    model = copy.deepcopy(network.model)

    loss = train_steps(model, task_for(network), steps=0)

    assert np.isnan(loss)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), network.model.parameters(), strict=True))


def test_diverging_steps_are_reported(toys: Toys, task_for: TaskFor) -> None:
    """The remedy is named."""
    network = toys("unnormalised")

    with pytest.raises(PruningError, match="`learning_rate` should keep the loss finite. Received 1e\\+20"):
        train_steps(copy.deepcopy(network.model), task_for(network), steps=5, batch_size=16, learning_rate=1e20)


def test_training_split_without_batches_is_reported(toys: Toys, task_for: TaskFor) -> None:
    """Going round an empty split for ever would hang."""
    network = toys("unnormalised")
    task = task_for(network)
    task.sizes["train"] = 0

    with pytest.raises(PruningError, match="`task` should give batches of the train split"):
        train_steps(copy.deepcopy(network.model), task, steps=1)
