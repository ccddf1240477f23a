"""Residual Taylor scores, against regressions by numpy, one channel after another."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.importance.reading import reader_modules
from prunegym.pruning.importance.residuals import PROBE_SEED, RIDGE, probe
from prunegym.pruning.importance.statistics import collect_statistics
from prunegym.pruning.network import PrunableNetwork

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]
EXAMPLES = 12


def best_first(network: PrunableNetwork, taylor: np.ndarray, units: np.ndarray) -> np.ndarray:
    """What a reader reads, best first: channels that always stay, then by the place in their group."""
    places = np.full(len(units), -1.0)
    for group in network.graph.groups:
        ranked = sorted(range(group.start, group.start + group.size), key=lambda unit: -taylor[unit])
        for index, unit in enumerate(units):
            if unit in ranked:
                places[index] = ranked.index(unit) / group.size
    return np.argsort(places, kind="stable")


def changes_by_regression(source: np.ndarray, slopes: np.ndarray, better: np.ndarray) -> Any:
    """Change of each example when a channel's residual is lost ``(examples, channels)``, by the definition.

    Args:
        source: what a reader reads ``(B, C, P)``.
        slopes: derivatives by it.
        better: channels, best first.
    """
    centred = source - source.mean((0, 2), keepdims=True)
    covariance = np.einsum("bcp,bdp->cd", centred, centred) / (source.shape[0] * source.shape[2])
    covariance += RIDGE * covariance.diagonal().mean() * np.eye(len(covariance))
    changes = np.zeros(source.shape[:2])
    for place, channel in enumerate(better):
        before, after = better[:place], better[place:]
        weights = np.linalg.solve(covariance[np.ix_(before, before)], covariance[before, channel])
        residual = centred[:, channel] - np.einsum("k,bkp->bp", weights, centred[:, before])
        shared = covariance[after, channel] - covariance[np.ix_(after, before)] @ weights
        shared /= shared[0]  # how much of the residual each later channel has
        changes[:, channel] = np.einsum("i,bip,bp->b", shared, slopes[:, after], residual)
    return changes


@pytest.mark.parametrize("name", ["sequential", "residual", "concat", "mobile", "flattened", "unnormalised"])
def test_scores_are_squared_changes_when_residuals_are_lost(toys: Toys, task_for: TaskFor, name: str) -> None:
    """Summed over the readers of a channel, and over the places where a reader has it."""
    network = toys(name)
    task, graph = task_for(network), network.graph
    statistics = collect_statistics(network.model, graph, task, examples=EXAMPLES, batch_size=EXAMPLES)
    seen: dict[str, Tensor] = {}

    def watch(key: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            seen[key] = args[0].clone()
            seen[key].retain_grad()
            return (seen[key], *args[1:])

        return hook

    readers = reader_modules(graph, network.model.eval())
    hooks = [module.register_forward_pre_hook(watch(key)) for key, (_, module) in readers.items()]
    (batch,) = task.batches("calibration", batch_size=EXAMPLES, limit=EXAMPLES)
    value = probe(network.model(*batch[0]), torch.Generator().manual_seed(PROBE_SEED))
    assert value is not None
    value.backward()
    for hook in hooks:
        hook.remove()
    network.model.zero_grad()

    total = np.zeros((EXAMPLES, graph.units + 1))
    for key, (operation, _) in readers.items():
        units = np.asarray(operation.inputs)
        gradient = seen[key].grad
        assert gradient is not None
        flat = [one.detach().double().reshape(EXAMPLES, len(units), -1).numpy() for one in (seen[key], gradient)]
        np.add.at(
            total,
            (slice(None), units),
            changes_by_regression(flat[0], flat[1], best_first(network, statistics.taylor, units)),
        )

    wanted = np.square(total[:, :-1]).mean(0)
    np.testing.assert_allclose(statistics.residual_taylor, wanted, rtol=2e-2, atol=1e-4 * wanted.max())


class Twins(nn.Module):
    """Two of the four channels are the same."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        with torch.no_grad():
            self.first.weight[2], self.first.bias[2] = self.first.weight[1], self.first.bias[1]  # type: ignore[index]

    def forward(self, x: Tensor) -> Tensor:
        """Map images to five outputs."""
        outputs: Tensor = self.second(self.first(x).relu()).mean((2, 3))
        return outputs


def test_one_of_two_equal_channels_is_worth_nothing(task_for: TaskFor) -> None:
    """The better one stands for both; by the Taylor criterion each is worth something."""
    torch.manual_seed(0)
    network = PrunableNetwork(Twins(), torch.randn(2, 3, 12, 12))

    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=EXAMPLES)

    twins = statistics.residual_taylor[[1, 2]]
    assert twins.min() < 1e-2 * twins.max()
    assert statistics.taylor_squared[[1, 2]].min() > 0.05 * statistics.taylor_squared.max()


def test_probe_takes_each_output_as_a_share_of_its_deviation() -> None:
    """So that an output in other units weighs as much; what no gradient goes through is left out."""
    outputs = {"small": torch.randn(50, 4).requires_grad_(), "large": torch.randn(50, 3, 7).requires_grad_()}

    def slopes(scale: float) -> list[Tensor]:
        scaled = {"small": outputs["small"], "large": outputs["large"] * scale, "count": torch.ones(50)}
        value = probe(scaled, torch.Generator().manual_seed(1))
        assert value is not None
        return list(torch.autograd.grad(value, list(outputs.values())))

    once, often = slopes(1.0), slopes(100.0)

    for one, other in zip(once, often, strict=True):
        torch.testing.assert_close(one, other)
        assert one.square().sum((1, *range(2, one.ndim))).mean() == pytest.approx(1.0, rel=0.35)
    assert probe(torch.ones(3, 2), torch.Generator()) is None
