"""Where a policy starts from: the knapsack allocation, the uniform one, or halfway between them.

The knapsack adds up importances. That is good where layers can be passed by, as in residual networks; in a plain chain
of layers the sum does not see a bottleneck, and the knapsack may leave a single channel where everything must pass.
So it is tried, before a policy builds on it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.budget import Budget

if TYPE_CHECKING:
    from prunegym.envs.setting import PruningProblem

KNAPSACK, HALFWAY, UNIFORM = 1.0, 0.5, 0.0
"""Shares of the way from the uniform allocation to the knapsack's; of equal ones the earlier is taken."""
SHARES = (KNAPSACK, HALFWAY, UNIFORM)
NAMES = {KNAPSACK: "knapsack", HALFWAY: "halfway from uniform to the knapsack", UNIFORM: "uniform"}
TRIALS = 2
"""Evaluations that trying counts for, at most: the uniform plan is what rewards are compared with in any case."""

PRIORS = "priors"
"""Entry of a policy file's metadata: the share for each network and budget that it was trained on."""

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

    Args:
        problem: The network; takes note of what is chosen (:attr:`.PruningProblem.priors`).
        budget: One of its budgets.

    Returns:
        The evaluations that this counts for, at most :data:`TRIALS`. The uniform plan does not count.
    """
    limit = problem.limits[budget]
    plans = {share: problem.plan(problem.prior_counts(limit, share)) for share in SHARES}
    scores = {share: problem.scorer.score(plan) for share, plan in plans.items()}
    # by accuracy, as rewards are; by the loss where it cannot tell
    problem.priors[budget] = max(SHARES, key=lambda share: (scores[share].score, -scores[share].loss))
    return len(set(plans.values()) - {plans[UNIFORM]})


def take_prior(problem: PruningProblem, budget: Budget, metadata: Mapping[str, Any]) -> int:
    """Let a trained policy start from where it started in its training; on another network, from what scores best.

    Args:
        problem: The network; takes note of it.
        budget: One of its budgets.
        metadata: Of the policy file.

    Returns:
        The evaluations that this counts for.
    """
    known = metadata.get(PRIORS, {}).get(problem.key(budget))
    if known is None and PRIORS not in metadata and problem.scorer.network.name in metadata.get("networks", ()):
        known = KNAPSACK  # policies of earlier versions
    if known is None:
        return choose_prior(problem, budget)
    problem.priors[budget] = float(known)
    return 0
