"""The environment: Gymnasium's and SB3's own checks, determinism, budgets, rounds and rewards."""

import warnings
from dataclasses import asdict, replace
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.utils.env_checker import check_env as check_by_gymnasium
from stable_baselines3.common.env_checker import check_env as check_by_sb3

from prunegym.envs import ENVIRONMENT
from prunegym.envs.actions import action_for, keep_ratios
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import STATE_FEATURES, Padding
from prunegym.envs.prior import KNAPSACK
from prunegym.envs.rewards import PROFILES
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import RECOVERIES, Recovery, Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.widths import Bound, WidthRules

BUDGETS = ("macs:0.5", "params:0.3", "latency:0.6", "latency:5ms")
Info = dict[str, Any]


def asked(budget: str) -> dict[str, str]:
    """Options that choose a budget."""
    return {"budget": budget}


def run(env: ChannelPruningEnv, seed: int = 0, budget: str | None = None) -> tuple[list[Any], float, Info]:
    """An episode of random actions: observations, return, last info."""
    rng = np.random.default_rng(seed)
    observation, _ = env.reset(seed=seed, options=asked(budget) if budget else None)
    observations, total, done, info = [observation], 0.0, False, {}
    while not done:
        action = rng.uniform(-1, 1, env.action_space.shape).astype(np.float32)
        observation, value, done, _, info = env.step(action)
        observations.append(observation)
        total += value
    return observations, total, info


@pytest.mark.parametrize("mode", ["budgeted", "free"])
@pytest.mark.parametrize("rounds", [1, 3])
def test_gymnasium_finds_nothing_wrong(problem: PruningProblem, mode: str, rounds: int) -> None:
    """Its checker also steps and resets with seeds."""
    env = gym.make(ENVIRONMENT, problem=problem, rounds=rounds, mode=mode)

    with warnings.catch_warnings():
        # features are standardised by fixed rules, not bounded
        warnings.filterwarnings("ignore", message=".*Box observation space (maximum|minimum) value is .*infinity")
        check_by_gymnasium(env.unwrapped, skip_render_check=True)


def test_sb3_finds_nothing_wrong(problem: PruningProblem) -> None:
    """Its checker looks at each part of the dictionary."""
    with warnings.catch_warnings():
        # advice for policies that flatten images and vectors; ours reads graphs
        warnings.filterwarnings("ignore", message="Your observation .* has an unconventional shape")
        warnings.filterwarnings("ignore", message="(It seems that your observation|The minimal resolution).* image")
        check_by_sb3(ChannelPruningEnv(problem, rounds=2))


def test_environment_is_registered(problem: PruningProblem) -> None:
    """Under its name and version."""
    env = gym.make("prunegym/ChannelPruning-v0", problem=problem)

    assert isinstance(env.unwrapped, ChannelPruningEnv)


def test_same_seed_gives_the_same_episode(problem: PruningProblem) -> None:
    """Observations, rewards and plans, in two environments of their own."""
    first, second = (run(ChannelPruningEnv(problem, rounds=3), seed=5) for _ in range(2))

    for one, other in zip(first[0], second[0], strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)
    assert first[1] == second[1]
    assert first[2]["plan"] == second[2]["plan"]


def test_seeds_draw_different_budgets(problem: PruningProblem) -> None:
    """The only random thing in the environment."""
    env = ChannelPruningEnv(problem, rounds=3)

    drawn = [env.reset(seed=seed)[1]["budget"] for seed in range(30)]

    assert set(drawn) == set(BUDGETS)
    assert drawn == [env.reset(seed=seed)[1]["budget"] for seed in range(30)]


def test_two_seeds_give_two_starting_states(problem: PruningProblem) -> None:
    """A seed that is accepted must be used."""
    env = ChannelPruningEnv(problem, rounds=3)
    budgets = {env.reset(seed=seed)[1]["budget"]: seed for seed in range(30)}

    one, other = (env.reset(seed=budgets[name])[0] for name in BUDGETS[:2])

    assert not np.array_equal(one["state"], other["state"])
    assert not np.array_equal(one["prior"], other["prior"])


def test_without_seed_the_budgets_go_on(problem: PruningProblem) -> None:
    """Resetting without a seed does not repeat the first episode for ever."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(seed=0)

    assert len({env.reset()[1]["budget"] for _ in range(30)}) == len(BUDGETS)


def test_global_generators_are_left_alone(problem: PruningProblem) -> None:
    """The environment owns one generator."""
    state = torch.get_rng_state()

    run(ChannelPruningEnv(problem, rounds=2))

    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("budget", BUDGETS)
def test_prior_reproduces_the_knapsack_plan_in_one_round(
    problem: PruningProblem, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So an untrained policy is exactly the strongest one-shot baseline."""
    # other tests that share the problem may have chosen another
    monkeypatch.setitem(problem.priors, Budget.parse(budget), KNAPSACK)
    env = ChannelPruningEnv(problem, rounds=1)
    observation, _ = env.reset(options=asked(budget))

    _, _, _, _, info = env.step(observation["prior"])

    knapsack = problem.knapsack_counts(problem.limits[Budget.parse(budget)])
    assert info["plan"] == problem.plan(knapsack)


@pytest.mark.parametrize("budget", BUDGETS)
def test_uniform_action_reproduces_the_reference(problem: PruningProblem, budget: str) -> None:
    """And is worth exactly 0."""
    env = ChannelPruningEnv(problem, rounds=1)
    env.reset(options=asked(budget))
    counts = problem.uniform_counts(problem.limits[Budget.parse(budget)])

    _, value, _, _, info = env.step(action_for(counts / problem.sizes))

    assert (info["counts"] == counts).all()
    assert value == 0


@pytest.mark.parametrize("rounds", [1, 2, 4])
@pytest.mark.parametrize("budget", BUDGETS)
def test_budget_holds_whatever_is_asked(problem: PruningProblem, budget: str, rounds: int) -> None:
    """For random actions, by the cost of the rebuilt network."""
    env = ChannelPruningEnv(problem, rounds=rounds)
    limit = problem.limits[Budget.parse(budget)]

    _, _, info = run(env, seed=rounds, budget=budget)

    network = problem.scorer.network
    counts = network.counts(info["plan"])
    assert (counts == info["counts"]).all()
    assert limit.holds(counts)
    parameters = sum(one.numel() for one in network.pruned(info["plan"]).parameters())
    assert parameters == info["parameters"]


def test_budget_of_the_rounds_falls_geometrically(problem: PruningProblem) -> None:
    """Asked to keep everything, the agent gets what each round allows."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(options=asked("macs:0.5"))
    costs = problem.scorer.network.costs

    macs = []
    for _ in range(3):
        _, _, _, _, info = env.step(np.ones(len(problem.sizes), dtype=np.float32))
        macs.append(costs.macs(info["counts"]) / costs.full.macs)

    for share, allowed in zip(macs, (0.5 ** (1 / 3), 0.5 ** (2 / 3), 0.5), strict=True):
        assert allowed - 0.05 < share <= allowed


def test_pruned_channels_stay_pruned(problem: PruningProblem, trained: PrunableNetwork) -> None:
    """Rounds only take away."""
    env = ChannelPruningEnv(problem, rounds=4)
    env.reset(options=asked("params:0.3"))
    rng = np.random.default_rng(0)

    left = np.ones(trained.graph.units, dtype=np.bool_)
    for _ in range(4):
        env.step(rng.uniform(-1, 1, len(problem.sizes)).astype(np.float32))
        mask = env.plan.mask(trained.graph)
        assert not (mask & ~left).any()
        left = mask


def test_episode_ends_with_its_last_round(problem: PruningProblem) -> None:
    """Terminated, never truncated; rewards come with the end."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(options=asked("macs:0.5"))

    steps = [env.step(np.zeros(len(problem.sizes), dtype=np.float32)) for _ in range(3)]

    assert [(terminated, truncated) for _, _, terminated, truncated, _ in steps] == [
        (False, False),
        (False, False),
        (True, False),
    ]
    assert [value for _, value, *_ in steps[:2]] == [0.0, 0.0]


def test_between_rounds_the_network_is_measured_afresh(problem: PruningProblem) -> None:
    """Data-aware features and scores are those of the network as it is now."""
    env = ChannelPruningEnv(problem, rounds=2)
    before, _ = env.reset(options=asked("macs:0.5"))

    after, *_ = env.step(np.zeros(len(problem.sizes), dtype=np.float32))

    kept = after["nodes"][..., 10] == 1
    assert kept.any()
    assert not np.allclose(before["nodes"][kept][:, 2:6], after["nodes"][kept][:, 2:6])


def test_scored_plan_is_the_one_reported(problem: PruningProblem) -> None:
    """A plan that was asked for is the plan that was scored."""
    _, _, info = run(ChannelPruningEnv(problem, rounds=2), seed=3, budget="macs:0.5")

    score = problem.scorer.score(info["plan"])

    assert (info["score"], info["loss"]) == (score.score, score.loss)
    assert info["macs"] == problem.scorer.network.cost(info["plan"]).macs


@pytest.mark.parametrize("profile", PROFILES)
@pytest.mark.parametrize("mode", ["budgeted", "free"])
def test_terms_in_info_add_up_to_the_reward(problem: PruningProblem, mode: str, profile: str) -> None:
    """With the weights of the profile."""
    env = ChannelPruningEnv(problem, rounds=1, mode=mode, profile=profile)

    _, value, info = run(env, seed=1, budget="latency:0.6")

    terms = {key.removeprefix("reward/"): term for key, term in info.items() if key.startswith("reward/")}
    assert value == pytest.approx(sum(weight * terms[name] for name, weight in asdict(PROFILES[profile]).items()))


def test_terms_are_what_was_measured(problem: PruningProblem) -> None:
    """Against the scorer, the cost model and the latency model."""
    _, _, info = run(ChannelPruningEnv(problem, rounds=1), seed=2, budget="params:0.3")
    scorer, latency = problem.scorer, problem.latency

    assert latency is not None
    reference = problem.uniform_score(Budget.parse("params:0.3"))
    assert info["reward/improvement"] == pytest.approx(info["score"] - reference.score)
    assert info["reward/loss"] == pytest.approx(reference.loss - info["loss"])
    assert info["reward/accuracy"] == pytest.approx(info["score"] - scorer.unpruned().score)
    assert info["reward/macs"] == pytest.approx(1 - info["macs"] / scorer.network.full_cost.macs)
    assert info["reward/latency"] == pytest.approx(1 - latency.latency(info["counts"]) / latency.full)
    assert info["reward/excess"] == 0


def test_free_mode_takes_ratios_as_they_are(problem: PruningProblem) -> None:
    """No projection: rounding and the smallest widths only."""
    env = ChannelPruningEnv(problem, rounds=1, mode="free")
    env.reset(options=asked("macs:0.5"))
    action = np.linspace(-1, 1, len(problem.sizes), dtype=np.float32)

    _, _, _, _, info = env.step(action)

    expected = np.maximum(1, np.floor(keep_ratios(action) * problem.sizes + 0.5))
    assert (info["counts"] == expected).all()


@pytest.mark.parametrize("mode", ["budgeted", "free"])
def test_widths_keep_their_rules_in_every_round(scorer: Scorer, mode: str, rng: np.random.Generator) -> None:
    """Multiples of the alignment within the bounds, never more than the round before left."""
    rules = WidthRules(align=4, bounds=(Bound.parse(".*=0.25..0.75"),))
    problem = PruningProblem(scorer, (Budget("macs", 0.4),), rules=rules)
    env = ChannelPruningEnv(problem, rounds=3, mode=mode)
    env.reset(seed=0)

    before = problem.sizes
    for _ in range(3):
        *_, info = env.step(rng.uniform(-1, 1, len(problem.sizes)).astype(np.float32))
        counts = info["counts"]
        assert (counts % 4 == 0).all()
        assert (counts <= np.minimum(before, 0.75 * problem.sizes)).all()
        assert (counts >= 0.25 * problem.sizes).all()
        before = counts


def test_prior_reproduces_the_knapsack_plan_of_aligned_widths(scorer: Scorer) -> None:
    """The untrained policy is the one-shot baseline under any rules."""
    problem = PruningProblem(scorer, (Budget("macs", 0.4),), rules=WidthRules(align=4, min_channels=6))
    env = ChannelPruningEnv(problem, rounds=1)
    observation, _ = env.reset(seed=0)

    *_, info = env.step(observation["prior"])

    assert (info["counts"] == problem.knapsack_counts(problem.limits[problem.budgets[0]])).all()


def test_free_mode_pays_for_what_exceeds_the_budget(problem: PruningProblem) -> None:
    """Keeping everything is allowed, and costs."""
    env = ChannelPruningEnv(problem, rounds=1, mode="free")
    env.reset(options=asked("macs:0.5"))

    _, value, _, _, info = env.step(np.ones(len(problem.sizes), dtype=np.float32))

    assert info["plan"] == PruningPlan.unpruned(problem.scorer.network.graph)
    assert info["reward/excess"] == pytest.approx(-0.5)
    assert value < -1


def test_free_mode_has_the_trade_off_as_default_reward(problem: PruningProblem) -> None:
    """And the budgeted mode the improvement."""
    profiles = [ChannelPruningEnv(problem, mode=mode).profile for mode in ("budgeted", "free")]

    assert profiles == [PROFILES["improvement"], PROFILES["tradeoff"]]


def test_impossible_budget_is_refused_before_any_episode(scorer: Scorer) -> None:
    """With the reachable minimum in the message."""
    with pytest.raises(InfeasibleBudgetError, match="Ask for params:0.0"):
        ChannelPruningEnv(PruningProblem(scorer, (Budget("params", 0.001),)))


def test_observations_share_no_memory(problem: PruningProblem) -> None:
    """Buffers of agents keep what they are given."""
    env = ChannelPruningEnv(problem, rounds=2)
    first, _ = env.reset(seed=0, options=asked("macs:0.5"))
    second, *_ = env.step(np.zeros(len(problem.sizes), dtype=np.float32))
    third, _ = env.reset(seed=0, options=asked("macs:0.5"))

    for one, other in ((first, second), (first, third), (second, third)):
        assert not any(np.shares_memory(one[key], other[key]) for key in one)


def test_writing_to_an_observation_changes_no_later_one(problem: PruningProblem) -> None:
    """The first observation of a budget is computed once and copied."""
    env = ChannelPruningEnv(problem, rounds=3)
    first, _ = env.reset(options=asked("macs:0.5"))
    expected = {key: value.copy() for key, value in first.items()}
    for value in first.values():
        value[...] = 0

    again, _ = env.reset(options=asked("macs:0.5"))

    assert all(np.array_equal(again[key], expected[key]) for key in again)


def test_action_is_not_written_to(problem: PruningProblem) -> None:
    """It belongs to the agent."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(seed=0)
    action = np.linspace(-1, 1, len(problem.sizes), dtype=np.float32)
    before = action.copy()

    env.step(action)

    assert (action == before).all()


def test_larger_padding_changes_no_plan(problem: PruningProblem) -> None:
    """Components of padding groups are ignored."""
    own = ChannelPruningEnv(problem).padding
    env = ChannelPruningEnv(problem, rounds=1, padding=Padding(own.groups + 2, own.edges + 5, own.bins + 1))
    small = ChannelPruningEnv(problem, rounds=1)
    action = np.linspace(-1, 1, own.groups, dtype=np.float32)
    plans = []
    for one, given in ((small, action), (env, np.append(action, [0.3, -0.9]).astype(np.float32))):
        one.reset(options=asked("macs:0.5"))
        plans.append(one.step(given)[4]["plan"])

    assert plans[0] == plans[1]


def test_padding_that_is_too_small_is_rejected(problem: PruningProblem) -> None:
    """With the sizes that are needed."""
    with pytest.raises(PruningError, match="`padding` should hold 6 groups"):
        ChannelPruningEnv(problem, padding=Padding(2, 10))


def test_state_tells_budget_round_and_cost(problem: PruningProblem) -> None:
    """By the names of its features."""
    env = ChannelPruningEnv(problem, rounds=2)
    first, _ = env.reset(options=asked("params:0.3"))
    second, _, _, _, info = env.step(np.zeros(len(problem.sizes), dtype=np.float32))

    before, after = (dict(zip(STATE_FEATURES, one["state"], strict=True)) for one in (first, second))
    parameters = problem.scorer.network.costs.parameters(info["counts"])
    assert (before["budget"], before["params"], before["macs"]) == (pytest.approx(0.3), 1, 0)
    assert (before["cost"], before["progress"], after["progress"]) == (1, 0, 0.5)
    assert (before["round_budget"], after["round_budget"]) == (pytest.approx(0.3**0.5), pytest.approx(0.3))
    assert after["cost"] == pytest.approx(parameters / problem.scorer.network.full_cost.parameters)


def test_no_state_feature_is_zero_everywhere(
    problem: PruningProblem, trained: PrunableNetwork, digits: ClassificationTask
) -> None:
    """Over budgets, rounds and recoveries, with training steps before a score and without."""
    tuned = Scorer(
        trained,
        digits,
        ScorerSettings(recovery="distill", recovery_steps=1, statistics_examples=16, recovery_examples=16, examples=50),
        statistics=problem.scorer.statistics,
    )
    rows = [run(ChannelPruningEnv(problem, rounds=2), budget=budget)[0][1]["state"] for budget in BUDGETS[:3]]
    rows.append(ChannelPruningEnv(PruningProblem(tuned, problem.budgets[:1])).reset()[0]["state"])

    largest = np.abs(rows).max(axis=0)
    assert [name for name, value in zip(STATE_FEATURES, largest, strict=True) if value == 0] == []


@pytest.mark.parametrize("recovery", RECOVERIES)
def test_recovery_is_told(problem: PruningProblem, recovery: Recovery) -> None:
    """By name in the info; to the policy, whether training steps come before a score."""
    for scored in (None, "compensate", "distill"):
        scorer = problem.scorer
        settings = replace(scorer.settings, recovery=recovery, scored=scored, recovery_steps=1)
        scorer = Scorer(scorer.network, scorer.task, settings, statistics=scorer.statistics)
        observations, _, info = run(ChannelPruningEnv(PruningProblem(scorer, problem.budgets[:1]), rounds=1))

        state = dict(zip(STATE_FEATURES, observations[0]["state"], strict=True))
        assert state["finetuned"] == ((scored or recovery) == "distill")
        assert info["recovery"] == recovery


def test_budget_of_an_episode_can_be_asked_for(problem: PruningProblem) -> None:
    """As text or as a budget."""
    env = ChannelPruningEnv(problem, rounds=3)

    _, by_text = env.reset(options=asked("params:0.3"))
    _, by_value = env.reset(options={"budget": problem.budgets[1]})

    assert by_text["budget"] == by_value["budget"] == "params:0.3"
    assert env.budget == problem.budgets[1]


def test_budget_the_environment_does_not_have_is_rejected(problem: PruningProblem) -> None:
    """Its limit was never checked."""
    with pytest.raises(PruningError, match="`budget` should be one of this environment's: macs:0.5, params:0.3"):
        ChannelPruningEnv(problem).reset(options=asked("macs:0.25"))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_action_that_is_not_finite_is_rejected(problem: PruningProblem, value: float) -> None:
    """A broken policy must not look like one that prunes nothing."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(seed=0)
    action = np.zeros(len(problem.sizes), dtype=np.float32)
    action[1] = value

    with pytest.raises(PruningError, match="`action` should be finite"):
        env.step(action)


@pytest.mark.parametrize("shape", [(1,), (5,), (7,), (6, 1)])
def test_action_of_a_wrong_shape_is_rejected(problem: PruningProblem, shape: tuple[int, ...]) -> None:
    """One ratio per group: a single number would otherwise be broadcast to all."""
    env = ChannelPruningEnv(problem, rounds=3)
    env.reset(seed=0)

    with pytest.raises(PruningError, match=r"`action` should have shape \(6,\)"):
        env.step(np.zeros(shape, dtype=np.float32))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounds": 0}, "`rounds` should be at least 1. Received 0"),
        ({"mode": "fre"}, "`mode` should be .*free.* Received 'fre'"),
        ({"profile": "improve"}, "Did you mean 'improvement'"),
    ],
)
def test_impossible_arguments_are_rejected(problem: PruningProblem, arguments: Info, message: str) -> None:
    """At construction."""
    with pytest.raises(PruningError, match=message):
        ChannelPruningEnv(problem, **arguments)
