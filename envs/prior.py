"""Where a policy starts from: the knapsack allocation, the uniform one, or halfway between them.

The knapsack adds up importances. That is good where layers can be passed by, as in residual networks; in a plain chain
of layers the sum does not see a bottleneck, and the knapsack may leave a single channel where everything must pass.
So it is tried, before a policy builds on it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.training import weights_digest

if TYPE_CHECKING:
    from prunegym.envs.setting import PruningProblem

UNIFORM, HALFWAY, KNAPSACK = 0.0, 0.5, 1.0
"""Shares of the way from the uniform allocation to the knapsack's."""
SHARES = (UNIFORM, HALFWAY, KNAPSACK)
"""What is tried; of equal scores the earlier one is taken, which is the safer one."""
NAMES = {KNAPSACK: "knapsack", HALFWAY: "halfway from uniform to the knapsack", UNIFORM: "uniform"}
TRIALS = len(SHARES)
"""Evaluations that trying counts for, at most."""

PRIORS = "priors"
"""Entry of a policy file's metadata: the share by :func:`prior_key` of what it was trained on."""

_EDGE = 1e-3  # keep ratios are moved inside (0, 1) by this much before their logit is taken


def between(
    uniform: NDArray[np.int64], knapsack: NDArray[np.int64], sizes: NDArray[np.int64], share: float
) -> NDArray[np.float64]:
    """Keep ratios ``(groups,)`` on the way from one allocation to the other, straight in their logits."""
    ends = [np.clip(counts / sizes, _EDGE, 1 - _EDGE) for counts in (uniform, knapsack)]
    low, high = (np.log(ratios / (1 - ratios)) for ratios in ends)
    ratios: NDArray[np.float64] = 1 / (1 + np.exp(-((1 - share) * low + share * high)))
    return ratios


def choose_prior(problem: PruningProblem, budget: Budget) -> int:
    """Let policies start from what scores best on the reward images: the knapsack, uniform, or halfway.

    Tried is what one round makes of them. Policies that prune in several rounds apply the same share in each.

    Args:
        problem: The network; takes note of what is chosen (:attr:`.PruningProblem.priors`).
        budget: One of its budgets.

    Returns:
        The evaluations that this counts for: the distinct plans among them, at most :data:`TRIALS`.
    """
    limit = problem.limits[budget]
    plans = {share: problem.plan(problem.prior_counts(limit, share)) for share in SHARES}
    scores = {share: problem.scorer.score(plan).score for share, plan in plans.items()}
    problem.priors[budget] = max(SHARES, key=lambda one: scores[one] if math.isfinite(scores[one]) else -math.inf)
    return len(set(plans.values()))


def take_prior(problem: PruningProblem, budget: Budget, metadata: Mapping[str, Any]) -> int:
    """Let a trained policy start from where it started in its training; on what is new to it, from what scores best.

    Args:
        problem: The network; takes note of it.
        budget: One of its budgets. New to a policy is another network, other weights, and another budget.
        metadata: Of the policy file.

    Returns:
        The evaluations that this counts for.

    Raises:
        PruningError: The metadata are damaged.
    """
    priors = metadata.get(PRIORS)
    if priors is None:  # of an earlier version, which started from the knapsack
        known = problem.scorer.network.name in (metadata.get("networks") or ())
        share = KNAPSACK if known else None
    else:
        share = priors.get(prior_key(problem, budget)) if isinstance(priors, Mapping) else priors
    if share is None:
        return choose_prior(problem, budget)
    if share not in SHARES:
        raise PruningError(
            f"`--policy` should be a file that tells what the policy starts from, {UNIFORM}, {HALFWAY} or {KNAPSACK}. "
            f"Received {share!r}. Copy the file again, or train the policy again."
        )
    problem.priors[budget] = float(share)
    return 0


def prior_key(problem: PruningProblem, budget: Budget) -> str:
    """By what a policy knows a network and a budget again: weights, whatever the network is called."""
    return f"{weights_digest(problem.scorer.network.model)} {budget}"
