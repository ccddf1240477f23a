"""What calibration data show, against direct calculation."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.importance.statistics import collect_statistics, find_batch_axes
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import Task

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]
EXAMPLES = 10


def weight_changes(network: PrunableNetwork, task: Task) -> np.ndarray:
    """First-order change of each example's loss when a unit is read no more: ``(examples, units)``.

    By gradients of the reading weights, one example at a time; the library uses activations, in batches.
    """
    model = copy.deepcopy(network.model).eval()
    parameters = dict(model.named_parameters())
    rows = []
    for inputs, targets in task.batches("calibration", batch_size=1, limit=EXAMPLES):
        model.zero_grad()
        task.loss(model(*inputs), targets).backward()
        row = np.zeros(network.graph.units)
        for name, reads, units in {
            (one.weight, one.reads, tuple(one.inputs.tolist())) for one in network.graph.operations if one.mixes
        }:
            weight = parameters[str(name)]
            assert weight.grad is not None
            change = (weight * weight.grad).movedim(reads, 0).flatten(1).sum(1).detach().numpy()
            for index, unit in enumerate(units):
                if unit >= 0:
                    row[unit] += change[index]
        rows.append(row)
    return np.stack(rows)


def test_taylor_scores_equal_those_by_weight_gradients(toy: PrunableNetwork, task_for: TaskFor) -> None:
    """Mean absolute and mean squared change, for every way to couple channels."""
    task = task_for(toy)
    changes = weight_changes(toy, task)

    statistics = collect_statistics(toy.model, toy.graph, task, examples=EXAMPLES, batch_size=4)

    largest = np.abs(changes).max()
    np.testing.assert_allclose(statistics.taylor, np.abs(changes).mean(0), rtol=1e-3, atol=1e-5 * largest)
    squared = np.square(changes).mean(0)
    np.testing.assert_allclose(statistics.taylor_squared, squared, rtol=2e-3, atol=1e-5 * largest**2)


def test_taylor_score_predicts_the_removal_of_a_small_share(toys: Toys, task_for: TaskFor) -> None:
    """The change of the loss when the reads of a unit shrink by a hundredth, by running the network again."""
    network = toys("unnormalised")
    task = task_for(network)
    (inputs, targets), *_ = task.batches("calibration", batch_size=1, limit=1)
    statistics = collect_statistics(network.model, network.graph, task, examples=1)
    unit = int(np.argmax(statistics.taylor))
    model = copy.deepcopy(network.model).double()
    inputs = tuple(one.double() for one in inputs)

    before = task.loss(model(*inputs).double(), targets).item()
    for operation in network.graph.operations:
        weight = dict(model.named_parameters())[str(operation.weight)]
        weight.data.movedim(operation.reads, 0)[operation.inputs == unit] *= 1 - 1e-2
    after = task.loss(model(*inputs), targets).item()

    assert abs(after - before) == pytest.approx(1e-2 * statistics.taylor[unit], rel=0.05)


class Tied(nn.Module):
    """Two layers read the same channels with one weight, each with a bias of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.left, self.right = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 6, 1)
        self.right.weight, self.head = self.left.weight, nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        return self.head((torch.relu(self.left(x)) * self.right(x.roll(1, 3)).sigmoid()).mean((2, 3)))


def test_all_layers_that_share_a_weight_are_read(task_for: TaskFor) -> None:
    """The weight's gradient is that of all its uses."""
    torch.manual_seed(0)
    network = PrunableNetwork(Tied(), torch.randn(2, 3, 8, 8))
    task = task_for(network)

    statistics = collect_statistics(network.model, network.graph, task, examples=EXAMPLES, batch_size=4)

    expected = np.abs(weight_changes(network, task)).mean(0)
    np.testing.assert_allclose(statistics.taylor, expected, rtol=1e-3, atol=1e-5 * expected.max())


def read_by_second(network: PrunableNetwork, task: Task) -> Tensor:
    """What the second convolution of the chain reads ``(8, examples * positions)``."""
    model = network.model
    rows = []
    with torch.no_grad():
        for (x,), _ in task.batches("calibration", batch_size=EXAMPLES, limit=EXAMPLES):
            rows.append(model[:4](x).transpose(0, 1).flatten(1))
    return torch.cat(rows, 1).double()


@pytest.mark.parametrize("batch_size", [4, 10])
def test_activation_statistics_are_those_of_what_is_read(toys: Toys, task_for: TaskFor, batch_size: int) -> None:
    """Mean, variance and zeros of the first group's channels, also where the last batch is small."""
    network = toys("sequential")
    task = task_for(network)
    rows = read_by_second(network, task).numpy()

    statistics = collect_statistics(network.model, network.graph, task, examples=EXAMPLES, batch_size=batch_size)

    units = network.graph.groups[0].units
    np.testing.assert_allclose(statistics.activation_mean[units], np.abs(rows).mean(1), rtol=1e-4)
    np.testing.assert_allclose(statistics.activation_variance[units], rows.var(1), rtol=1e-3)
    np.testing.assert_allclose(statistics.activation_sparsity[units], (rows == 0).mean(1), atol=1e-6)


@pytest.mark.parametrize("batch_size", [4, 10])
def test_covariance_is_that_of_what_is_read(toys: Toys, task_for: TaskFor, batch_size: int) -> None:
    """Against numpy, over all examples and positions at once."""
    network = toys("sequential")
    task = task_for(network)
    rows = read_by_second(network, task).numpy()

    statistics = collect_statistics(network.model, network.graph, task, examples=EXAMPLES, batch_size=batch_size)

    moments = statistics.inputs["4.weight"]
    np.testing.assert_allclose(moments.mean, rows.mean(1), rtol=1e-4)
    assert moments.covariance is not None
    np.testing.assert_allclose(moments.covariance, np.cov(rows, bias=True), rtol=1e-3, atol=1e-4)


def test_loss_is_the_mean_over_examples(toys: Toys, task_for: TaskFor) -> None:
    """Batches of unequal size count by their examples."""
    network = toys("residual")
    task = task_for(network)
    (inputs, targets), *_ = task.batches("calibration", batch_size=EXAMPLES, limit=EXAMPLES)
    with torch.no_grad():
        expected = task.loss(network.model(*inputs), targets).item()

    statistics = collect_statistics(network.model, network.graph, task, examples=EXAMPLES, batch_size=4)

    assert (statistics.examples, statistics.loss) == (EXAMPLES, pytest.approx(expected, rel=1e-5))


def test_both_inputs_reach_their_channels(toys: Toys, task_for: TaskFor) -> None:
    """A branch that only the second input feeds has Taylor scores too."""
    network = toys("two_inputs")

    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=8)

    assert (statistics.taylor[network.graph.group("right").units] > 0).any()


class Counting:
    """A task whose targets are a dictionary: their length says nothing of the batch."""

    name = fingerprint = "counting"

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        yield torch.randn(6, 4, generator=generator), {"value": torch.randn(6, generator=generator)}

    def loss(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return (outputs[:, 0] - targets["value"]).square().mean()

    def score(self, outputs: Tensor, targets: dict[str, Tensor]) -> Tensor:
        return -(outputs[:, 0] - targets["value"]).abs()


def test_targets_may_be_of_any_kind() -> None:
    """The batch is counted by its inputs."""
    network = PrunableNetwork(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1)), torch.randn(2, 4))

    statistics = collect_statistics(network.model, network.graph, Counting())

    assert statistics.examples == 6
    assert (statistics.taylor > 0).all()


class Words(nn.Module):
    """A network whose input has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.first, self.head = nn.Embedding(9, 6), nn.Linear(6, 8), nn.Linear(8, 1)

    def forward(self, words: Tensor) -> Tensor:
        return self.head(torch.tanh(self.first(self.table(words).mean(1))))


class WordTask(Counting):
    """Integers in, one number out."""

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Any:
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(9, (6, 5), generator=generator)
        yield words, {"value": torch.randn(6, generator=generator)}


def test_inputs_may_be_integers() -> None:
    """The backward pass starts at the first layer that reads prunable channels."""
    network = PrunableNetwork(Words(), torch.zeros(2, 5, dtype=torch.int64))

    statistics = collect_statistics(network.model, network.graph, WordTask())

    assert (statistics.taylor > 0).all()


def test_frames_folded_into_the_batch_count_for_their_example(task_for: TaskFor) -> None:
    """A video network runs its layers on ``examples * frames`` images; Taylor scores are per example."""

    class Frames(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Conv2d(1, 6, 3), nn.Conv2d(6, 5, 3), nn.Linear(5, 1)

        def forward(self, x: Tensor) -> Tensor:
            out = torch.tanh(self.second(torch.tanh(self.first(x.flatten(0, 1).unsqueeze(1)))))
            return self.head(out.mean((2, 3)).view(*x.shape[:2], -1).mean(1))

    class Films(Counting):
        def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_: Any) -> Any:
            generator = torch.Generator().manual_seed(0)
            for _ in range(0, 6, batch_size):
                films = torch.randn(batch_size, 3, 6, 6, generator=generator)
                yield (films,), {"value": torch.randn(batch_size, generator=generator)}

    network = PrunableNetwork(Frames(), torch.randn(2, 3, 6, 6))

    statistics = collect_statistics(network.model, network.graph, Films(), batch_size=3)

    assert (statistics.taylor[network.graph.group("first").units] > 0).all()


class Tokens(nn.Module):
    """An encoder layer over 16 patches; the batch is first or second, the weights are the same."""

    def __init__(self, *, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.encoder = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.encoder(self.patches(x).flatten(2).permute((0, 2, 1) if self.batch_first else (2, 0, 1)))
        return self.head(x.mean(1 if self.batch_first else 0))


@pytest.fixture(scope="module")
def token_networks() -> list[PrunableNetwork]:
    """Batch first, and second."""
    torch.manual_seed(0)
    models = [Tokens(batch_first=batch_first) for batch_first in (True, False)]
    models[1].load_state_dict(models[0].state_dict())
    return [PrunableNetwork(model.eval(), torch.randn(2, 3, 8, 8)) for model in models]


@pytest.mark.parametrize("batch_size", [3, 8, 16])
def test_scores_do_not_depend_on_where_the_batch_is(
    token_networks: list[PrunableNetwork], task_for: TaskFor, batch_size: int
) -> None:
    """The tokens are no multiple of the batch, a multiple, or as many; the last batch has fewer examples."""
    first, second = (
        collect_statistics(one.model, one.graph, task_for(one), examples=20, batch_size=batch_size)
        for one in token_networks
    )

    assert {group.name for group in token_networks[0].graph.groups} >= {"encoder.linear1", "encoder.self_attn"}
    for field in ("taylor", "taylor_squared", "activation_mean", "activation_variance", "activation_sparsity"):
        ours, theirs = getattr(second, field), getattr(first, field)
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-6 * theirs.max(), err_msg=field)
    assert (first.taylor > 0).all()


@pytest.mark.parametrize("batch_size", [4, 16])
def test_taylor_scores_of_tokens_are_those_of_single_examples(
    token_networks: list[PrunableNetwork], task_for: TaskFor, batch_size: int
) -> None:
    """Batches of one leave no doubt what belongs to whom."""
    for network in token_networks:
        task = task_for(network)
        alone, together = (
            collect_statistics(network.model, network.graph, task, examples=16, batch_size=size)
            for size in (1, batch_size)
        )

        np.testing.assert_allclose(together.taylor, alone.taylor, rtol=1e-3, atol=1e-6 * alone.taylor.max())


def test_networks_of_convolutions_are_not_run_to_find_the_batch(toys: Toys, task_for: TaskFor) -> None:
    """There it is where it always is."""
    network = toys("sequential")

    def batches(size: int) -> Any:
        raise AssertionError("asked for")

    assert not find_batch_axes(network.model, network.graph, batches).found


class Positions(nn.Module):
    """What the second layer reads is the same for all examples."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, 8, 2, 2), nn.Linear(8, 5)
        self.first, self.second = nn.Linear(1, 6), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.linspace(-1, 1, 16).view(1, 16, 1)
        x = self.patches(x).flatten(2).transpose(1, 2) * self.second(torch.tanh(self.first(places)))
        return self.head(torch.tanh(x).mean(1))


def test_channels_that_belong_to_no_example_are_told_and_not_worthless(task_for: TaskFor) -> None:
    """The mean change over the batch is all that is known, whether or not there are as many tokens as examples."""
    torch.manual_seed(0)
    network = PrunableNetwork(Positions(), torch.randn(2, 3, 8, 8))
    units = network.graph.group("first").units
    for batch_size in (3, 16):
        with pytest.warns(UserWarning, match=r"^no dimension of the inputs of second counts .*\(1, 16, 6\)"):
            statistics = collect_statistics(
                network.model, network.graph, task_for(network), examples=batch_size, batch_size=batch_size
            )

        model = copy.deepcopy(network.model).eval()
        (inputs, targets), *_ = task_for(network).batches("calibration", batch_size=batch_size, limit=batch_size)
        task_for(network).loss(model(*inputs), targets).backward()
        change = (model.second.weight * model.second.weight.grad).sum(0).abs().detach()
        np.testing.assert_allclose(statistics.taylor[units], change, rtol=1e-3)


def test_statistics_of_a_pruned_network_match_those_of_its_masked_twin(
    toys: Toys, task_for: TaskFor, random_plan: Callable[..., PruningPlan]
) -> None:
    """Kept units have the same scores in both; units that are gone hold 0."""
    network = toys("residual")
    task = task_for(network)
    plan = random_plan(network, np.random.default_rng(0))
    mask = plan.mask(network.graph)

    small = collect_statistics(network.pruned(plan), network.graph, task, mask=mask, examples=EXAMPLES)
    masked = collect_statistics(network.masked(plan), network.graph, task, examples=EXAMPLES)

    for field in ("taylor", "taylor_squared", "activation_mean", "activation_variance"):
        ours, theirs = getattr(small, field), getattr(masked, field)
        np.testing.assert_allclose(ours[mask], theirs[mask], rtol=1e-3, atol=1e-6)
        assert (ours[~mask] == 0).all()


def test_network_is_left_as_it_was_found(toys: Toys, task_for: TaskFor) -> None:
    """No hooks, gradients, changed switches or modes."""
    network = toys("sequential")
    model = copy.deepcopy(network.model).train()
    model[0].weight.requires_grad_(False)

    collect_statistics(model, network.graph, task_for(network), examples=4)

    assert all(module.training and not module._forward_pre_hooks for module in model.modules())
    assert [one.requires_grad for one in model.parameters()] == [False] + [True] * (len(list(model.parameters())) - 1)
    assert all(one.grad is None for one in model.parameters())


def test_covariances_can_be_left_out(toys: Toys, task_for: TaskFor) -> None:
    """Between rounds nobody needs them."""
    network = toys("sequential")

    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=4, covariances=False)

    assert all(moments.covariance is None for moments in statistics.inputs.values())
