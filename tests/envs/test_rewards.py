"""Reward terms are differences that can be checked by eye, and their weighted sum is the reward."""

from dataclasses import asdict, replace

import pytest

from prunegym.envs.rewards import PROFILES, Outcome, RewardProfile, profile_named, reward, terms
from prunegym.pruning.errors import PruningError

OUTCOME = Outcome(
    score=0.80,
    loss=0.7,
    reference_score=0.75,
    reference_loss=0.9,
    unpruned_score=0.92,
    cost=0.50,
    budget=0.50,
    macs=0.50,
    latency=0.70,
)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("improvement", 0.05),
        ("loss", 0.2),
        ("accuracy", -0.12),
        ("macs", 0.5),
        ("latency", 0.3),
        ("excess", 0.0),
    ],
)
def test_term_is_what_its_name_says(name: str, value: float) -> None:
    """Computed by hand; higher is better."""
    assert terms(OUTCOME)[name] == pytest.approx(value)


def test_cost_above_the_budget_is_punished() -> None:
    """By the share it is too much; below the budget nothing is gained."""
    assert terms(replace(OUTCOME, cost=0.6))["excess"] == pytest.approx(-0.1)
    assert terms(replace(OUTCOME, cost=0.4))["excess"] == 0


@pytest.mark.parametrize("name", PROFILES)
def test_reward_is_the_weighted_sum_of_its_terms(name: str) -> None:
    """For every profile."""
    value, values = reward(PROFILES[name], OUTCOME)

    assert value == pytest.approx(sum(weight * values[key] for key, weight in asdict(PROFILES[name]).items()))


def test_every_term_has_a_weight() -> None:
    """A term without a weight could never count, a weight without a term would be ignored."""
    assert set(terms(OUTCOME)) == set(asdict(RewardProfile()))


def test_default_profile_is_the_improvement_over_the_uniform_plan() -> None:
    """So that rewards compare across networks and budgets."""
    value, _ = reward(profile_named("improvement"), OUTCOME)

    assert value == pytest.approx(0.05)


def test_unknown_profile_is_rejected_with_the_nearest() -> None:
    """A near miss gets a suggestion."""
    with pytest.raises(PruningError, match="`reward` should be one of .*Did you mean 'tradeoff'"):
        profile_named("trade-off")
