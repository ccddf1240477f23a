"""All searchers by name, and the searcher `policy`.

Their protocol is in :mod:`prunegym.agents.searching.search`.

Searchers of the literature start where their papers start: uniform, random or unpruned. Policies start from the prior
(:mod:`prunegym.envs.prior`); `cmaes_prior` does too, so that comparisons tell what is learned from where it began.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable

import numpy as np

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.searching.allocators import global_magnitude, global_taylor, halp, knapsack, lamp, uniform
from prunegym.agents.searching.amc import amc
from prunegym.agents.searching.attention_pruning import attention
from prunegym.agents.searching.black_box import cmaes, cmaes_prior, random, tpe
from prunegym.agents.searching.dcpa import dcpa
from prunegym.agents.searching.evolution import evolution, legr
from prunegym.agents.searching.laasp import laasp
from prunegym.agents.searching.netadapt import least_evaluations as least_of_netadapt
from prunegym.agents.searching.netadapt import netadapt
from prunegym.agents.searching.prior import LEAST_OF_PRIOR, prior
from prunegym.agents.searching.search import (
    ONE_PLAN,
    LeastEvaluations,
    Searcher,
    SearchResult,
    SearchSettings,
    checked,
    missing_library,
)
from prunegym.agents.searching.sensitivity import least_evaluations as least_of_sensitivity
from prunegym.agents.searching.sensitivity import sensitivity
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.prior import take_prior
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.plan import PruningPlan

__all__ = [
    "SEARCHERS",
    "WITHOUT_EVALUATIONS",
    "WITHOUT_SEED",
    "SearchResult",
    "SearchSettings",
    "Searcher",
    "check_evaluations",
    "check_library",
    "own_plan",
    "policy",
    "prior",
    "searcher_named",
]


def policy(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The own plan of a trained policy: one deterministic pass.

    It scores no plan where it was trained; on another network or budget, three decide what it starts from
    (:mod:`prunegym.envs.prior`).
    """
    if settings.policy is None:
        raise PruningError(
            "`--policy` should name a policy file for searcher policy. Received none. Train one with `prunegym train`."
        )
    started = time.perf_counter()
    agent, metadata = load_policy(settings.policy, device=problem.scorer.device)
    rounds = settings.rounds or int(metadata.get("rounds", 1))
    evaluations = take_prior(problem, budget, metadata)
    plan = own_plan(agent, ChannelPruningEnv(problem, rounds=rounds), budget)
    return SearchResult(plan=plan, evaluations=evaluations, seconds=time.perf_counter() - started)


def own_plan(agent: PruningPolicy | None, env: ChannelPruningEnv, budget: Budget) -> PruningPlan:
    """The plan a policy makes by itself, without noise; that of an untrained policy (the prior) for None.

    Args:
        agent: The policy.
        env: Of the network, with the rounds and in the mode that the policy learned in; it scores nothing.
        budget: One of its budgets.
    """
    observation, _ = env.reset(options={"budget": budget})
    done = False
    while not done:
        prior = observation["prior"].astype(np.float32)
        observation, done = env.prune(prior if agent is None else agent.act(observation))
    return env.plan


SEARCHERS: dict[str, Searcher] = {
    "uniform": uniform,
    "global_magnitude": global_magnitude,
    "lamp": lamp,
    "global_taylor": global_taylor,
    "halp": halp,
    "knapsack": knapsack,
    "prior": prior,
    "sensitivity": sensitivity,
    "random": random,
    "tpe": tpe,
    "cmaes": cmaes,
    "cmaes_prior": cmaes_prior,
    "evolution": evolution,
    "legr": legr,
    "netadapt": netadapt,
    "amc": amc,
    "dcpa": dcpa,
    "laasp": laasp,
    "attention": attention,
    "policy": policy,
}

WITHOUT_EVALUATIONS = frozenset({"uniform", "global_magnitude", "lamp", "global_taylor", "halp", "knapsack", "policy"})
"""Searchers that are allowed no evaluation; a policy tries what to start from on what is new to it."""

NOT_SEARCHING = WITHOUT_EVALUATIONS | {"prior"}
"""Searchers that score a few plans at most: what they take is no measure of what a search takes."""

WITHOUT_SEED = WITHOUT_EVALUATIONS | {"prior", "sensitivity", "netadapt"}
"""Searchers that draw no random number: another seed makes no difference."""

ONE_ROUND = frozenset(SEARCHERS) - {"policy", "attention"}
"""Searchers of this package that have no use for a number of rounds."""

LEAST: dict[str, Callable[[PruningProblem], LeastEvaluations]] = {
    "prior": lambda problem: LEAST_OF_PRIOR,
    "cmaes_prior": lambda problem: LEAST_OF_PRIOR,
    "sensitivity": least_of_sensitivity,
    "netadapt": least_of_netadapt,
}
"""Searchers that one evaluation is not enough for, with how many they need."""

LIBRARIES = {"tpe": "optuna", "cmaes": "cma", "cmaes_prior": "cma"}
"""Packages of the extra `search`, by the searcher that needs them."""


def searcher_named(name: str) -> Searcher:
    """A searcher by name; what it returns is checked.

    Raises:
        PruningError: there is no such searcher.
    """
    if name not in SEARCHERS:
        raise unknown_name("--searcher", name, SEARCHERS)
    return checked(name, SEARCHERS[name])


def check_evaluations(searcher: str, problem: PruningProblem, evaluations: int) -> None:
    """Make sure that the allowance is enough for a searcher, as the searcher itself does when it begins.

    Raises:
        PruningError: it is not.
    """
    if searcher in SEARCHERS and searcher not in WITHOUT_EVALUATIONS:
        least = LEAST[searcher](problem) if searcher in LEAST else ONE_PLAN
        least.check(searcher, evaluations)


def check_library(searcher: str) -> None:
    """Make sure, without importing it, that the package of a searcher is there.

    Raises:
        PruningError: it is not.
    """
    library = LIBRARIES.get(searcher)
    if library is None or sys.modules.get(library) is not None:
        return
    # a module that is None there is one that may not be imported
    if library in sys.modules or importlib.util.find_spec(library) is None:
        raise missing_library(searcher, library)
