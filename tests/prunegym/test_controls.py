"""Controls made from a policy: the same rounds, another allocation."""

import numpy as np
import pytest
import torch

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.searching.searchers import own_plan
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.controls import CONTROLS, own_ratios, play
from prunegym.pruning.budget import Budget

HALF = Budget.parse("macs:0.5")


@pytest.fixture(scope="module")
def half(problem: PruningProblem) -> PruningProblem:
    """The trained digits network at half its MACs."""
    return problem.only(HALF)


@pytest.fixture(scope="module")
def policy(half: PruningProblem) -> PruningPolicy:
    """A policy that corrects its prior by something, unlike a new one."""
    env = ChannelPruningEnv(half)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        agent = PruningPolicy(env.observation_space, env.action_space, lambda _: 0.0)
        torch.nn.init.normal_(agent.mean_head.weight, std=0.05)
    return agent


@pytest.mark.parametrize("rounds", [1, 3])
def test_own_ratios_played_again_are_the_own_plan(policy: PruningPolicy, half: PruningProblem, rounds: int) -> None:
    """The replay adds nothing and loses nothing: what a control differs in is the allocation."""
    ratios = own_ratios(policy, half, HALF, rounds)

    assert len(ratios) == rounds
    assert play(half, HALF, ratios) == own_plan(policy, ChannelPruningEnv(half, rounds=rounds), HALF)


def test_shuffling_is_a_permutation_that_the_seed_chooses(policy: PruningPolicy, half: PruningProblem) -> None:
    """In one round: the ratios are the policy's own in another order, before they are projected."""
    plans = [CONTROLS["shuffled"](policy, half, HALF, 1, seed) for seed in (0, 0, 1)]

    own = own_ratios(policy, half, HALF, 1)[0]
    dealt = own[np.random.default_rng(0).permutation(len(own))]
    expected = half.project(dealt, half.limits[HALF])
    counts = half.scorer.network.counts(plans[0])
    assert np.abs(counts - expected).max() <= 1  # an action is a rounded logit
    assert plans[0] == plans[1] != plans[2]
    assert plans[0] != own_plan(policy, ChannelPruningEnv(half, rounds=1), HALF)


@pytest.mark.parametrize("rounds", [1, 3])
def test_mean_action_is_the_uniform_allocation(policy: PruningPolicy, half: PruningProblem, rounds: int) -> None:
    """Whatever the constant, the projection makes the same of it."""
    plan = CONTROLS["mean"](policy, half, HALF, rounds, 0)
    counts = half.scorer.network.counts(plan)

    assert plan != own_plan(policy, ChannelPruningEnv(half, rounds=rounds), HALF)
    assert np.abs(counts - half.uniform_counts(half.limits[HALF])).max() <= 1


@pytest.mark.parametrize("name", CONTROLS)
def test_control_keeps_the_budget_and_evaluates_nothing(name: str, policy: PruningPolicy, half: PruningProblem) -> None:
    """It costs the search nothing."""
    before = half.scorer.scored

    plan = CONTROLS[name](policy, half, HALF, 3, 0)

    assert half.limits[HALF].holds(half.scorer.network.counts(plan))
    assert half.scorer.scored == before
