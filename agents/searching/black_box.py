"""Black-box search over the keep ratios of all groups: random, TPE and CMA-ES.

What is asked for is projected onto the budget, so all points that differ by one shift of the logits are one plan.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy.special import expit

from prunegym.agents.searching.prior import LEAST_OF_PRIOR, best_prior
from prunegym.agents.searching.search import LOWEST, Search, SearchResult, SearchSettings, missing_library
from prunegym.envs.actions import action_for, keep_ratios
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

Floats = NDArray[np.float64]

SIGMA = 1.0
"""Initial step of CMA-ES in logits: one standard deviation takes a keep ratio of 0.5 to 0.27 or 0.73."""
STANDARD_DEVIATION = 0.08
"""Initial step of CMA-ES around the prior, in units of the action: that of agents (``--std``)."""


def random(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The best of random keep ratios, drawn evenly between 0.05 and 1.

    In the form of Li et al., "EagleEye: Fast Sub-net Evaluation for Efficient Neural Network Pruning", ECCV 2020:
    random ratios, and batch normalisation recalibrated before a candidate is scored (the scorer does that for every
    searcher). EagleEye draws until a candidate happens to cost what it should; here each is projected onto the budget.
    """
    search = Search("random", problem, budget, settings)
    while search.left:
        search.ask(search.rng.uniform(LOWEST, 1.0, len(problem.sizes)))
    return search.result()


def tpe(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Tree-structured Parzen estimator over keep ratios in [0.05, 1], with Optuna's defaults.

    Bergstra et al., "Algorithms for Hyper-Parameter Optimization", NeurIPS 2011. The first plans are random.

    Raises:
        PruningError: Optuna is not installed.
    """
    try:
        import optuna
    except ImportError as fault:
        raise missing_library("tpe", "optuna", fault) from fault
    search = Search("tpe", problem, budget, settings)
    names = [f"group_{index}" for index in range(len(problem.sizes))]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # else it announces the study
    try:
        sampler = optuna.samplers.TPESampler(seed=int(search.rng.integers(2**31)))
        study = optuna.create_study(direction="maximize", sampler=sampler)
        while search.left:
            trial = study.ask()
            keep = np.array([trial.suggest_float(name, LOWEST, 1.0) for name in names])
            study.tell(trial, search.ask(keep))
    finally:
        optuna.logging.set_verbosity(verbosity)
    return search.result()


def cmaes(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """CMA-ES over the logits of the keep ratios, from the uniform allocation, with the defaults of pycma.

    Hansen, "The CMA Evolution Strategy: A Tutorial", 2016. A last generation that the allowance does not complete is
    scored but not learned from.

    Raises:
        PruningError: pycma is not installed.
    """
    _check_pycma("cmaes")
    search = Search("cmaes", problem, budget, settings)
    _evolve(search, np.zeros(len(problem.sizes)), SIGMA, expit)
    return search.result()


def cmaes_prior(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """CMA-ES from where policies start, over their actions, with the noise that they begin with.

    Ours, so that comparisons tell what an agent learns from what it was given: the best of the knapsack, the uniform
    allocation and halfway between them, for three evaluations, and then the same small steps around it.

    Raises:
        PruningError: pycma is not installed.
    """
    _check_pycma("cmaes_prior")
    search = Search("cmaes_prior", problem, budget, settings, least=LEAST_OF_PRIOR)
    start = action_for(best_prior(search) / problem.sizes).astype(np.float64)
    _evolve(search, start, STANDARD_DEVIATION, keep_ratios)
    return search.result()


def _check_pycma(searcher: str) -> None:
    """Before a search says that it begins."""
    try:
        import cma  # noqa: F401
    except ImportError as fault:
        raise missing_library(searcher, "cma", fault) from fault


def _evolve(search: Search, start: Floats, sigma: float, keep_of: Callable[[Floats], Floats]) -> None:
    """Spend what is left of an allowance on CMA-ES.

    Args:
        search: Scores what is asked.
        start: Mean of the first generation ``(groups,)``.
        sigma: Its standard deviation.
        keep_of: Keep ratios of a point ``(groups,)``.
    """
    import cma

    groups = len(start)
    options = {
        "randn": lambda *shape: search.rng.standard_normal(shape),
        "seed": np.nan,  # leaves numpy's global generator alone
        "verbose": -9,
        "verb_log": 0,
    }
    # pycma wants two dimensions; with one group there is one plan, and the second changes nothing
    strategy = cma.CMAEvolutionStrategy(np.pad(start, (0, max(0, 2 - groups))), sigma, options)
    while search.left:
        asked = strategy.ask(min(strategy.popsize, search.left))
        losses = [-search.ask(keep_of(point[:groups])) for point in asked]
        if len(asked) == strategy.popsize:
            strategy.tell(asked, losses)
