"""The problem that searchers and environments share."""

import numpy as np
import pytest

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.allocation import uniform
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.widths import Bound, WidthRules


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


def test_rules_of_widths_are_kept_by_every_allocation(scorer: Scorer, rng: np.random.Generator) -> None:
    """Uniform, knapsack and projection of whatever is asked, also after an earlier round."""
    rules = WidthRules(align=4, min_channels=6, bounds=(Bound.parse(".*=0.25..0.8"),))
    problem = PruningProblem(scorer, (Budget("macs", 0.4),), rules=rules)
    (limit,) = problem.limits.values()

    earlier = problem.project(rng.random(len(problem.sizes)), limit.tightened(0.6))
    later = [problem.uniform_counts(limit, earlier), problem.knapsack_counts(limit, largest=earlier)]
    for counts in (problem.uniform_counts(limit), problem.knapsack_counts(limit), earlier, *later):
        assert (counts % 4 == 0).all()
        assert (counts >= 6).all()
        assert (counts >= 0.25 * problem.sizes).all()
        assert (counts <= 0.8 * problem.sizes).all()
    assert all((counts <= earlier).all() for counts in later)


def test_rules_of_widths_make_budgets_impossible(scorer: Scorer) -> None:
    """Half of each group is more than a tenth of the MACs; the error tells the rules and what is within reach."""
    rules = WidthRules(bounds=(Bound.parse(".*=0.5.."),))
    costs = scorer.network.costs
    least = costs.macs(-(-scorer.network.graph.sizes // 2)) / costs.full.macs

    with pytest.raises(InfeasibleBudgetError, match=r"at its smallest \(bound '\.\*=0.5\.\.'\).*or loosen") as caught:
        PruningProblem(scorer, (Budget("macs", 0.1),), rules=rules)
    assert caught.value.reachable == pytest.approx(least)


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
    counts = uniform(problem.limits[budget], problem.widths)

    assert problem.uniform_score(budget) == problem.scorer.score(problem.plan(counts))


def test_knapsack_gives_up_least_important_channels_per_cost(problem: PruningProblem) -> None:
    """It keeps more importance than the uniform allocation at the same budget."""
    scores, group_of = problem.scorer.statistics.residual_taylor, problem.scorer.network.graph.group_of

    def importance(counts: np.ndarray) -> float:
        return sum(float(np.sort(scores[group_of == g])[::-1][:count].sum()) for g, count in enumerate(counts))

    for limit in problem.limits.values():
        assert importance(problem.knapsack_counts(limit)) > importance(problem.uniform_counts(limit))


def test_problem_with_one_of_its_budgets_shares_the_scorer(problem: PruningProblem) -> None:
    """And with it every score that was computed."""
    ruled = PruningProblem(problem.scorer, problem.budgets[:2], problem.latency, WidthRules(align=4))
    one = ruled.only(problem.budgets[1])

    assert one.budgets == problem.budgets[1:2]
    assert one.scorer is problem.scorer
    assert (one.widths.step == ruled.widths.step).all()
