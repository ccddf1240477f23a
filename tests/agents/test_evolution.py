"""Evolution of keep ratios, and LeGR."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.agents.searching.evolution import crossed, evolution, legr, mutated
from prunegym.agents.searching.search import SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.widths import Bound, WidthRules


@given(st.integers(0, 1000), st.integers(1, 30))
def test_mutation_moves_some_logits_of_one_parent(seed: int, groups: int) -> None:
    """The others stay exactly."""
    rng = np.random.default_rng(seed)
    parents = [rng.normal(size=groups) for _ in range(3)]

    child = mutated(rng, parents)

    assert any(((child == parent) | (np.abs(child - parent) < 6)).all() for parent in parents)
    assert groups < 20 or max((child == parent).sum() for parent in parents) >= groups // 2


def test_mutation_changes_a_tenth_on_average(rng: np.random.Generator) -> None:
    """Of many groups; of few, one."""
    for groups, expected in ((100, 10), (5, 1)):
        parent = np.zeros(groups)
        changed = [np.count_nonzero(mutated(rng, [parent])) for _ in range(400)]
        assert np.mean(changed) == pytest.approx(expected, rel=0.15)


@given(st.integers(0, 1000), st.integers(1, 8))
def test_crossover_takes_each_logit_from_a_parent(seed: int, groups: int) -> None:
    """And from no more than two of them."""
    rng = np.random.default_rng(seed)
    parents = [np.full(groups, float(index)) for index in range(5)]

    child = crossed(rng, parents)

    assert len(set(child.tolist())) <= 2
    assert set(child.tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def test_evolution_wastes_few_evaluations_on_plans_it_has_scored(known_problem: PruningProblem) -> None:
    """A child whose plan is known is drawn again."""
    evolution(known_problem, known_problem.budgets[0], SearchSettings(evaluations=60))

    plans = known_problem.scorer.plans
    assert len(plans) == 60
    assert len(set(plans)) >= 58


def test_evolution_ends_better_than_it_began(known_problem: PruningProblem) -> None:
    """The mean of the last generation against that of the first."""
    evolution(known_problem, known_problem.budgets[0], SearchSettings(evaluations=80))

    scores = [known_problem.scorer.score(plan).score for plan in list(known_problem.scorer.plans)]
    assert np.mean(scores[-8:]) > np.mean(scores[:8]) + 0.05


def global_ranking(problem: PruningProblem, budget: Budget, scores: np.ndarray) -> list[int]:
    """A tenth of each group stays; then, from the best score down, what fits."""
    group_of, limit = problem.scorer.network.graph.group_of, problem.limits[budget]
    least = np.ceil(0.1 * problem.sizes).astype(np.int64)
    kept, rank = least.copy(), np.zeros_like(least)
    for unit in np.argsort(-scores, kind="stable"):
        rank[group_of[unit]] += 1
        more = kept + (np.arange(len(kept)) == group_of[unit])
        kept = more if rank[group_of[unit]] > least[group_of[unit]] and limit.holds(more) else kept
    return kept.tolist()


def test_legr_starts_with_the_squared_norms_as_they_are(known_problem: PruningProblem) -> None:
    """One threshold for the whole network, without scale and shift."""
    legr(known_problem, known_problem.budgets[0], SearchSettings(evaluations=1))

    (plan,) = known_problem.scorer.plans
    energies = known_problem.scorer.criterion_scores("l2") ** 2
    expected = global_ranking(known_problem, known_problem.budgets[0], energies)
    assert known_problem.scorer.network.counts(plan).tolist() == expected


def test_legr_draws_a_scale_and_a_shift_for_each_group(known_problem: PruningProblem) -> None:
    """The second plan is that of log-normal scales and of shifts as wide as the squared norms spread."""
    budget, graph = known_problem.budgets[0], known_problem.scorer.network.graph
    energies = known_problem.scorer.criterion_scores("l2") ** 2
    rng = np.random.default_rng(4)
    spread = np.array([energies[group.units].std() for group in graph.groups])
    scale = np.exp(rng.normal(0, 1, 12))
    shift = rng.normal(0, 1, 12) * spread
    legr(known_problem, budget, SearchSettings(evaluations=13, seed=4))

    counts = known_problem.scorer.network.counts(known_problem.scorer.plans[1])
    scores = scale[graph.group_of] * energies + shift[graph.group_of]
    assert counts.tolist() == global_ranking(known_problem, budget, scores)


def test_legr_gives_the_tenth_up_where_the_budget_is_out_of_reach(known_problem: PruningProblem) -> None:
    """Instead of refusing a budget that others reach."""
    budget = Budget("macs", 0.012)
    problem = PruningProblem(known_problem.scorer, (budget,))
    found = legr(problem, budget, SearchSettings(evaluations=2))

    least = np.ceil(0.1 * problem.sizes).astype(np.int64)
    assert not problem.limits[budget].holds(least)
    assert problem.limits[budget].holds(problem.scorer.network.counts(found.plan))


def test_legr_rounds_the_tenth_up_to_what_is_allowed(known_problem: PruningProblem) -> None:
    """In steps of eight channels; a group that may have no more than a twentieth keeps that."""
    budget = Budget("macs", 0.5)
    rules = WidthRules(bounds=(Bound.parse("layer3.1.conv1=..0.05"), Bound.parse("layer3.2.conv1=..0.5")))
    problem = PruningProblem(known_problem.scorer, (budget,), rules=rules)
    aligned = PruningProblem(known_problem.scorer, (budget,), rules=WidthRules(align=8))
    bounded = [group.name for group in known_problem.scorer.network.graph.groups].index("layer3.1.conv1")
    for one in (problem, aligned):
        one.scorer.plans.clear()
        legr(one, budget, SearchSettings(evaluations=12))
        counts = np.array([one.scorer.network.counts(plan) for plan in one.scorer.plans])
        if one is aligned:
            assert (counts % 8 == 0).all()
            assert (counts >= 8).all()
        else:
            assert (counts[:, bounded] == 3).all()
            assert (np.delete(counts, bounded, axis=1) >= 0.1 * np.delete(one.sizes, bounded)).all()


def test_legr_learns(known_problem: PruningProblem) -> None:
    """Transformed norms come nearer to the best plan than the norms themselves."""
    found = legr(known_problem, known_problem.budgets[0], SearchSettings(evaluations=150))

    assert found.history[-1][1] > found.history[0][1] + 0.05
