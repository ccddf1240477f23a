"""Random search, TPE and CMA-ES."""

import numpy as np
import optuna
import pytest

from prunegym.agents.configuration.config import AgentOptions
from prunegym.agents.searching.black_box import STANDARD_DEVIATION, cmaes, cmaes_prior, random, tpe
from prunegym.agents.searching.evolution import evolution
from prunegym.agents.searching.netadapt import netadapt
from prunegym.agents.searching.search import Searcher, SearchSettings
from prunegym.agents.searching.sensitivity import sensitivity
from prunegym.envs.prior import SHARES
from prunegym.envs.setting import PruningProblem


def counts_scored(problem: PruningProblem) -> list[list[int]]:
    """What a known objective was asked for, in order."""
    return [problem.scorer.network.counts(plan).tolist() for plan in problem.scorer.plans]


def test_random_search_scores_projected_uniform_ratios(known_problem: PruningProblem) -> None:
    """Between 0.05 and 1, from one generator."""
    rng, (limit,) = np.random.default_rng(3), known_problem.limits.values()
    random(known_problem, known_problem.budgets[0], SearchSettings(evaluations=4, seed=3))

    expected = [known_problem.project(rng.uniform(0.05, 1, 12), limit).tolist() for _ in range(4)]
    assert counts_scored(known_problem) == expected


def test_random_search_keeps_the_best_it_drew(known_problem: PruningProblem) -> None:
    """And nothing else."""
    found = random(known_problem, known_problem.budgets[0], SearchSettings(evaluations=8))

    plans = list(known_problem.scorer.plans)
    scores = [known_problem.scorer.score(plan).score for plan in plans]
    assert found.plan == plans[int(np.argmax(scores))]
    assert [score for _, score in found.history] == np.maximum.accumulate(scores).tolist()


def test_cmaes_is_centred_on_the_uniform_allocation(known_problem: PruningProblem) -> None:
    """The start of its first generation is what this mean says: no group is favoured."""
    uniform = known_problem.uniform_counts(known_problem.limits[known_problem.budgets[0]])
    for seed in range(4):
        cmaes(known_problem, known_problem.budgets[0], SearchSettings(evaluations=11, seed=seed))

    ratios = np.array(counts_scored(known_problem)) / known_problem.sizes
    assert ratios.mean(axis=0) == pytest.approx(uniform / known_problem.sizes, abs=0.12)


def test_cmaes_from_the_prior_begins_where_policies_do(known_problem: PruningProblem) -> None:
    """Three allocations first, then generations close around the best of them, which is not the uniform one here."""
    (limit,) = known_problem.limits.values()
    tried = [known_problem.prior_counts(limit, share) for share in SHARES]
    known_problem.scorer.best = tried[1]
    halfway, uniform = tried[1] / known_problem.sizes, tried[0] / known_problem.sizes
    generations = []
    for seed in range(8):
        known_problem.scorer.plans.clear()
        cmaes_prior(known_problem, known_problem.budgets[0], SearchSettings(evaluations=14, seed=seed))
        scored = np.array(counts_scored(known_problem)) / known_problem.sizes
        assert scored[:3].tolist() == [(counts / known_problem.sizes).tolist() for counts in tried]
        generations.append(scored[3:])

    found = np.concatenate(generations)
    assert np.abs(halfway - uniform).max() > 0.3
    assert found.mean(axis=0) == pytest.approx(halfway, abs=0.08)
    assert 0.02 < found.std(axis=0).mean() < 0.12  # plain CMA-ES begins with twice that


def test_noise_around_the_prior_is_that_of_agents() -> None:
    """Else the comparison is of noises."""
    assert AgentOptions.std == STANDARD_DEVIATION


def test_optuna_speaks_as_loudly_as_before(known_problem: PruningProblem) -> None:
    """Its verbosity is put back."""
    before = optuna.logging.get_verbosity()
    tpe(known_problem, known_problem.budgets[0], SearchSettings(evaluations=2))

    assert optuna.logging.get_verbosity() == before


def mean_best(problem: PruningProblem, searcher: Searcher, evaluations: int) -> float:
    """Mean over three seeds of the best score of the known objective."""
    settings = [SearchSettings(evaluations=evaluations, seed=seed) for seed in range(3)]
    return float(np.mean([searcher(problem, problem.budgets[0], one).history[-1][1] for one in settings]))


# generations, and greedy steps that take an evaluation for each of the twelve groups, need more of them
@pytest.mark.parametrize(
    ("searcher", "evaluations"), [(tpe, 60), (cmaes, 60), (sensitivity, 60), (evolution, 100), (netadapt, 150)]
)
def test_search_beats_random_at_equal_evaluations(
    known_problem: PruningProblem, searcher: Searcher, evaluations: int
) -> None:
    """On an objective that has one optimum, far from uniform, in twelve dimensions."""
    reached, by_chance = (mean_best(known_problem, one, evaluations) for one in (searcher, random))

    assert reached > by_chance + 0.01
