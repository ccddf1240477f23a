"""The problem that searchers and environments share."""

import numpy as np
import pytest

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.allocation import uniform
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Scorer


def test_every_budget_gets_its_limit(problem: PruningProblem) -> None:
    """Refused or applied at construction, not in the middle of a search."""
    assert list(problem.limits) == list(problem.budgets)


def test_problem_without_budget_is_rejected(scorer: Scorer) -> None:
    """There would be nothing to aim for."""
    with pytest.raises(PruningError, match="`budget` should be given at least once"):
        PruningProblem(scorer, ())


def test_impossible_budget_is_rejected_with_the_reachable_minimum(scorer: Scorer) -> None:
    """At construction; the error carries the minimum."""
    costs = scorer.network.costs
    least = costs.macs(np.ones(len(scorer.network.graph.groups), dtype=np.int64)) / costs.full.macs

    with pytest.raises(InfeasibleBudgetError, match="Ask for macs:") as caught:
        PruningProblem(scorer, (Budget("macs", least * 0.9),))
    assert caught.value.reachable == pytest.approx(least)


def test_smallest_widths_are_respected(scorer: Scorer) -> None:
    """By uniform and knapsack allocation alike."""
    smallest = scorer.network.graph.sizes // 2
    problem = PruningProblem(scorer, (Budget("macs", 0.4),), smallest=smallest)
    (limit,) = problem.limits.values()

    assert (problem.uniform_counts(limit) >= smallest).all()
    assert (problem.knapsack_counts(limit) >= smallest).all()


def test_smallest_widths_make_budgets_impossible(scorer: Scorer) -> None:
    """Half of each group is more than a tenth of the MACs."""
    with pytest.raises(InfeasibleBudgetError, match="every group at its smallest"):
        PruningProblem(scorer, (Budget("macs", 0.1),), smallest=scorer.network.graph.sizes // 2)


def test_plan_keeps_the_best_by_the_criterion(problem: PruningProblem, trained: PrunableNetwork) -> None:
    """Those with the highest scores of the scorer."""
    plan = problem.plan(problem.sizes // 2)

    mask = plan.mask(trained.graph)
    for group in trained.graph.groups:
        scores, kept = problem.scorer.unit_scores[group.units], mask[group.units]
        assert scores[kept].min() >= scores[~kept].max()


def test_reference_is_the_uniform_plan_at_the_same_budget(problem: PruningProblem) -> None:
    """What every reward is compared with."""
    budget = problem.budgets[0]
    counts = uniform(problem.sizes, problem.limits[budget], problem.least)

    assert problem.uniform_score(budget) == problem.scorer.score(problem.plan(counts))


def test_knapsack_gives_up_least_important_channels_per_cost(problem: PruningProblem) -> None:
    """It keeps more importance than the uniform allocation at the same budget."""
    scores, group_of = problem.scorer.statistics.taylor_squared, problem.scorer.network.graph.group_of

    def importance(counts: np.ndarray) -> float:
        return sum(float(np.sort(scores[group_of == g])[::-1][:count].sum()) for g, count in enumerate(counts))

    for limit in problem.limits.values():
        assert importance(problem.knapsack_counts(limit)) > importance(problem.uniform_counts(limit))


def test_problem_with_one_of_its_budgets_shares_the_scorer(problem: PruningProblem) -> None:
    """And with it every score that was computed."""
    one = problem.only(problem.budgets[1])

    assert one.budgets == problem.budgets[1:2]
    assert one.scorer is problem.scorer
