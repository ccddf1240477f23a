"""AMC's agent: exploration, replay, and that it learns."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from prunegym.agents.searching.amc import Amc, FinalRewards, amc, truncated_normal
from prunegym.agents.searching.black_box import random
from prunegym.agents.searching.search import Searcher, SearchSettings
from prunegym.envs.layer_by_layer import LayerByLayerEnv
from prunegym.envs.setting import PruningProblem

UNIT = spaces.Box(-1, 1, (1,))


@given(st.floats(0, 1), st.floats(1e-4, 0.5), st.integers(0, 1000))
def test_truncated_normal_stays_between_0_and_1(mean: float, deviation: float, seed: int) -> None:
    """Also around the ends, and near the mean where the noise is small."""
    drawn = truncated_normal(np.random.default_rng(seed), np.full(8, mean), deviation)

    assert ((drawn >= 0) & (drawn <= 1)).all()
    assert np.abs(drawn - mean).max() < 7 * deviation


def test_truncated_normal_is_a_normal_drawn_again_until_it_fits(rng: np.random.Generator) -> None:
    """Mean and deviation against rejection."""
    plain = rng.normal(0.2, 0.5, 40_000)
    expected = plain[(plain >= 0) & (plain <= 1)]

    drawn = truncated_normal(rng, np.full(20_000, 0.2), 0.5)

    assert drawn.mean() == pytest.approx(expected.mean(), abs=0.01)
    assert drawn.std() == pytest.approx(expected.std(), abs=0.01)


def test_noise_is_constant_in_the_warm_up_and_falls_by_a_twentieth_after(live_problem: PruningProblem) -> None:
    """Half of the range at first."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.0)
    agent = Amc("MlpPolicy", env, rng=np.random.default_rng(0), warm_up=2, device="cpu", buffer_size=10)
    noise = []
    for episode in range(5):
        agent._episode_num = episode
        noise.append(agent.noise)

    assert noise == pytest.approx([0.5, 0.5, 0.5, 0.5 * 0.95, 0.5 * 0.95**2])


def replay(*episodes: list[float]) -> FinalRewards:
    """A replay with episodes of the given rewards."""
    buffer = FinalRewards(20, UNIT, UNIT, device="cpu", rng=np.random.default_rng(0))
    for rewards in episodes:
        for index, reward in enumerate(rewards):
            one, done = np.zeros((1, 1)), np.array([index == len(rewards) - 1])
            buffer.add(one, one, one, np.array([reward]), done, [{}])
    return buffer


def test_every_transition_carries_the_reward_of_its_episode() -> None:
    """Also where the buffer is full and begins again."""
    assert replay([0, 0, 3.0], [0, 5.0]).rewards[:5, 0].tolist() == [3, 3, 3, 5, 5]
    wrapped = replay(*[[0, 0, float(value)] for value in range(7)]).rewards[:, 0]
    assert wrapped.tolist() == [6, *np.repeat(range(7), 3)[1:20]]


def test_average_of_past_rewards_is_taken_off() -> None:
    """That of the first batch, then half way to each next one."""
    buffer = replay([0, 2.0])
    assert buffer.sample(4).rewards.tolist() == [[0.0]] * 4

    buffer.rewards[:2] = 6.0
    assert buffer.sample(4).rewards.tolist() == [[2.0]] * 4
    assert buffer.baseline == 4.0


def test_actor_and_critic_learn_at_their_own_rates(live_problem: PruningProblem) -> None:
    """One tenth for the actor."""
    env = LayerByLayerEnv(live_problem, score=lambda counts: 0.5)
    agent = Amc(
        "MlpPolicy",
        env,
        rng=np.random.default_rng(0),
        warm_up=0,
        device="cpu",
        buffer_size=10,
        learning_starts=1,
        train_freq=(1, "episode"),
        policy_kwargs={"net_arch": [4]},
    )
    agent.learn(6, log_interval=None)

    rates = [one.optimizer.param_groups[0]["lr"] for one in (agent.actor, agent.critic)]
    assert rates == [1e-4, 1e-3]


def test_an_episode_is_an_evaluation(live_problem: PruningProblem) -> None:
    """No more and no fewer than allowed."""
    found = amc(live_problem, live_problem.budgets[0], SearchSettings(evaluations=7))

    assert found.evaluations == 7
    assert [count for count, _ in found.history] == list(range(1, 8))


def scores_of(problem: PruningProblem, searcher: Searcher, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The score of each plan that a searcher asks for, in order."""
    scores: list[float] = []
    real = problem.scorer.score
    with monkeypatch.context() as patch:
        patch.setattr(problem.scorer, "score", lambda plan: scores.append(real(plan).score) or real(plan))
        searcher(problem, problem.budgets[0], SearchSettings(evaluations=60))
    return scores


@pytest.mark.slow
def test_agent_learns_which_groups_matter(live_problem: PruningProblem, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last plans are far better than random ones, and than its own of the warm-up."""
    learned = scores_of(live_problem, amc, monkeypatch)
    by_chance = scores_of(live_problem, random, monkeypatch)

    assert np.mean(learned[-10:]) > np.mean(learned[:15]) + 0.15
    assert np.mean(learned[-10:]) > np.mean(by_chance) + 0.2
