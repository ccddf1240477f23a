"""How training ends: the best plans are looked at again, and the policy is drawn to the one that stands up.

The best of hundreds of scores is partly luck with the reward images. So the best few plans are scored again on as many
further images of the reward split, and the best over both halves is the one that the policy settles on.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prunegym.agents.ppo import Episode, EpisodeMemory
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan

SETTLING = 5
"""Evaluations kept for the end, for each network and budget: the policy is drawn to its best plan until it makes it."""
CONFIRMED = 10
"""Plans that are looked at again, at most."""
CONFIRMING = 2
"""Evaluations that a second look counts for: it takes twice the images."""


def confirmed_plans(evaluations: int) -> int:
    """Plans of each network and budget that a training of so many evaluations can afford to look at again."""
    return min(CONFIRMED, evaluations // 30)


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
    scorer, examples = problem.scorer, problem.scorer.settings.examples
    if len(plans) < 2 or scorer.score(next(iter(plans)), examples=2 * examples).examples <= examples:
        return None
    plan = max(plans, key=lambda one: scorer.score(one, examples=2 * examples).score)
    best = replace(plans[plan], value=episodes[0].value + float(np.finfo(np.float32).eps))
    episodes.insert(0, best)
    return Confirmation(plan, scorer.score(plan).score, CONFIRMING * len(plans))


def replayed(env: ChannelPruningEnv, budget: Budget, episode: Episode) -> PruningPlan:
    """The plan that an episode's actions make."""
    env.reset(options={"budget": budget})
    for action in episode.actions:
        env.prune(action)
    return env.plan
