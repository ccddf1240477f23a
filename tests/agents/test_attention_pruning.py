"""Progressive pruning by attention: what it finds where the best is known, its rounds, and what it pays."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from prunegym.agents.searching.attention_pruning import AttentionGates, attention
from prunegym.agents.searching.search import SearchSettings
from prunegym.agents.searching.searchers import searcher_named
from prunegym.envs.observation import EpisodeState
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Recovery, Scorer
from prunegym.pruning.widths import Bound, WidthRules


@pytest.fixture(scope="module")
def priced_problem(loss_problem: PruningProblem) -> PruningProblem:
    """The toy, with evaluations that are worth five training steps."""
    settings = replace(loss_problem.scorer.settings, examples=1000)
    scorer = Scorer(loss_problem.scorer.network, loss_problem.scorer.task, settings)
    return PruningProblem(scorer, loss_problem.budgets)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("rounds", [1, 3])
def test_best_plan_of_the_toy_is_found(priced_problem: PruningProblem, seed: int, rounds: int) -> None:
    """Of 512 plans, the one that keeps what reaches the output."""
    settings = SearchSettings(evaluations=12, seed=seed, rounds=rounds)
    result = searcher_named("attention")(priced_problem, priced_problem.budgets[0], settings)

    assert priced_problem.scorer.network.counts(result.plan).tolist() == [6, 3, 4]
    assert result.evaluations == 12


def test_rounds_fall_geometrically_and_never_take_back(
    priced_problem: PruningProblem, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each looks at the recovered network that the one before left."""
    problem, budget, looked = priced_problem, Budget("macs", 0.125), []
    problem = PruningProblem(problem.scorer, (budget,))
    look = problem.scorer.look

    def note(plan: PruningPlan, examples: int) -> Any:
        looked.append(plan)
        return look(plan, examples)

    monkeypatch.setattr(problem.scorer, "look", note)
    result = attention(problem, budget, SearchSettings(evaluations=4, rounds=3))

    network = problem.scorer.network
    plans = [*looked, result.plan]
    shares = [network.cost(plan).macs / network.full_cost.macs for plan in plans]
    np.testing.assert_array_less(shares, [0.5 + 1e-9, 0.25 + 1e-9, 0.125 + 1e-9])
    np.testing.assert_array_less([0.4, 0.18, 0.08], shares)
    masks = np.array([plan.mask(network.graph) for plan in plans])
    assert not (masks[1:] & ~masks[:-1]).any()


@pytest.mark.parametrize(
    "rules", [WidthRules(align=4), WidthRules(min_channels=3), WidthRules(bounds=(Bound.parse(".*=0.25..0.75"),))]
)
def test_rules_of_widths_hold(priced_problem: PruningProblem, rules: WidthRules) -> None:
    """In every round."""
    budget = Budget("macs", 0.5)
    problem = PruningProblem(priced_problem.scorer, (budget,), rules=rules)
    result = searcher_named("attention")(problem, budget, SearchSettings(evaluations=3))

    counts = problem.scorer.network.counts(result.plan)
    assert problem.widths.allow(counts).all()
    assert problem.limits[budget].holds(counts)


def test_attention_is_relative_to_the_mean_of_what_is_left(scorer: Scorer) -> None:
    """It sums to the number of channels left; before training, those of a group get the same."""
    problem = PruningProblem(scorer, (Budget("macs", 0.5),))
    graph = scorer.network.graph
    mask = np.random.default_rng(0).random(graph.units) < 0.6
    mask[[group.start for group in graph.groups]] = True
    gates = AttentionGates(problem, seed=0)
    gates.look(EpisodeState.bare(graph, scorer.statistics, mask))
    seen = gates.attention().detach().numpy()

    assert (seen[~mask] == 0).all()
    means = np.array([seen[group.units][mask[group.units]].mean() for group in graph.groups])
    assert means.mean() == pytest.approx(1.0, rel=1e-4)
    assert ((gates.opened().detach().numpy() < 1) & (gates.opened().detach().numpy() >= 0)).all()


@pytest.mark.parametrize("recovery", ["compensate", "reconstruct", "distill"])
def test_network_is_left_as_it_was_and_the_seed_decides(scorer: Scorer, recovery: Recovery) -> None:
    """Whatever the recovery, the weights are frozen."""
    settings = replace(scorer.settings, recovery=recovery, recovery_steps=2)
    problem = PruningProblem(Scorer(scorer.network, scorer.task, settings), (Budget("macs", 0.5),))
    before = {name: value.clone() for name, value in scorer.network.model.state_dict().items()}
    ends = []
    for seed in (0, 0, 1):
        gates = AttentionGates(problem, seed)
        gates.look(EpisodeState.bare(scorer.network.graph, scorer.statistics))
        gates.train(2)
        ends.append(gates.scores())

    assert (ends[0] == ends[1]).all()
    assert (ends[0] != ends[2]).any()
    assert all(torch.equal(value, before[name]) for name, value in scorer.network.model.state_dict().items())
