"""How training ends: the best plans are looked at again, and the policy is drawn to the one that stands up.

What the second look is for is said in :mod:`prunegym.agents.second_look`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prunegym.agents.ppo import Episode, EpisodeMemory
from prunegym.agents.second_look import CONFIRMING, best_on_twice, confirmed_plans, has_further_images
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan

SETTLING = 5
"""Evaluations kept for the end, for each network and budget: the policy is drawn to its best plan until it makes it."""


def reserved(evaluations: int) -> int:
    """Evaluations kept for the end, for each network and budget."""
    return SETTLING + CONFIRMING * confirmed_plans(evaluations)


@dataclass(frozen=True)
class Confirmation:
    """The plan to settle on."""

    plan: PruningPlan
    score: float
    """On the reward images of the search."""
    evaluations: int
    """What looking again has cost."""


def confirm(
    problem: PruningProblem, budget: Budget, env: ChannelPruningEnv, memory: EpisodeMemory, count: int
) -> Confirmation | None:
    """Score the best remembered plans on twice the reward images, and put the best of them first in the memory.

    Args:
        problem: the network and its data.
        budget: one of the problem's budgets.
        env: plays remembered episodes again, without scoring.
        memory: remembered episodes; the one chosen becomes the best of its starting state.
        count: plans to look at.

    Returns:
        The plan chosen; None if there is nothing to choose from or the reward split has no further images.
    """
    first, _ = env.reset(options={"budget": budget})
    episodes = memory.episodes.get(EpisodeMemory.key(first), [])
    plans: dict[PruningPlan, Episode] = {}
    for episode in episodes:
        if len(plans) == count:
            break
        plans.setdefault(replayed(env, budget, episode), episode)
    if len(plans) < 2 or not has_further_images(problem.scorer):
        return None
    plan = best_on_twice(problem.scorer, plans)
    best = replace(plans[plan], value=episodes[0].value + float(np.finfo(np.float32).eps))
    episodes.insert(0, best)
    return Confirmation(plan, problem.scorer.score(plan).score, CONFIRMING * len(plans))


def replayed(env: ChannelPruningEnv, budget: Budget, episode: Episode) -> PruningPlan:
    """The plan that an episode's actions make."""
    env.reset(options={"budget": budget})
    for action in episode.actions:
        env.prune(action)
    return env.plan
