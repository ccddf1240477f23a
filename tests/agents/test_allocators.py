"""Allocators against their definitions."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from prunegym.agents.searching.allocators import (
    global_magnitude,
    global_taylor,
    halp,
    knapsack,
    lamp,
    lamp_scores,
    normalised,
)
from prunegym.agents.searching.search import SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.scoring import Scorer, ScorerSettings

SETTINGS = SearchSettings()
BUDGETS = [Budget.parse(text) for text in ("macs:0.5", "params:0.3", "latency:0.6")]
Floats = NDArray[np.float64]


def assert_threshold(problem: PruningProblem, budget: Budget, found: SearchResult, scores: Floats) -> None:
    """The best channel of each group stays, then the others in the order of their scores as long as they fit."""
    group_of, limit = problem.scorer.network.graph.group_of, problem.limits[budget]
    best = [
        np.flatnonzero(group_of == group)[scores[group_of == group].argmax()] for group in range(len(problem.sizes))
    ]
    expected = np.ones_like(problem.sizes)
    for unit in np.argsort(-scores):
        more = expected + (np.arange(len(expected)) == group_of[unit])
        expected = more if unit not in best and limit.holds(more) else expected

    assert problem.scorer.network.counts(found.plan).tolist() == expected.tolist()


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_global_magnitude_is_one_threshold_on_normalised_filter_norms(problem: PruningProblem, budget: Budget) -> None:
    """Squares of all weights that make a channel; their root over the norm of the group's."""
    graph, energies = problem.scorer.network.graph, np.zeros(problem.scorer.network.graph.units)
    for name, weight in problem.scorer.network.model.named_parameters():
        if weight.ndim > 1 and (name, 0) in graph.axes:
            units = graph.axes[name, 0]
            np.add.at(energies, units[units >= 0], weight.detach().double().square().flatten(1).sum(1)[units >= 0])
    total = [energies[graph.group_of == group].sum() for group in range(len(graph.groups))]
    scores = np.sqrt(energies / np.array(total)[graph.group_of])

    assert_threshold(problem, budget, global_magnitude(problem, budget, SETTINGS), scores)


def test_global_magnitude_takes_the_norm_of_the_criterion(problem: PruningProblem) -> None:
    """L1 where channels are kept by L1."""
    whole = problem.scorer
    settings = ScorerSettings(criterion="l1", precision="float32")
    other = PruningProblem(Scorer(whole.network, whole.task, settings, statistics=whole.statistics), BUDGETS[:1])
    scores = normalised(whole.criterion_scores("l1"), whole.network.graph.group_of)

    assert_threshold(other, BUDGETS[0], global_magnitude(other, BUDGETS[0], SETTINGS), scores)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_lamp_is_one_threshold_on_lamp_scores(problem: PruningProblem, budget: Budget) -> None:
    """Computed here channel by channel, as the paper writes it."""
    graph = problem.scorer.network.graph
    energies = problem.scorer.criterion_scores("l2") ** 2
    scores = np.zeros(graph.units)
    for group in graph.groups:
        own = energies[group.units]
        scores[group.units] = [energy / own[own >= energy].sum() for energy in own]

    assert_threshold(problem, budget, lamp(problem, budget, SETTINGS), scores)


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_global_taylor_is_one_threshold_on_squared_taylor_scores(problem: PruningProblem, budget: Budget) -> None:
    """As they are, without normalisation."""
    scores = problem.scorer.statistics.taylor_squared

    assert_threshold(problem, budget, global_taylor(problem, budget, SETTINGS), scores)


# scaled by powers of two and far from the smallest numbers: rounding would make ties of what was none
_ENERGIES = st.just(0.0) | st.floats(2.0**-20, 10)


@given(st.lists(st.lists(_ENERGIES, min_size=1, max_size=6), min_size=1, max_size=4), st.integers(-4, 4))
def test_lamp_scores_do_not_depend_on_the_scale_of_a_layer(groups: list[list[float]], power: int) -> None:
    """They lie in [0, 1], the best channel of each group has 1, and ranks within a group are those of the norms."""
    group_of = np.repeat(np.arange(len(groups)), [len(one) for one in groups])
    energies = np.concatenate([np.array(one) for one in groups])
    scaled = np.where(group_of == 0, 2.0**power, 1.0) * energies
    scores = lamp_scores(energies, group_of)

    assert ((scores >= 0) & (scores <= 1)).all()
    np.testing.assert_allclose(lamp_scores(scaled, group_of), scores)
    for group in range(len(groups)):
        mine = group_of == group
        assert scores[mine].max() == 1
        assert (np.diff(scores[mine][np.argsort(-energies[mine], kind="stable")]) <= 1e-12).all()


def test_normalisation_of_a_group_of_zeros_is_zero() -> None:
    """And no division by it."""
    scores = normalised(np.array([0.0, 0.0, 3.0, 4.0]), np.array([0, 0, 1, 1]))

    assert scores.tolist() == [0, 0, 0.6, 0.8]


@pytest.mark.parametrize("budget", BUDGETS, ids=str)
def test_knapsacks_differ_in_their_scores_alone(problem: PruningProblem, budget: Budget) -> None:
    """By squared Taylor scores, or by residual ones."""
    statistics, limit = problem.scorer.statistics, problem.limits[budget]
    for search, scores in ((halp, statistics.taylor_squared), (knapsack, statistics.residual_taylor)):
        wanted = problem.plan(problem.knapsack_counts(limit, scores))

        assert search(problem, budget, SETTINGS).plan == wanted
