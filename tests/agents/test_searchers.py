"""What holds for every searcher: budgets, allowance, seeds, and the best plan where it is known."""

import random
import sys
from collections.abc import Callable
from itertools import product
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prunegym.agents.configuration.config import EvaluateConfig
from prunegym.agents.searching.searchers import (
    LEAST,
    SEARCHERS,
    WITHOUT_EVALUATIONS,
    WITHOUT_SEED,
    SearchSettings,
    check_evaluations,
    check_library,
    searcher_named,
)
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.widths import Bound, Counts, WidthRules

NAMES = [name for name in SEARCHERS if name != "policy"]
SEARCHING = [name for name in NAMES if name not in WITHOUT_EVALUATIONS]
LEARNING = ("dcpa", "attention")
"""Searchers that train on images themselves; what is tested here on known objectives, their own tests do on data."""
KNOWN = [name for name in NAMES if name not in LEARNING]
BY_LOSS = (*LEARNING, "laasp")
"""Searchers that go by losses, on which the toy of the others misleads; their own tests have one that does not."""
SEEDED = [name for name in NAMES if name not in WITHOUT_SEED]
BUDGETS = ("macs:0.5", "params:0.3", "latency:0.6", "latency:5ms")
BEST = (6, 3, 4)


def assert_within_and_maximal(problem: PruningProblem, counts: Counts) -> None:
    """The budget holds, every count is an allowed one, and no group has room for one step more."""
    (limit,) = problem.limits.values()
    choices = [one.tolist() for one in problem.widths.choices()]
    assert limit.holds(counts)
    for group, (count, allowed) in enumerate(zip(counts.tolist(), choices, strict=True)):
        assert count in allowed
        for larger in [one for one in allowed if one > count][:1]:
            assert not limit.holds(np.where(np.arange(len(counts)) == group, larger, counts))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_and_allowance_hold(problem: PruningProblem, name: str, budget: str) -> None:
    """MACs, parameters and the latency of a table alike; the plan is maximal: no group has room for one more."""
    one = problem.only(Budget.parse(budget))
    result = searcher_named(name)(one, one.budgets[0], SearchSettings(evaluations=9))

    assert_within_and_maximal(one, problem.scorer.network.counts(result.plan))
    assert (result.evaluations == 0) == (name in WITHOUT_EVALUATIONS)
    assert result.evaluations <= 9


@st.composite
def rules(draw: st.DrawFn) -> WidthRules:
    """Alignment, fewest channels, and bounds on some or all groups."""
    low, high = draw(st.sampled_from([("", ""), ("0.25", ""), ("", "0.8"), ("8ch", "0.75"), ("0.5", "0.5")]))
    pattern = draw(st.sampled_from([".*", "conv1", ".*conv2"]))
    bounds = (Bound.parse(f"{pattern}={low}..{high}"),) if low or high else ()
    return WidthRules(draw(st.sampled_from([1, 2, 4, 8])), draw(st.sampled_from([1, 5])), bounds)


@pytest.mark.parametrize("name", KNOWN)
@settings(max_examples=12)
@given(rules=rules(), kind=st.sampled_from(["macs", "params", "latency"]), tightness=st.floats(0, 1))
def test_rules_of_widths_hold(
    problem: PruningProblem,
    known_scorer: Callable[[], Any],
    name: str,
    rules: WidthRules,
    kind: str,
    tightness: float,
) -> None:
    """Every plan that is scored on the way has allowed counts; the result is maximal in its steps, at any budget."""
    known = known_scorer()
    loose = PruningProblem(known, (Budget(kind, 1.0),), problem.latency, rules)
    (limit,) = loose.limits.values()
    least = limit.fraction(loose.widths.smallest)
    share = min(1.0, least + 1e-9 + tightness * (1 - least))  # from the least the rules leave to all
    one = PruningProblem(known, (Budget(kind, share),), problem.latency, rules)
    evaluations = 3 if name == "amc" else 8  # its agent learns after each, which takes time
    result = searcher_named(name)(one, one.budgets[0], SearchSettings(evaluations=evaluations))

    for plan in known.plans:
        assert one.widths.allow(known.network.counts(plan)).all()
    assert_within_and_maximal(one, known.network.counts(result.plan))


@pytest.mark.parametrize("name", KNOWN)
def test_blocks_stay_left_out(known_scorer: Callable[[], Any], name: str) -> None:
    """Of every plan; widths then fill the budget of what is left."""
    known = known_scorer()
    (block,) = known.network.blocks
    one = PruningProblem(known, (Budget("macs", 0.5),)).without([block])
    result = searcher_named(name)(one, one.budgets[0], SearchSettings(evaluations=8))

    assert all(plan.removed == (block,) for plan in [*known.plans, result.plan])
    assert known.network.cost(result.plan).macs <= 0.5 * known.network.full_cost.macs
    assert_within_and_maximal(one, known.network.counts(result.plan))


@pytest.mark.parametrize("name", SEARCHING)
def test_history_ends_with_the_score_of_the_plan(live_problem: PruningProblem, name: str) -> None:
    """After the evaluations that were paid."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=11))

    assert result.history[-1] == (result.evaluations, live_problem.scorer.score(result.plan).score)


@pytest.mark.parametrize("name", SEARCHING)
def test_improvements_are_the_steps_of_the_history(live_problem: PruningProblem, name: str) -> None:
    """Each with the plan that scored so much, and the time it took."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=11))

    best = [score for _, score in result.history]
    risen = [step for step, before in zip(result.history, [-1.0, *best], strict=False) if step[1] > before]
    assert [(one.evaluations, one.score) for one in result.improvements] == risen
    assert all(live_problem.scorer.score(one.plan).score == one.score for one in result.improvements)
    assert result.improvements[-1].plan == result.plan
    seconds = [0.0, *(one.seconds for one in result.improvements), result.seconds]
    assert seconds == sorted(seconds)


def test_best_plan_of_the_toy_is_the_known_one(live_problem: PruningProblem) -> None:
    """By trying all: the channels that reach the output, and no plan ties with it."""
    (limit,) = live_problem.limits.values()
    plans = [np.array(counts) for counts in product(range(1, 9), repeat=3)]
    scores = {
        tuple(one.tolist()): live_problem.scorer.score(live_problem.plan(one)).score
        for one in plans
        if 0.8 * limit.most <= limit.value(one) <= limit.most
    }

    assert max(scores, key=lambda one: scores[one]) == BEST
    assert scores.pop(BEST) > 0.9999
    assert max(scores.values()) < 0.999


@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("uniform", *BY_LOSS)])
def test_searcher_finds_the_best_plan_of_the_toy(live_problem: PruningProblem, name: str) -> None:
    """Allocators without a look at a score, the others in forty evaluations."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=40))

    assert tuple(live_problem.scorer.network.counts(result.plan).tolist()) == BEST


@pytest.mark.parametrize("name", [name for name in SEEDED if name not in LEARNING])
def test_seed_decides_the_search(known_problem: PruningProblem, name: str) -> None:
    """The same gives the same plans in the same order; another gives others."""
    asked = []
    for seed in (0, 0, 1):
        known_problem.scorer.plans.clear()
        searcher_named(name)(known_problem, known_problem.budgets[0], SearchSettings(evaluations=5, seed=seed))
        asked.append(list(known_problem.scorer.plans))

    assert asked[0] == asked[1] != asked[2]
    assert len(asked[0]) == 5


@pytest.mark.parametrize("name", sorted(WITHOUT_SEED - WITHOUT_EVALUATIONS))
def test_seed_makes_no_difference_to_searches_that_draw_nothing(known_problem: PruningProblem, name: str) -> None:
    """So a comparison may run them once."""
    asked = []
    for seed in (0, 1):
        known_problem.scorer.plans.clear()
        searcher_named(name)(known_problem, known_problem.budgets[0], SearchSettings(evaluations=30, seed=seed))
        asked.append(list(known_problem.scorer.plans))

    assert asked[0] == asked[1]


@pytest.mark.parametrize("name", [name for name in SEARCHING if name not in LEARNING])
def test_least_evaluations_are_those_a_searcher_insists_on(known_problem: PruningProblem, name: str) -> None:
    """One fewer is refused by the check and by the searcher alike; that many are enough."""
    budget = known_problem.budgets[0]
    least = next(n for n in range(1, 99) if not _refused(lambda n=n: check_evaluations(name, known_problem, n)))

    assert _refused(lambda: check_evaluations(name, known_problem, least - 1))
    assert _refused(lambda: searcher_named(name)(known_problem, budget, SearchSettings(evaluations=least - 1)))
    assert searcher_named(name)(known_problem, budget, SearchSettings(evaluations=least)).evaluations <= least


def _refused(action: Callable[[], object]) -> bool:
    """Whether it is refused for its evaluations."""
    try:
        action()
    except PruningError as fault:
        return "`--evaluations` should be at least" in str(fault)
    return False


@pytest.mark.parametrize("name", sorted(WITHOUT_EVALUATIONS))
def test_allocators_need_no_evaluations(known_problem: PruningProblem, name: str) -> None:
    """Nor do policies."""
    check_evaluations(name, known_problem, 0)


@pytest.mark.parametrize("name", SEARCHING)
def test_global_generators_are_left_alone(live_problem: PruningProblem, name: str) -> None:
    """Also by the libraries behind the searchers."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=6))

    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", [name for name in SEEDED if name not in LEAST])
def test_one_evaluation_is_enough(live_problem: PruningProblem, name: str) -> None:
    """For those that need no more."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=1))

    assert result.evaluations == 1


@pytest.mark.parametrize("name", SEARCHING)
def test_searcher_without_evaluations_is_refused(live_problem: PruningProblem, name: str) -> None:
    """Also by the command, before anything is computed."""
    with pytest.raises(PruningError, match=f"`--evaluations` should be at least [0-9]+ (for|with) searcher {name}"):
        searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings())
    with pytest.raises(PruningError, match=f"`--evaluations` should be at least 1 with searcher {name}"):
        EvaluateConfig(network=("digits_vgg",), searcher=(name,), evaluations=0)


@pytest.mark.parametrize("name", NAMES)
def test_network_with_one_group_is_pruned(live_problem: PruningProblem, name: str) -> None:
    """There is one plan, and every searcher comes to it."""
    whole = live_problem.scorer
    network = PrunableNetwork(whole.network.model, whole.network.example_inputs, keep=["first", "third"])
    problem = PruningProblem(Scorer(network, whole.task, whole.settings), (Budget("macs", 0.5),))
    result = searcher_named(name)(problem, problem.budgets[0], SearchSettings(evaluations=6))

    assert network.counts(result.plan) == problem.uniform_counts(problem.limits[problem.budgets[0]])


@pytest.mark.parametrize("name", sorted(WITHOUT_EVALUATIONS - {"policy"}))
@pytest.mark.parametrize("budget", ["macs:0.5", "macs:0.2", "params:0.3"])
def test_budget_is_spent_to_a_hundredth_where_groups_are_fine(
    known_problem: PruningProblem, name: str, budget: str
) -> None:
    """Twelve groups of 16 to 64 channels: plans are compared at equal realised cost."""
    scorer = known_problem.scorer
    scores = scorer.criterion_scores("l1")
    scorer.statistics = SimpleNamespace(taylor_squared=scores, residual_taylor=scores)
    problem = PruningProblem(scorer, (Budget.parse(budget),))
    (limit,) = problem.limits.values()
    result = searcher_named(name)(problem, problem.budgets[0], SearchSettings())

    assert 0.99 * limit.most <= limit.value(scorer.network.counts(result.plan)) <= limit.most


@pytest.mark.parametrize(("name", "library"), [("tpe", "optuna"), ("cmaes", "cma"), ("cmaes_prior", "cma")])
def test_missing_library_is_named_with_the_command_that_installs_it(
    live_problem: PruningProblem, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the configuration already, and by the searcher."""
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"`--searcher` {name} needs the package {library}.*pip install 'prunegym\[search\]'"

    for config in (EvaluateConfig, CompareConfig):
        with pytest.raises(PruningError, match=message):
            config(network=("digits_vgg",), searcher=("uniform", name))
    with pytest.raises(PruningError, match=message):
        searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=2))


def test_installed_library_is_found() -> None:
    """Whether or not it has been imported; searchers without one need none."""
    for name in SEARCHERS:
        check_library(name)
