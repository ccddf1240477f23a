"""Reward profiles and their terms: pure functions of what was measured.

A profile is a set of weights on named terms; the reward is their weighted sum and every term goes into
``info``.
"""

from __future__ import annotations

from dataclasses import dataclass

from prunegym.pruning.errors import unknown_name


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an episode reached, and what it is compared with."""

    score: float
    """Score of the recovered network on the reward split."""
    loss: float
    reference_score: float
    """Score of the uniform plan at the same budget."""
    reference_loss: float
    unpruned_score: float
    cost: float
    """Budgeted cost kept, as a share of the unpruned network's."""
    budget: float
    """The share that was allowed."""
    macs: float
    """MACs kept, as a share."""
    latency: float
    """Latency as a share of the unpruned network's, by measurement or table; 1 where it is not known."""


@dataclass(frozen=True, kw_only=True)
class RewardProfile:
    """Weights of the terms of :func:`terms`."""

    improvement: float = 0.0
    """Score above the uniform plan's."""
    loss: float = 0.0
    """Loss below the uniform plan's, in nats."""
    accuracy: float = 0.0
    """Score below the unpruned network's (negative)."""
    macs: float = 0.0
    """MACs saved, as a share."""
    latency: float = 0.0
    """Latency saved, as a share."""
    excess: float = 0.0
    """Cost above the budget, as a share of the unpruned cost (negative; 0 when the budget holds)."""


PROFILES: dict[str, RewardProfile] = {
    "improvement": RewardProfile(improvement=1.0),
    "loss": RewardProfile(loss=0.1),
    "smooth": RewardProfile(improvement=1.0, loss=0.1),
    "latency": RewardProfile(improvement=1.0, latency=0.5),
    "tradeoff": RewardProfile(accuracy=1.0, macs=0.25, latency=0.25, excess=4.0),
}
"""``improvement`` is the default of the budgeted mode, ``tradeoff`` of the free mode."""


def terms(outcome: Outcome) -> dict[str, float]:
    """All reward terms, unweighted; higher is better for each."""
    return {
        "improvement": outcome.score - outcome.reference_score,
        "loss": outcome.reference_loss - outcome.loss,
        "accuracy": outcome.score - outcome.unpruned_score,
        "macs": 1 - outcome.macs,
        "latency": 1 - outcome.latency,
        "excess": -max(0.0, outcome.cost - outcome.budget),
    }


def reward(profile: RewardProfile, outcome: Outcome) -> tuple[float, dict[str, float]]:
    """The weighted sum of the terms, and the terms.

    Args:
        profile: weights.
        outcome: what was measured.
    """
    values = terms(outcome)
    return sum(getattr(profile, name) * value for name, value in values.items()), values


def profile_named(name: str) -> RewardProfile:
    """A profile by name.

    Raises:
        PruningError: there is no such profile.
    """
    if name not in PROFILES:
        raise unknown_name("reward", name, PROFILES)
    return PROFILES[name]
