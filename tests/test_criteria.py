"""Criteria against references of a few lines."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.criteria import CRITERIA, Context, unit_scores
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.statistics import collect_statistics
from prunegym.pruning.task import Task

Toys = Callable[[str], PrunableNetwork]


def score(network: PrunableNetwork, criterion: str, group: str) -> np.ndarray:
    """Scores of one group."""
    return CRITERIA[criterion](network.graph.group(group), Context(network.model, network.graph))


def residual_filters(network: PrunableNetwork) -> list[Tensor]:
    """The two layers that make the first group of the residual toy, a row per channel."""
    return [network.model.get_submodule(name).weight.detach().flatten(1) for name in ("stem", "outer")]


def test_l1_sums_absolute_weights_over_all_producers(toys: Toys) -> None:
    """Both ends of the residual sum count."""
    network = toys("residual")

    reference = sum(one.abs().sum(1) for one in residual_filters(network))

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_l2_is_the_norm_of_all_weights_of_a_channel(toys: Toys) -> None:
    """One norm over the producers together."""
    network = toys("residual")

    reference = torch.cat(residual_filters(network), 1).norm(dim=1)

    np.testing.assert_allclose(score(network, "l2", "stem"), reference, rtol=1e-5)


def test_fpgm_sums_distances_to_all_other_filters(toys: Toys) -> None:
    """Spelled out pair by pair."""
    network = toys("residual")
    rows = torch.cat(residual_filters(network), 1).double().numpy()

    reference = [sum(np.linalg.norm(one - other) for other in rows) for one in rows]

    np.testing.assert_allclose(score(network, "fpgm", "stem"), reference, rtol=1e-9)


def test_fpgm_tells_a_filter_from_its_negative() -> None:
    """Opposite filters are as far apart as can be, not at distance 0."""
    model = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    with torch.no_grad():
        model[0].weight[1] = -model[0].weight[0]
    network = PrunableNetwork(model, torch.randn(2, 4))

    assert score(network, "fpgm", "0")[0] >= 2 * float(model[0].weight[0].detach().norm()) - 1e-6


def test_bn_scale_sums_the_scales_of_all_norms(toys: Toys) -> None:
    """The norms of the stem and of the block that is added to it."""
    model = toys("residual").model

    reference = model.stem_norm.weight.abs() + model.outer_norm.weight.abs()

    np.testing.assert_allclose(score(toys("residual"), "bn_scale", "stem"), reference.detach(), rtol=1e-6)


def test_bn_scale_follows_concatenation(toys: Toys) -> None:
    """One batch normalisation over two branches: the second branch begins at channel 6."""
    network = toys("concat")

    reference = network.model.norm.weight.detach().abs()[6:]

    np.testing.assert_allclose(score(network, "bn_scale", "right"), reference, rtol=1e-6)


def test_bn_scale_without_norm_is_l2(toys: Toys) -> None:
    """There is nothing else to go by."""
    network = toys("unnormalised")

    assert (score(network, "bn_scale", "0") == score(network, "l2", "0")).all()


def test_grouped_convolution_adds_up_the_filters_of_a_unit(toys: Toys) -> None:
    """A unit is three channels of the stem and two filters of the grouped convolution."""
    network = toys("grouped")
    stem, grouped = (network.model.get_submodule(name).weight.detach() for name in ("stem", "grouped"))

    reference = stem.reshape(4, -1).abs().sum(1) + grouped.reshape(4, -1).abs().sum(1)

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_layer_used_twice_counts_once(toys: Toys) -> None:
    """It has one set of weights."""
    network = toys("twice")
    stem, again = (network.model.get_submodule(name).weight.detach() for name in ("stem", "again"))

    reference = stem.flatten(1).abs().sum(1) + again.flatten(1).abs().sum(1)

    np.testing.assert_allclose(score(network, "l1", "stem"), reference, rtol=1e-5)


def test_transposed_convolution_has_its_filters_along_the_second_dimension(toys: Toys) -> None:
    """Its weight is ``(C_in, C_out, kH, kW)``."""
    network = toys("transposed")

    reference = network.model.up.weight.detach().abs().sum((0, 2, 3))

    np.testing.assert_allclose(score(network, "l1", "up"), reference, rtol=1e-5)


@pytest.mark.parametrize(
    ("criterion", "field"),
    [("taylor", "taylor"), ("taylor_squared", "taylor_squared"), ("activation", "activation_mean")],
)
def test_data_aware_criteria_read_the_statistics(
    toys: Toys, task_for: Callable[[PrunableNetwork], Task], criterion: str, field: str
) -> None:
    """The whole network's scores are the groups' one after another."""
    network = toys("residual")
    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=16)

    scores = unit_scores(criterion, Context(network.model, network.graph, statistics))

    assert (scores == getattr(statistics, field)).all()
    assert not np.shares_memory(scores, getattr(statistics, field))


@pytest.mark.parametrize("criterion", ["taylor", "taylor_squared", "activation"])
def test_data_aware_criteria_without_data_are_rejected(toys: Toys, criterion: str) -> None:
    """The message names the criterion and those that need none."""
    with pytest.raises(PruningError, match=f"`criterion` {criterion} needs calibration data"):
        score(toys("residual"), criterion, "stem")


def test_unknown_criterion_is_rejected_with_the_nearest(toys: Toys) -> None:
    """A near miss gets a suggestion."""
    network = toys("residual")

    with pytest.raises(PruningError, match="Did you mean 'taylor_squared'"):
        unit_scores("taylor_square", Context(network.model, network.graph))


def test_scores_that_are_not_finite_are_rejected(toys: Toys) -> None:
    """A NaN would silently sort to one end."""
    network = toys("sequential")
    model = nn.Sequential(*network.model)
    broken = nn.Conv2d(3, 8, 3, padding=1, bias=False)
    broken.weight.data[2] = float("nan")
    model[0] = broken

    with pytest.raises(PruningError, match="`criterion` l1 should give finite scores. Received 1 non-finite"):
        unit_scores("l1", Context(model, network.graph))


def test_random_scores_follow_their_generator(toys: Toys) -> None:
    """Same seed, same scores; another seed, others."""
    network = toys("residual")

    def drawn(seed: int) -> list[float]:
        context = Context(network.model, network.graph, rng=np.random.default_rng(seed))
        return unit_scores("random", context).tolist()

    assert drawn(0) == drawn(0) != drawn(1)


def test_every_criterion_gives_one_score_per_unit(
    toy: PrunableNetwork, task_for: Callable[[PrunableNetwork], Task]
) -> None:
    """The contract, for every way to couple channels."""
    statistics = collect_statistics(toy.model, toy.graph, task_for(toy), examples=8)
    context = Context(toy.model, toy.graph, statistics)

    assert all(unit_scores(name, context).shape == (toy.graph.units,) for name in CRITERIA)
