"""What a search notes of its way."""

import json
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.agents.searching.search import SearchResult
from prunegym.agents.searching.trail import Improvement, Trail, in_force
from prunegym.pruning.plan import PruningPlan


def plan(number: int) -> PruningPlan:
    """A plan that differs from those of other numbers."""
    return PruningPlan((("group", (number,)),))


def trail_of(scores: list[float]) -> Trail:
    """A trail whose plans are numbered from 0; each evaluation takes a second."""
    seconds = count(0.0, 0.5)  # read when the trail begins, and once per improvement
    trail = Trail(clock=lambda: next(seconds))
    for number, score in enumerate(scores):
        trail.add(plan(number), score)
    return trail


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
def test_trail_keeps_the_running_maximum(scores: list[float]) -> None:
    """Its history, its best plan and its improvements are those of a plain loop over all scores."""
    trail = trail_of(scores)

    running = [max(scores[: end + 1]) for end in range(len(scores))]
    assert trail.history == [(end + 1, score) for end, score in enumerate(running)]
    assert trail.best == plan(scores.index(max(scores)))
    firsts = [end for end in range(len(scores)) if scores[end] == running[end] and scores.index(running[end]) == end]
    assert [one.evaluations - 1 for one in trail.improvements] == firsts


def test_trail_ignores_a_score_that_is_no_number() -> None:
    """A plan that scores NaN is never the best."""
    trail = trail_of([float("nan"), 0.25])

    assert trail.best == plan(1)
    assert trail.evaluations == 2


def test_step_on_the_way_is_paid_for_and_never_the_best() -> None:
    """Before the first plan that can be returned there is no best score to note."""
    trail = Trail()
    trail.step()
    trail.add(plan(1), 0.2)
    trail.step()

    assert trail.evaluations == 3
    assert trail.history == [(2, 0.2), (3, 0.2)]
    assert [one.evaluations for one in trail.improvements] == [2]


def test_trail_becomes_a_search_result() -> None:
    """With the best plan and what was paid."""
    result = SearchResult(**trail_of([0.2, 0.5, 0.4]).result())

    assert result.plan == plan(1)
    assert result.evaluations == 3
    assert result.improvements[-1].score == 0.5


def test_trail_without_plan_has_no_result() -> None:
    """Nothing was scored."""
    with pytest.raises(RuntimeError, match="should score a plan"):
        Trail().result()


@pytest.mark.parametrize(("seconds", "number"), [(0.4, None), (0.5, 0), (0.9, 0), (1.0, 2), (9.0, 2)])
def test_plan_in_force_is_the_last_one_by_then(seconds: float, number: int | None) -> None:
    """Before the first there is none; after the last it stays."""
    found = in_force(trail_of([0.1, 0.1, 0.2]).improvements, seconds=seconds)

    assert (None if found is None else found.plan) == (None if number is None else plan(number))


def test_improvement_survives_json() -> None:
    """It is kept in run folders."""
    improvement = Improvement(3, 1.5, plan(2), 0.25)

    assert Improvement.from_json(json.loads(json.dumps(improvement.to_json()))) == improvement
