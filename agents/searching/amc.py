"""AMC: a DDPG agent of Stable-Baselines3 that prunes one group after another."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import truncnorm
from stable_baselines3 import DDPG
from stable_baselines3.common.buffers import ReplayBuffer
from stable_baselines3.common.noise import ActionNoise
from stable_baselines3.common.type_aliases import ReplayBufferSamples
from stable_baselines3.common.vec_env import VecNormalize
from torch.optim import Optimizer

from prunegym.agents.searching.search import Search, SearchResult, SearchSettings
from prunegym.envs.layer_by_layer import LayerByLayerEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

WARM_UP = 0.25
"""Part of the episodes with constant noise: 100 of the paper's 400."""
NOISE = 0.5
"""Standard deviation of the exploration noise at first, in pruning ratio."""
DECAY = 0.95
"""Factor on the noise after each episode past the warm-up."""
ACTOR_RATE, CRITIC_RATE = 1e-4, 1e-3
BASELINE_RATE = 0.5
"""How fast the average of past rewards follows those of each batch."""


def amc(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The best plan that AMC's agent tried; one episode is one evaluation.

    He et al., "AMC: AutoML for Model Compression and Acceleration on Mobile Devices", ECCV 2018, on
    :class:`~prunegym.envs.layer_by_layer.LayerByLayerEnv`, which says what of the environment is the paper's.

    From the paper: DDPG with two hidden layers of 300 units, batches of 64 from the last 2,000 transitions, target
    networks that follow by 0.01, no discount; every transition of an episode carries the reward of its end, less a
    moving average of past rewards; exploration by a normal distribution around the actor's ratio, truncated to [0, 1],
    with a deviation of 0.5 that is constant for the first 100 of 400 episodes and then falls exponentially. From the
    authors' published code, where the paper is silent: learning rates of 1e-4 and 1e-3, a decay of 0.95 per episode,
    the rate of the moving average, no update before the noise falls, then one update per transition.

    Our reading: the warm-up is a quarter of whatever is allowed; the reward is the score after the recovery that all
    searchers get; and networks, optimiser and replay are those of Stable-Baselines3, whose actor ends in tanh instead
    of a sigmoid, which is the same range scaled.
    """
    search = Search("amc", problem, budget, settings)
    env = LayerByLayerEnv(problem, budget, score=search.score)
    groups = len(problem.sizes)
    warm_up = int(WARM_UP * search.allowed)
    with _own_generators():
        agent = Amc(
            "MlpPolicy",
            env,
            rng=search.rng,
            warm_up=warm_up,
            buffer_size=2000,
            learning_starts=warm_up * groups,
            batch_size=64,
            tau=0.01,
            gamma=1.0,
            train_freq=(1, "episode"),
            gradient_steps=-1,
            replay_buffer_class=FinalRewards,
            replay_buffer_kwargs={"rng": search.rng},
            policy_kwargs={"net_arch": [300, 300]},
            seed=int(search.rng.integers(2**31)),
            device="cpu",
        )
        agent.learn(search.allowed * groups, log_interval=search.allowed + 1)  # more than there are: no log
    return search.result()


class FinalRewards(ReplayBuffer):
    """Replay in which every transition carries the reward of its episode's end, less a moving average.

    Args:
        args, kwargs: as for :class:`stable_baselines3.common.buffers.ReplayBuffer`.
        rng: draws the batches.
    """

    def __init__(self, *args: Any, rng: np.random.Generator, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.baseline: float | None = None
        self._rng = rng
        self._open: list[int] = []

    def add(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        action: NDArray[Any],
        reward: NDArray[Any],
        done: NDArray[Any],
        infos: list[dict[str, Any]],
    ) -> None:
        """Add a transition; the last of an episode gives its reward to all."""
        self._open.append(self.pos)
        super().add(obs, next_obs, action, reward, done, infos)
        if done.all():
            self.rewards[self._open] = reward
            self._open.clear()

    def sample(self, batch_size: int, env: VecNormalize | None = None) -> ReplayBufferSamples:
        """A batch with the average of past rewards taken off."""
        batch = self._get_samples(self._rng.integers(self.size(), size=batch_size), env=env)
        mean = float(batch.rewards.mean())
        self.baseline = mean if self.baseline is None else self.baseline + BASELINE_RATE * (mean - self.baseline)
        return batch._replace(rewards=batch.rewards - self.baseline)


class Amc(DDPG):
    """DDPG with AMC's exploration and its two learning rates.

    Args:
        args, kwargs: as for :class:`stable_baselines3.DDPG`.
        rng: draws the actions.
        warm_up: episodes before the noise falls.
    """

    def __init__(self, *args: Any, rng: np.random.Generator, warm_up: int, **kwargs: Any) -> None:
        self._rng = rng
        self.warm_up = warm_up
        super().__init__(*args, **kwargs)

    @property
    def noise(self) -> float:
        """Standard deviation of the exploration in the current episode, in pruning ratio."""
        return float(NOISE * DECAY ** max(0, self._episode_num - self.warm_up))

    def _sample_action(
        self, learning_starts: int, action_noise: ActionNoise | None = None, n_envs: int = 1
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """Around the actor's ratio, also during the warm-up."""
        assert self._last_obs is not None
        action, _ = self.predict(self._last_obs, deterministic=True)
        explored = 2 * truncated_normal(self._rng, (action + 1) / 2, self.noise) - 1
        return explored.astype(np.float32), explored.astype(np.float32)

    def _update_learning_rate(self, optimizers: list[Optimizer] | Optimizer) -> None:
        """Two rates in place of one."""
        for optimiser, rate in ((self.actor.optimizer, ACTOR_RATE), (self.critic.optimizer, CRITIC_RATE)):
            for group in optimiser.param_groups:
                group["lr"] = rate


def truncated_normal(rng: np.random.Generator, mean: NDArray[Any], deviation: float) -> NDArray[np.float64]:
    """Draws from normal distributions cut to [0, 1], of the shape of their means in [0, 1]."""
    low, high = -mean / deviation, (1 - mean) / deviation
    drawn = truncnorm.rvs(low, high, loc=mean, scale=deviation, size=mean.shape, random_state=rng)
    result: NDArray[np.float64] = np.clip(drawn, 0, 1)
    return result


@contextmanager
def _own_generators() -> Iterator[None]:
    """Put the global generators back afterwards: Stable-Baselines3 seeds and draws from them."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices: Iterable[int] = range(torch.cuda.device_count())
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
