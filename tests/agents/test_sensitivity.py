"""Sensitivity curves and the common loss."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.agents.searching.search import SearchSettings
from prunegym.agents.searching.sensitivity import counts_within_loss, rising_curve, sensitivity
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.errors import PruningError
from prunegym.pruning.widths import Bound, WidthRules


def curves_of(*scores: list[float]) -> list[np.ndarray]:
    """Curves that rise to a common score of 1."""
    return [np.array([*np.sort(one), 1.0]) for one in scores]


@given(st.lists(st.lists(st.floats(0, 1), min_size=0, max_size=4), min_size=1, max_size=3), st.data())
def test_common_loss_is_the_smallest_that_the_budget_allows(scores: list[list[float]], data: st.DataObject) -> None:
    """By trying every loss that a curve takes, from the smallest."""
    curves = curves_of(*scores)
    steps = [data.draw(st.integers(1, 3)) for _ in curves]
    choices = [np.arange(1, len(curve) + 1) * step for curve, step in zip(curves, steps, strict=True)]
    most = data.draw(st.integers(sum(steps), sum(int(one[-1]) for one in choices)))
    for loss in sorted({0.0, *(1 - score for curve in curves for score in curve)}):
        kept = [next(k for k, score in enumerate(curve) if score >= 1 - loss) for curve in curves]
        expected = [int(one[k]) for one, k in zip(choices, kept, strict=True)]
        if sum(expected) <= most:
            break

    counts = counts_within_loss(curves, choices, lambda counts: counts.sum() <= most)

    assert counts.tolist() == expected


def test_curve_is_interpolated_and_rises_to_the_unpruned_score() -> None:
    """A measurement below a narrower one, or above the unpruned network, is noise."""
    curve = rising_curve(np.array([1, 3, 5]), np.array([0.2, 0.1, 0.95]), np.arange(1, 8), 0.9)

    assert curve == pytest.approx([0.2, 0.2, 0.2, 0.55, 0.9, 0.9, 0.9])


def test_curve_of_one_point_is_a_line() -> None:
    """The narrowest width is always measured."""
    curve = rising_curve(np.array([1]), np.array([0.5]), np.arange(1, 6), 0.9)

    assert curve == pytest.approx([0.5, 0.6, 0.7, 0.8, 0.9])


@pytest.mark.parametrize(("evaluations", "points"), [(14, 1), (26, 2), (37, 2), (38, 3)])
def test_points_of_the_curves_fit_the_allowance(known_problem: PruningProblem, evaluations: int, points: int) -> None:
    """The unpruned network, the same number of widths for each of the twelve groups, and the plan."""
    scorer = known_problem.scorer
    found = sensitivity(known_problem, known_problem.budgets[0], SearchSettings(evaluations=evaluations))

    counts = np.array([scorer.network.counts(plan) for plan in scorer.plans])
    changed = (counts[1:-1] < known_problem.sizes).sum(axis=1)
    groups = (counts[1:-1] < known_problem.sizes).argmax(axis=1)
    assert found.evaluations == len(counts) == 12 * points + 2 <= evaluations
    assert (counts[0] == known_problem.sizes).all()
    assert (changed == 1).all()
    assert (np.bincount(groups) == points).all()
    assert (counts[1:-1].min(axis=0) == 1).all()


def test_narrow_groups_are_measured_at_every_width_once(live_problem: PruningProblem) -> None:
    """However many evaluations there are."""
    found = sensitivity(live_problem, live_problem.budgets[0], SearchSettings(evaluations=1000))

    assert found.evaluations == 3 * 7 + 2


def test_curves_are_those_of_single_groups(live_problem: PruningProblem) -> None:
    """The plan is that of curves which are measured here, one group and one width after the other."""
    scorer, sizes = live_problem.scorer, live_problem.sizes
    (limit,) = live_problem.limits.values()
    curves = np.ones((3, 8))
    for group, count in product(range(3), range(1, 9)):
        counts = sizes.copy()
        counts[group] = count
        curves[group, count - 1] = scorer.score(live_problem.plan(counts)).score
    counts = counts_within_loss(list(np.maximum.accumulate(curves, axis=1)), [np.arange(1, 9)] * 3, limit.holds)

    found = sensitivity(live_problem, live_problem.budgets[0], SearchSettings(evaluations=23))

    assert (scorer.network.counts(found.plan) == live_problem.project(counts / sizes, limit)).all()


def test_curves_are_measured_at_widths_that_are_allowed(known_problem: PruningProblem) -> None:
    """All of them where the allowance permits; a group that may not be pruned has no curve and costs nothing."""
    scorer = known_problem.scorer
    rules = WidthRules(align=8, bounds=(Bound.parse(".*=0.25..0.75"), Bound.parse("conv1=0.5")))
    problem = PruningProblem(scorer, known_problem.budgets, rules=rules)
    choices = [one.tolist() for one in problem.widths.choices()]
    assert min(map(len, choices)) == 1
    found = sensitivity(problem, problem.budgets[0], SearchSettings(evaluations=200))

    first, *measured, _ = np.array([scorer.network.counts(plan) for plan in scorer.plans])
    expected = [
        np.where(np.arange(len(choices)) == group, width, first)
        for group, allowed in enumerate(choices)
        for width in allowed[:-1]
    ]
    assert first.tolist() == [allowed[-1] for allowed in choices]
    assert sorted(map(tuple, measured)) == sorted(map(tuple, expected))
    assert found.evaluations == len(expected) + 2


def test_allowance_without_a_point_for_each_group_is_refused(known_problem: PruningProblem) -> None:
    """The message says what it takes."""
    with pytest.raises(PruningError, match=r"at least 14 for searcher sensitivity \(one for each of the 12 groups"):
        sensitivity(known_problem, known_problem.budgets[0], SearchSettings(evaluations=13))
