"""Searchers: one protocol, network + budget + evaluations -> plan.

All of them choose kept counts per group; which channels of a group stay, recovery, projection and scoring are those of
the :class:`~prunegym.envs.setting.PruningProblem` they share.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
from tqdm import tqdm

from prunegym.agents.policy import PruningPolicy
from prunegym.agents.policy_file import load_policy
from prunegym.agents.trail import Improvement, Trail
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.plan import PruningPlan


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a searcher may spend."""

    evaluations: int = 0
    """Plans it may score; allocators need none."""
    seed: int = 0
    policy: Path | None = None
    """Policy file of the searcher `policy`."""
    rounds: int | None = None
    """Rounds of pruning; by default those the policy was trained with, or 1."""
    progress: bool = False


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a searcher found and what it paid."""

    plan: PruningPlan
    evaluations: int
    seconds: float
    history: list[tuple[int, float]] = field(default_factory=list)
    """Best score on the reward split after so many evaluations."""
    improvements: list[Improvement] = field(default_factory=list)
    """The plans that were best for a while; see :class:`~prunegym.agents.trail.Trail`."""


Searcher: TypeAlias = Callable[[PruningProblem, Budget, SearchSettings], SearchResult]


def uniform(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The same keep ratio in every group."""
    started = time.perf_counter()
    plan = problem.plan(problem.uniform_counts(problem.limits[budget]))
    return SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - started)


def knapsack(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Squared Taylor importance per unit of cost, in one pass."""
    started = time.perf_counter()
    plan = problem.plan(problem.knapsack_counts(problem.limits[budget]))
    return SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - started)


def random(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The best of random keep ratios, projected onto the budget."""
    if settings.evaluations < 1:
        raise PruningError(
            f"`--evaluations` should be at least 1 for searcher random. Received {settings.evaluations}. "
            "Give it a number of plans to try."
        )
    trail = Trail()
    rng = np.random.default_rng(settings.seed)
    limit = problem.limits[budget]
    for _ in _progress(range(settings.evaluations), settings, "random search"):
        plan = problem.plan(problem.project(rng.uniform(0.05, 1.0, len(problem.sizes)), limit))
        trail.add(plan, problem.scorer.score(plan).score)
    return SearchResult(**trail.result())


def policy(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The own plan of a trained policy: one deterministic pass, no evaluation."""
    if settings.policy is None:
        raise PruningError(
            "`--policy` should name a policy file for searcher policy. Received none. Train one with `prunegym train`."
        )
    started = time.perf_counter()
    agent, metadata = load_policy(settings.policy, device=problem.scorer.device)
    rounds = settings.rounds or int(metadata.get("rounds", 1))
    plan = own_plan(agent, problem, budget, rounds)
    return SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - started)


def own_plan(agent: PruningPolicy | None, problem: PruningProblem, budget: Budget, rounds: int) -> PruningPlan:
    """The plan a policy makes by itself, without noise; that of an untrained policy (the knapsack) for None."""
    env = ChannelPruningEnv(problem, rounds=rounds)
    observation, _ = env.reset(options={"budget": budget})
    done = False
    while not done:
        prior = observation["prior"].astype(np.float32)
        observation, done = env.prune(prior if agent is None else agent.act(observation))
    return env.plan


SEARCHERS: dict[str, Searcher] = {"uniform": uniform, "knapsack": knapsack, "random": random, "policy": policy}


def searcher_named(name: str) -> Searcher:
    """A searcher by name.

    Raises:
        PruningError: there is no such searcher.
    """
    if name not in SEARCHERS:
        raise unknown_name("--searcher", name, SEARCHERS)
    return SEARCHERS[name]


def _progress(items: Iterable[int], settings: SearchSettings, label: str) -> Iterable[int]:
    bar: Iterable[int] = tqdm(items, desc=label, unit="plan", disable=not settings.progress)
    return bar
