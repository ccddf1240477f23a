"""PPO that puts every evaluation to use.

One evaluation costs a pruned, recovered and scored network, so a few hundred must do. Plain PPO uses each once. Here
every episode is also remembered, and after each PPO update the policy is drawn towards the best episodes of each
starting state (self-imitation, Oh et al., ICML 2018), weighted by rank as in the cross-entropy method and CMA-ES.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3 import PPO
from stable_baselines3.common.buffers import DictRolloutBuffer
from torch import Tensor

from prunegym.agents.policies.policy import PruningPolicy

Arrays = dict[str, NDArray[Any]]

LATER_ROUNDS = 2
"""Later rounds that each imitation step takes, for each starting state."""


@dataclass(frozen=True)
class Episode:
    """One remembered episode: observations and actions of its rounds, and its return."""

    observations: list[Arrays]
    actions: NDArray[np.float32]
    """``(rounds, groups)``, as sampled, before clipping."""
    value: float
    looked: bool = False
    """Whether the value is of a second look, on more images than the return of a rollout."""


class EpisodeMemory:
    """The best episodes of each starting state.

    Args:
        capacity: episodes kept per starting state.
    """

    def __init__(self, capacity: int = 64) -> None:
        self.capacity = capacity
        self.episodes: dict[bytes, list[Episode]] = {}

    @staticmethod
    def key(first: Mapping[str, NDArray[Any]]) -> bytes:
        """What tells a starting state from others, from its observation."""
        return b"".join(first[name].tobytes() for name in ("state", "prior", "group_mask"))

    def add(self, episode: Episode) -> None:
        """Remember an episode if it is among the best from its starting state."""
        kept = self.episodes.setdefault(self.key(episode.observations[0]), [])
        kept.append(episode)
        kept.sort(key=lambda one: -one.value)
        del kept[self.capacity :]

    def replace(self, old: Episode, new: Episode) -> None:
        """Remember an episode instead of another of the same starting state."""
        kept = self.episodes[self.key(old.observations[0])]
        del kept[next(place for place, one in enumerate(kept) if one is old)]
        self.add(new)

    def elites(self, count: int) -> tuple[list[Episode], NDArray[np.float32]]:
        """The best ``count`` episodes of every starting state, with rank weights that sum to 1 for each state."""
        chosen: list[Episode] = []
        weights: list[float] = []
        for kept in self.episodes.values():
            best = kept[:count]
            raw = np.log(len(best) + 0.5) - np.log(np.arange(1, len(best) + 1))
            chosen += best
            weights += (raw / raw.sum()).tolist()
        return chosen, np.asarray(weights, dtype=np.float32)


class PruningPPO(PPO):
    """PPO with self-imitation of the best episodes.

    Args:
        elites: episodes imitated per starting state.
            The number falls to 1 as ``progress`` rises to 1, so that the policy settles on one plan: plans between
            two good ones need not be good.
        imitation_steps: optimiser steps towards them after each PPO update; 0 is plain PPO.
        imitation_rate: learning rate of those steps.
        min_std: least exploration noise, in units of the action.
        args, kwargs: as for :class:`stable_baselines3.PPO`.
    """

    policy: PruningPolicy

    def __init__(
        self,
        *args: Any,
        elites: int = 4,
        imitation_steps: int = 60,
        imitation_rate: float = 1e-3,
        min_std: float = 0.02,
        **kwargs: Any,
    ) -> None:
        self.elites = elites
        self.imitation_steps = imitation_steps
        self.imitation_rate = imitation_rate
        self.min_std = min_std
        self.progress = 0.0
        """Share of the training that is done, set by the trainer."""
        self.memory = EpisodeMemory()
        self.before_imitation: Callable[[], object] = lambda: None
        """Called when the episodes of a rollout are remembered and before the best are imitated."""
        self.last_episodes: list[Episode] = []
        """Episodes of the last rollout."""
        self.policy_seconds = 0.0
        """Time spent in updates so far."""
        super().__init__(*args, **kwargs)

    def train(self) -> None:
        """One PPO update, then imitation."""
        assert isinstance(self.rollout_buffer, DictRolloutBuffer)
        started = time.perf_counter()
        self.last_episodes = finished_episodes(self.rollout_buffer)  # first: the update flattens the buffer
        for episode in self.last_episodes:
            self.memory.add(episode)
        super().train()
        if self.imitation_steps:
            self.policy_seconds += time.perf_counter() - started
            self.before_imitation()
            started = time.perf_counter()
            self.imitate()
        with torch.no_grad():
            self.policy.log_std.clamp_(min=float(np.log(self.min_std)))
        self.policy_seconds += time.perf_counter() - started

    @property
    def elites_now(self) -> int:
        """Episodes imitated per starting state at the present progress."""
        return max(1, round(self.elites * (1 - self.progress)))

    def imitate(self) -> None:
        """Take ``imitation_steps`` steps towards the best episodes."""
        episodes, weights = self.memory.elites(self.elites_now)
        if not episodes:
            return
        batch = ImitationBatch(episodes, weights, self.device)
        optimiser = self.policy.optimizer
        rates = [group["lr"] for group in optimiser.param_groups]
        self.policy.set_training_mode(True)
        for group in optimiser.param_groups:
            group["lr"] = self.imitation_rate
        rng = np.random.default_rng(0)  # of its own: resuming needs no state
        for _ in range(self.imitation_steps):
            observations, actions, weight = batch.draw(rng, LATER_ROUNDS * len(self.memory.episodes))
            _, log_prob, _ = self.policy.evaluate_actions(observations, actions)
            loss: Tensor = -(weight * log_prob).sum() / max(len(self.memory.episodes), 1)
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.max_grad_norm)
            optimiser.step()
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate
        self.logger.record("train/imitation_loss", float(loss.detach()))


class ImitationBatch:
    """Observations, actions and weights of episodes, of which each optimiser step takes a part.

    First rounds of one starting state share their observation, which the policy encodes once; later rounds have one
    each, and encoding them is what imitation costs. So each step takes all first rounds and a draw of the later ones,
    whose weights make up for those left out.

    Args:
        episodes: to imitate.
        weights: of each episode.
        device: where the policy is.
    """

    def __init__(self, episodes: list[Episode], weights: NDArray[np.float32], device: torch.device) -> None:
        rounds = [len(one.actions) for one in episodes]
        self.observations = {
            key: torch.as_tensor(
                np.concatenate([np.stack([step[key] for step in one.observations]) for one in episodes])
            )
            for key in episodes[0].observations[0]
        }
        self.actions = torch.as_tensor(np.concatenate([one.actions for one in episodes]))
        self.weights = np.repeat(weights, rounds)
        numbers = np.concatenate([np.arange(count) for count in rounds])
        self.first, self.later = np.flatnonzero(numbers == 0), np.flatnonzero(numbers > 0)
        self.device = device

    def draw(self, rng: np.random.Generator, later: int) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """All first rounds and so many later ones: observations, actions and weights."""
        chosen = rng.permutation(self.later)[:later]
        weights = np.concatenate(
            [self.weights[self.first], self.weights[chosen] * (len(self.later) / max(len(chosen), 1))]
        )
        rows = torch.as_tensor(np.concatenate([self.first, chosen]))
        observations = {key: value[rows].to(self.device) for key, value in self.observations.items()}
        return observations, self.actions[rows].to(self.device), torch.as_tensor(weights).to(self.device)


def finished_episodes(buffer: DictRolloutBuffer) -> list[Episode]:
    """Whole episodes of a rollout buffer. The rollout length is a multiple of the rounds, so none is cut."""
    steps, workers = buffer.rewards.shape
    episodes = []
    for worker in range(workers):
        begin = 0
        for step in range(1, steps + 1):
            if step < steps and not buffer.episode_starts[step, worker]:
                continue
            span = range(begin, step)
            observations = [
                {key: values[index, worker] for key, values in buffer.observations.items()} for index in span
            ]
            actions = np.stack([buffer.actions[index, worker] for index in span]).astype(np.float32)
            value = float(sum(buffer.rewards[index, worker] for index in span))
            episodes.append(Episode(observations, actions, value))
            begin = step
    return episodes
