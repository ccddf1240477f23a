"""What holds for every searcher: budgets, allowance, seeds, and the best plan where it is known."""

import random
import sys
from itertools import product

import numpy as np
import pytest
import torch

from prunegym.agents.config import EvaluateConfig
from prunegym.agents.searchers import SEARCHERS, WITHOUT_EVALUATIONS, SearchSettings, check_library, searcher_named
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.scoring import Scorer

NAMES = [name for name in SEARCHERS if name != "policy"]
SEARCHING = [name for name in NAMES if name not in WITHOUT_EVALUATIONS]
SEEDED = [name for name in SEARCHING if name not in {"sensitivity", "netadapt"}]
BUDGETS = ("macs:0.5", "params:0.3", "latency:0.6", "latency:5ms")
BEST = (6, 3, 4)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_and_allowance_hold(problem: PruningProblem, name: str, budget: str) -> None:
    """MACs, parameters and the latency of a table alike; the plan is maximal: no group has room for one more."""
    one = Budget.parse(budget)
    result = searcher_named(name)(problem, one, SearchSettings(evaluations=9))

    counts = problem.scorer.network.counts(result.plan)
    limit = problem.limits[one]
    grown = [counts + np.eye(len(counts), dtype=np.int64)[group] for group in np.flatnonzero(counts < problem.sizes)]
    assert limit.holds(counts)
    assert not any(limit.holds(more) for more in grown)
    assert (result.evaluations == 0) == (name in WITHOUT_EVALUATIONS)
    assert result.evaluations <= 9


@pytest.mark.parametrize("name", SEARCHING)
def test_history_ends_with_the_score_of_the_plan(live_problem: PruningProblem, name: str) -> None:
    """After the evaluations that were paid."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=11))

    assert result.history[-1] == (result.evaluations, live_problem.scorer.score(result.plan).score)


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


@pytest.mark.parametrize("name", [name for name in NAMES if name != "uniform"])
def test_searcher_finds_the_best_plan_of_the_toy(live_problem: PruningProblem, name: str) -> None:
    """Allocators without a look at a score, the others in forty evaluations."""
    result = searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=40))

    assert tuple(live_problem.scorer.network.counts(result.plan).tolist()) == BEST


@pytest.mark.parametrize("name", SEEDED)
def test_seed_decides_the_search(known_problem: PruningProblem, name: str) -> None:
    """The same gives the same plans in the same order; another gives others."""
    asked = []
    for seed in (0, 0, 1):
        known_problem.scorer.plans.clear()
        searcher_named(name)(known_problem, known_problem.budgets[0], SearchSettings(evaluations=5, seed=seed))
        asked.append(list(known_problem.scorer.plans))

    assert asked[0] == asked[1] != asked[2]
    assert len(asked[0]) == 5


@pytest.mark.parametrize("name", SEARCHING)
def test_global_generators_are_left_alone(live_problem: PruningProblem, name: str) -> None:
    """Also by the libraries behind the searchers."""
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()  # noqa: NPY002
    searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=6))

    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), before[2])


@pytest.mark.parametrize("name", SEEDED)
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
    scorer.statistics = type("Taylor", (), {"taylor_squared": scorer.criterion_scores("l1")})()
    problem = PruningProblem(scorer, (Budget.parse(budget),))
    (limit,) = problem.limits.values()
    result = searcher_named(name)(problem, problem.budgets[0], SearchSettings())

    assert 0.99 * limit.most <= limit.value(scorer.network.counts(result.plan)) <= limit.most


@pytest.mark.parametrize(("name", "library"), [("tpe", "optuna"), ("cmaes", "cma")])
def test_missing_library_is_named_with_the_command_that_installs_it(
    live_problem: PruningProblem, name: str, library: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the configuration already, and by the searcher."""
    monkeypatch.setitem(sys.modules, library, None)
    message = rf"`--searcher` {name} needs the package {library}.*pip install 'prunegym\[search\]'"

    with pytest.raises(PruningError, match=message):
        EvaluateConfig(network=("digits_vgg",), searcher=(name,))
    with pytest.raises(PruningError, match=message):
        searcher_named(name)(live_problem, live_problem.budgets[0], SearchSettings(evaluations=2))


def test_installed_library_is_found() -> None:
    """Whether or not it has been imported; searchers without one need none."""
    for name in SEARCHERS:
        check_library(name)
