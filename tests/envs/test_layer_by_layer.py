"""The episode of AMC: bounds, features, reward."""

import re
import warnings

import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env as check_by_gymnasium
from hypothesis import given, settings
from hypothesis import strategies as st
from stable_baselines3.common.env_checker import check_env as check_by_sb3

from prunegym.envs.layer_by_layer import FEATURES, LayerByLayerEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.widths import Bound, WidthRules

BUDGETS = ("macs:0.5", "params:0.3", "latency:0.6", "latency:5ms")


def act(env: LayerByLayerEnv, ratios: list[float]) -> tuple[list[np.ndarray], list[float], dict[str, object]]:
    """An episode that asks for pruning ratios: observations, rewards and the last info."""
    observation, _ = env.reset()
    observations, rewards, info = [observation], [], {}
    for ratio in ratios:
        observation, reward, done, truncated, info = env.step(np.array([2 * ratio - 1], dtype=np.float32))
        observations.append(observation)
        rewards.append(reward)
        assert not truncated
    assert done
    return observations, rewards, info


def test_gymnasium_and_sb3_find_nothing_wrong(live_problem: PruningProblem) -> None:
    """Their own checks."""
    with warnings.catch_warnings():
        # it is made by the searcher, not by gymnasium.make
        warnings.filterwarnings("ignore", message=".*not having a spec")
        check_by_gymnasium(LayerByLayerEnv(live_problem), skip_render_check=True)
    check_by_sb3(LayerByLayerEnv(live_problem))


def test_documented_features_are_those_of_the_space(live_problem: PruningProblem) -> None:
    """One row of the table per feature, in order."""
    rows = re.findall(r"\| (\d+) \| `(\w+)` \|", LayerByLayerEnv.__doc__ or "")

    assert rows == [(str(index), name) for index, name in enumerate(FEATURES)]
    assert LayerByLayerEnv(live_problem).observation_space.shape == (len(FEATURES),)


RULES = (
    WidthRules(),
    WidthRules(align=4),
    WidthRules(min_channels=5, bounds=(Bound.parse(".*=..0.8"),)),
    WidthRules(align=8, bounds=(Bound.parse("conv1=0.5"),)),
)


@settings(max_examples=40)
@given(st.lists(st.floats(0, 1), min_size=6, max_size=6), st.sampled_from(BUDGETS), st.sampled_from(RULES))
def test_budget_holds_whatever_is_asked(
    problem: PruningProblem, ratios: list[float], text: str, rules: WidthRules
) -> None:
    """Already before the projection, which only fills it up; no group falls below a fifth, or out of its rules."""
    budget = Budget.parse(text)
    ruled = PruningProblem(problem.scorer, (budget,), problem.latency, rules)
    env = LayerByLayerEnv(ruled, score=lambda counts: 0.0)
    observations, _, info = act(env, ratios)
    limit, allowed = ruled.limits[budget], [one.tolist() for one in ruled.widths.choices()]

    assert limit.holds(env.counts)
    assert limit.holds(info["counts"])
    assert limit.value(info["counts"]) >= limit.value(env.counts)
    assert (env.counts >= 0.2 * problem.sizes).all()
    for counts in (env.counts, info["counts"]):
        assert all(count in one for count, one in zip(counts.tolist(), allowed, strict=True))
    assert observations[0][FEATURES.index("reduced")] == 0  # whatever the bounds leave to begin with


def test_action_is_bounded_as_in_algorithm_1(live_problem: PruningProblem) -> None:
    """The widest choice that leaves the budget within reach, by trying every width."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.0)
    (limit,) = live_problem.limits.values()
    floor = np.array([2, 2, 2])  # a fifth of eight channels, rounded up
    env.reset()
    kept: list[int] = []
    for _ in range(3):
        rest = floor[len(kept) + 1 :].tolist()
        widths = [width for width in range(1, 9) if limit.holds(np.array([*kept, width, *rest]))]

        assert env.widest() == max(widths)
        env.step(np.array([-1.0], dtype=np.float32))  # keep everything
        kept.append(max(widths))
    assert env.counts.tolist() == kept


def test_ratio_within_the_bounds_is_carried_out(live_problem: PruningProblem) -> None:
    """Linear from 0 to 1 over the action, rounded to channels."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.0)
    act(env, [0.25, 0.62, 0.5])

    assert env.counts.tolist() == [6, 3, 4]


def test_ratio_is_carried_out_to_the_nearest_width_that_is_allowed(live_problem: PruningProblem) -> None:
    """Of 2, 4, 6 and, but for the bounded group, 8 channels; halves upwards."""
    rules = WidthRules(align=2, bounds=(Bound.parse("first=..0.8"),))
    problem = PruningProblem(live_problem.scorer, (Budget("macs", 0.99),), rules=rules)
    env = LayerByLayerEnv(problem, score=lambda counts: 0.0)
    for ratios, counts in (([0, 0.35, 0.4], [6, 6, 4]), ([0.9, 0.1, 0.4], [2, 8, 4]), ([0.125, 0.125, 0.5], [6, 8, 4])):
        act(env, ratios)

        assert env.counts.tolist() == counts


def test_highest_ratio_gives_way_where_the_budget_is_out_of_reach(live_problem: PruningProblem) -> None:
    """One channel of each group is all that some budgets leave."""
    least = live_problem.scorer.network.costs.macs(np.array([1, 1, 1])) / live_problem.scorer.network.full_cost.macs
    problem = PruningProblem(live_problem.scorer, (Budget("macs", least * 1.0001),))
    env = LayerByLayerEnv(problem)

    assert env.widths.smallest.tolist() == [1, 1, 1]
    _, _, info = act(env, [0.0, 0.0, 0.0])
    assert info["counts"].tolist() == [1, 1, 1]


def test_reward_is_the_score_of_the_plan_at_the_end(live_problem: PruningProblem) -> None:
    """And nothing before; info tells what was scored."""
    _, rewards, info = act(LayerByLayerEnv(live_problem), [0.25, 0.62, 0.5])

    plan = live_problem.plan(np.array([6, 3, 4]))
    assert rewards == [0.0, 0.0, live_problem.scorer.score(plan).score]
    assert info["score"] == rewards[-1]
    assert info["plan"] == plan
    assert 0.99 < info["cost"] / live_problem.budgets[0].value <= 1


def test_plan_below_the_budget_is_filled_up(live_problem: PruningProblem) -> None:
    """As those of all searchers are."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.0)
    _, _, info = act(env, [0.8, 0.8, 0.8])

    (limit,) = live_problem.limits.values()
    assert (info["counts"] == live_problem.project(env.counts / live_problem.sizes, limit)).all()
    assert (info["counts"] > env.counts).any()


def test_features_are_what_they_say(live_problem: PruningProblem) -> None:
    """By hand, for layers of 1, 8 and 8 inputs on pictures of 4 x 4."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.0)
    observations, _, _ = act(env, [0.5, 0.5, 0.5])
    costs, sizes = live_problem.scorer.network.costs, live_problem.sizes
    full = costs.full.macs
    savings = np.array([1 - costs.macs(np.where(np.arange(3) == group, 2, sizes)) / full for group in range(3)])
    table = np.array(observations)

    assert table[:3, FEATURES.index("index")].tolist() == [0, 0.5, 1]
    assert table[:3, FEATURES.index("inputs")].tolist() == [0, 1, 1]
    scaled = (savings - savings.min()) / (savings.max() - savings.min())
    np.testing.assert_allclose(table[:3, FEATURES.index("cost")], scaled, rtol=1e-5)
    reduced = [0, 1 - costs.macs(np.array([4, 8, 8])) / full, 1 - costs.macs(np.array([4, 4, 8])) / full]
    np.testing.assert_allclose(table[:3, FEATURES.index("reduced")], reduced, rtol=1e-5)
    rest = [savings[1:].sum() / savings.sum(), savings[2] / savings.sum(), 0]
    np.testing.assert_allclose(table[:3, FEATURES.index("rest")], rest, rtol=1e-5)
    assert table[:3, FEATURES.index("last_action")].tolist() == [0, 0.5, 0.5]
    assert not table[:3, [FEATURES.index(name) for name in ("outputs", "height", "stride", "kernel")]].any()


def test_features_of_unequal_layers_differ(problem: PruningProblem) -> None:
    """On a network with strides and several widths every feature takes more than one value."""
    env = LayerByLayerEnv(problem, score=lambda counts: 0.0)
    observations, _, _ = act(env, [0.3, 0.4, 0.5, 0.6, 0.4, 0.3])
    constant = {name for name, column in zip(FEATURES, np.array(observations).T, strict=True) if np.ptp(column) == 0}

    assert constant <= {"kernel"}  # all are 3 x 3


@pytest.mark.parametrize("action", [[np.nan], [0.0, 0.0], [np.inf]])
def test_action_that_is_none_is_rejected(live_problem: PruningProblem, action: list[float]) -> None:
    """One finite number."""
    env = LayerByLayerEnv(live_problem)
    env.reset()

    with pytest.raises(PruningError, match="`action` should be one finite number"):
        env.step(np.array(action))


def test_budget_that_the_problem_does_not_have_is_rejected(live_problem: PruningProblem) -> None:
    """The message lists those it has."""
    with pytest.raises(PruningError, match=r"`budget` should be one of the problem's: macs:0\.26"):
        LayerByLayerEnv(live_problem, Budget("macs", 0.9))
