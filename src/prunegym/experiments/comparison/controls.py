"""Controls: what an agent must beat before its allocation may be said to be learned.

Both are made from a trained policy without any evaluation. The policy prunes once, in its rounds; then the same rounds
are played again with its keep ratios dealt out differently, each round projected onto its budget as ever. Statistics
are measured afresh between the rounds, as for the agent, so that only the allocation differs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.envs.actions import action_for
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan

Rounds: TypeAlias = list[NDArray[np.float64]]
"""Keep ratio of each group ``(groups,)`` after each round."""
Control: TypeAlias = Callable[[PruningPolicy, PruningProblem, Budget, int, int], PruningPlan]


def shuffled(policy: PruningPolicy, problem: PruningProblem, budget: Budget, rounds: int, seed: int) -> PruningPlan:
    """The policy's own keep ratios, dealt out among the groups at random.

    One permutation, drawn from ``seed``, serves all rounds. If this does as well as the policy, it matters how uneven
    the allocation is but not which group gets what.
    """
    ratios = own_ratios(policy, problem, budget, rounds)
    order = np.random.default_rng(seed).permutation(len(problem.sizes))
    return play(problem, budget, [one[order] for one in ratios])


def mean(policy: PruningPolicy, problem: PruningProblem, budget: Budget, rounds: int, seed: int) -> PruningPlan:
    """The policy's mean action of each round, for all groups, whatever the network.

    The projection onto a budget turns any constant into the same keep ratio everywhere: this is the uniform
    allocation, reached in the policy's rounds. What the policy has over it, it owes to telling groups apart.
    ``seed`` has no part in it.
    """
    ratios = own_ratios(policy, problem, budget, rounds)
    actions = [float(action_for(one).mean()) for one in ratios]
    return _play_actions(problem, budget, [np.full(len(problem.sizes), one, np.float32) for one in actions])


CONTROLS: dict[str, Control] = {"shuffled": shuffled, "mean": mean}


def own_ratios(policy: PruningPolicy, problem: PruningProblem, budget: Budget, rounds: int) -> Rounds:
    """The keep ratios that the policy's own plan has after each round, projection and rounding included."""
    env = ChannelPruningEnv(problem, rounds=rounds)
    observation, _ = env.reset(options={"budget": budget})
    ratios: Rounds = []
    done = False
    while not done:
        observation, done = env.prune(policy.act(observation))
        ratios.append(problem.scorer.network.counts(env.plan) / problem.sizes)
    return ratios


def play(problem: PruningProblem, budget: Budget, ratios: Rounds) -> PruningPlan:
    """Prune in rounds, asking for these keep ratios."""
    return _play_actions(problem, budget, [action_for(one) for one in ratios])


def _play_actions(problem: PruningProblem, budget: Budget, actions: Sequence[NDArray[np.float32]]) -> PruningPlan:
    env = ChannelPruningEnv(problem, rounds=len(actions))
    env.reset(options={"budget": budget})
    for action in actions:
        env.prune(action)
    return env.plan
