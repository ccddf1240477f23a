"""What no searcher may do, and what an evaluation is."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from prunegym.agents.searching import searchers
from prunegym.agents.searching.search import Search, SearchResult, SearchSettings, checked
from prunegym.agents.searching.searchers import searcher_named, uniform
from prunegym.agents.searching.trail import Improvement
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer
from prunegym.pruning.widths import Bound, WidthRules

SETTINGS = SearchSettings(evaluations=3)


def search_of(problem: PruningProblem, evaluations: int = 3) -> Search:
    """A search that has just begun."""
    return Search("test", problem, problem.budgets[0], SearchSettings(evaluations=evaluations))


def test_plan_that_is_asked_again_counts_again(live_problem: PruningProblem) -> None:
    """Though the scorer remembers it: the price does not depend on what ran before."""
    search = search_of(live_problem)
    counts = search.project(np.full(3, 0.5))
    scores = [search.score(counts) for _ in range(2)]

    assert scores[0] == scores[1] == live_problem.scorer.score(live_problem.plan(counts)).score
    assert search.evaluations == 2
    assert search.left == 1


def test_more_plans_than_allowed_are_refused(live_problem: PruningProblem) -> None:
    """Before the plan is scored."""
    search = search_of(live_problem, evaluations=1)
    search.ask(np.full(3, 0.5))

    with pytest.raises(PruningError, match="should score at most 1 plans"):
        search.ask(np.full(3, 0.5))
    assert search.evaluations == 1


def test_history_is_the_best_score_after_every_evaluation(live_problem: PruningProblem) -> None:
    """Beginning with the first plan within the budget; later steps above it are paid for, and never the result."""
    search = search_of(live_problem, evaluations=4)
    search.probe(live_problem.sizes)
    first = search.ask(np.full(3, 0.5))
    search.probe(live_problem.sizes)
    better = search.ask(np.array([0.75, 0.375, 0.5]))
    result = search.result()

    assert better > first
    assert result.history == [(2, first), (3, first), (4, better)]
    assert [(one.evaluations, one.score) for one in result.improvements] == [(2, first), (4, better)]
    assert result.improvements[-1].plan == result.plan
    assert 0 < result.improvements[0].seconds < result.improvements[1].seconds <= result.seconds
    assert result.evaluations == 4
    assert live_problem.scorer.score(result.plan).score == better


@pytest.mark.parametrize("keep", [[np.nan, 0.5, 0.5], [np.inf, 0.5, 0.5], [1.1, 0.5, 0.5], [-0.1, 0.5, 0.5], [0.5]])
def test_ratios_that_are_none_are_refused(live_problem: PruningProblem, keep: list[float]) -> None:
    """Not finite, outside [0, 1], or of other groups: the searcher is named."""
    with pytest.raises(PruningError, match=r"Searcher test should ask for 3 keep ratios in \[0, 1\]"):
        search_of(live_problem).ask(np.array(keep))


@pytest.mark.parametrize("counts", [[0, 4, 4], [4, 4, 9], [4, 4], [4.0, 4.0, 4.0]])
def test_counts_that_are_no_plan_are_refused(live_problem: PruningProblem, counts: list[int]) -> None:
    """An empty group, more channels than there are, other groups, or no whole numbers."""
    with pytest.raises(PruningError, match="should keep whole numbers of channels"):
        search_of(live_problem).probe(np.array(counts))


@pytest.mark.parametrize("counts", [[4, 4, 6], [2, 4, 4], [8, 4, 4]])
def test_counts_that_break_the_rules_of_widths_are_refused(live_problem: PruningProblem, counts: list[int]) -> None:
    """Not aligned, fewer than the fewest, or above a bound; the rules are named."""
    rules = WidthRules(align=4, min_channels=3, bounds=(Bound.parse("first=..0.5"),))
    problem = PruningProblem(live_problem.scorer, (Budget("macs", 0.5),), rules=rules)

    with pytest.raises(PruningError, match=r"may keep \(align 4, min-channels 3, bound 'first=..0.5'\)"):
        search_of(problem).probe(np.array(counts))


def test_plan_above_the_budget_is_refused(live_problem: PruningProblem) -> None:
    """The message says what it would cost."""
    with pytest.raises(PruningError, match=r"within macs:0\.26.*Received one that keeps 100\.00%"):
        search_of(live_problem).score(live_problem.sizes)


def test_score_that_is_not_finite_is_refused(known_problem: PruningProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task of one's own may give one."""
    monkeypatch.setattr(known_problem.scorer, "score", lambda _: Score(float("nan"), 0.0, 1))

    with pytest.raises(PruningError, match="`task` should give finite scores. Received nan"):
        search_of(known_problem).ask(np.full(len(known_problem.sizes), 0.5))


def test_scores_that_are_not_finite_hold_no_threshold(live_problem: PruningProblem) -> None:
    """NaN would be sorted somewhere."""
    scores = np.full(live_problem.scorer.network.graph.units, np.nan)

    with pytest.raises(PruningError, match="`scores` should be finite"):
        live_problem.threshold_counts(scores, live_problem.limits[live_problem.budgets[0]])


def broken_by(**changes: object) -> Callable[..., SearchResult]:
    """A searcher whose result is changed."""

    def search(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
        return replace(uniform(problem, budget, settings), **changes)

    return search


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluations": 4}, "should score at most 3 plans. Received a result that took 4"),
        ({"history": [(1, float("nan"))], "evaluations": 1}, "should report finite best scores that never fall"),
        ({"history": [(1, 0.5), (2, 0.4)], "evaluations": 2}, "should report finite best scores that never fall"),
        ({"history": [(2, 0.5)], "evaluations": 1}, "should report one best score per evaluation"),
        ({"history": [(1, 0.5), (1, 0.5)], "evaluations": 1}, "should report one best score per evaluation"),
        ({"improvements": [Improvement(1, 0.1, PruningPlan(()), 0.5)]}, "should return the plan it improved to last"),
    ],
)
def test_result_that_breaks_the_rules_is_refused(
    live_problem: PruningProblem, changes: dict[str, object], message: str
) -> None:
    """Whoever made it."""
    with pytest.raises(PruningError, match=f"Searcher broken {message}"):
        checked("broken", broken_by(**changes))(live_problem, live_problem.budgets[0], SETTINGS)


def test_broken_searcher_is_refused_under_its_name(
    live_problem: PruningProblem, toys: Callable[[str], PrunableNetwork], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A plan beyond the budget, without a block it should have, against each rule of widths, and of another network."""
    graph = live_problem.scorer.network.graph
    ruled = [
        PruningProblem(live_problem.scorer, (Budget("macs", 0.4),), rules=rules)
        for rules in (WidthRules(min_channels=4), WidthRules(align=2), WidthRules(bounds=(Bound.parse("first=..0.5"),)))
    ]
    thin = PruningPlan.from_scores(graph, np.array([6, 3, 4]), live_problem.scorer.unit_scores)
    for problem, plan, message in (
        (live_problem, PruningPlan.unpruned(graph), r"Searcher mine should return a plan within macs:0\.26"),
        (live_problem, thin.without(["second"]), r"Searcher mine should leave out the blocks \[\].*Received \['second"),
        *((one, thin, r"may keep \((min-channels 4|align 2|bound 'first=..0.5')\).*\[6, 3, 4\]") for one in ruled),
        (live_problem, PruningPlan.unpruned(toys("residual").graph), "`plan` should name exactly"),
    ):
        monkeypatch.setitem(searchers.SEARCHERS, "mine", broken_by(plan=plan))
        with pytest.raises(PruningError, match=message):
            searcher_named("mine")(problem, problem.budgets[0], SETTINGS)


def test_unknown_searcher_is_refused_with_the_nearest() -> None:
    """As every name is."""
    with pytest.raises(PruningError, match="Did you mean 'netadapt'"):
        searcher_named("netadpt")


def few_images(scorer: Scorer, examples: int) -> PruningProblem:
    """The trained network scored on so few images that luck matters."""
    own = Scorer(scorer.network, scorer.task, replace(scorer.settings, examples=examples), statistics=scorer.statistics)
    return PruningProblem(own, (Budget("macs", 0.4),))


def test_search_ends_with_a_second_look(scorer: Scorer) -> None:
    """Of the three best of 84 plans that whose score on twice the images is best, within the allowance."""
    problem = few_images(scorer, 30)
    search = search_of(problem, evaluations=90)
    scores = {}
    while search.left:
        counts = search.project(search.rng.uniform(0.1, 1, len(problem.sizes)))
        scores[problem.plan(counts)] = search.score(counts)
    leaders = sorted(scores, key=lambda plan: -scores[plan])[:3]
    result = search.result()

    assert len(search.trail.history) == result.evaluations == 90
    assert result.plan == max(leaders, key=lambda plan: problem.scorer.score(plan, examples=60).score)
    assert result.improvements[-1].plan == result.plan
    assert result.improvements[-1].score == scores[result.plan]


@pytest.mark.parametrize(("evaluations", "examples", "choosing"), [(59, 30, True), (90, 10_000, True), (90, 30, False)])
def test_there_is_no_second_look_without_a_choice(
    scorer: Scorer, evaluations: int, examples: int, choosing: bool
) -> None:
    """Too few evaluations, no further images, or a searcher that comes to one plan: all of the allowance is its own."""
    problem = few_images(scorer, examples)
    settings = SearchSettings(evaluations=evaluations)
    search = Search("test", problem, problem.budgets[0], settings, choosing=choosing)

    assert search.left == evaluations
