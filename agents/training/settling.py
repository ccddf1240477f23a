"""How training ends: the best plans are looked at again, and the policy is drawn to the one that stands up.

What the second look is for is said in :mod:`prunegym.agents.searching.second_look`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from prunegym.agents.policies.ppo import Episode, EpisodeMemory
from prunegym.agents.searching.second_look import CONFIRMING, has_further_images
from prunegym.agents.training.notes import Best
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan

SETTLING = 5
"""Evaluations kept for the end, for each network and budget: the policy is drawn to its best plan until it makes it."""


@dataclass(frozen=True)
class Confirmation:
    """The plan to settle on."""

    best: Best
    """With its score and reward on the images of the search."""
    evaluations: int
    """What looking again has cost."""


def confirm(env: ChannelPruningEnv, budget: Budget, memory: EpisodeMemory, count: int) -> Confirmation | None:
    """Value the best remembered plans on twice the reward images, and put the best of them first in the memory.

    Args:
        env: plays remembered episodes again, and says what their plans are worth.
        budget: one of the budgets of its problem.
        memory: remembered episodes; the one chosen becomes the best of its starting state.
        count: plans to look at.

    Returns:
        The plan chosen; None if there is nothing to choose from or the reward split has no further images.
    """
    scorer = env.problem.scorer
    first, _ = env.reset(options={"budget": budget})
    episodes = memory.episodes.get(EpisodeMemory.key(first), [])
    if count < 2 or not episodes or not has_further_images(scorer):
        return None
    looked: dict[PruningPlan, tuple[float, Episode]] = {}
    for episode in episodes:
        if len(looked) == count:
            break
        plan = replayed(env, budget, episode)
        if plan not in looked:
            looked[plan] = env.value(2 * scorer.settings.examples), episode
    plan = max(looked, key=lambda one: looked[one][0])  # of equals the first
    chosen = looked[plan][1]
    episodes.insert(0, replace(chosen, value=episodes[0].value + float(np.finfo(np.float32).eps)))
    return Confirmation(Best(scorer.score(plan).score, plan, chosen.value), CONFIRMING * len(looked))


def replayed(env: ChannelPruningEnv, budget: Budget, episode: Episode) -> PruningPlan:
    """The plan that an episode's actions make."""
    env.reset(options={"budget": budget})
    for action in episode.actions:
        env.prune(action)
    return env.plan
