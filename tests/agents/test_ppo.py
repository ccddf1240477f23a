"""The memory of episodes and the imitation of the best."""

import inspect
from dataclasses import fields
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from prunegym.agents.configuration.config import AgentOptions
from prunegym.agents.policies.ppo import Episode, EpisodeMemory, ImitationBatch, PruningPPO, finished_episodes


def episode(value: float, state: float = 0.0) -> Episode:
    """An episode of one round from a starting state."""
    first = {name: np.full(2, state, dtype=np.float32) for name in ("state", "prior", "group_mask")}
    return Episode([first], np.zeros((1, 2), dtype=np.float32), value)


def test_memory_keeps_the_best_of_each_start() -> None:
    """What is worse than `capacity` others from the same start is forgotten."""
    memory = EpisodeMemory(capacity=2)
    for value in (1.0, 3.0, 2.0):
        memory.add(episode(value))
    memory.add(episode(0.5, state=1.0))

    values = [[one.value for one in kept] for kept in memory.episodes.values()]

    assert values == [[3.0, 2.0], [0.5]]


def test_elites_weigh_each_start_alike() -> None:
    """However many were seen from it, and better episodes weigh more."""
    memory = EpisodeMemory()
    for value in (1.0, 3.0, 2.0):
        memory.add(episode(value))
    memory.add(episode(0.5, state=1.0))

    chosen, weights = memory.elites(2)

    assert [one.value for one in chosen] == [3.0, 2.0, 0.5]
    assert weights[:2].sum() == pytest.approx(1)
    assert weights[2] == pytest.approx(1)
    assert weights[0] > weights[1]


def test_episodes_are_cut_where_new_ones_start() -> None:
    """Two workers, two episodes of two rounds each; rewards add up within an episode."""
    steps, workers = 4, 2
    rewards = np.arange(8, dtype=np.float32).reshape(steps, workers)
    buffer: Any = SimpleNamespace(
        rewards=rewards,
        episode_starts=np.array([[1, 1], [0, 0], [1, 1], [0, 0]]),
        observations={"state": np.arange(8).reshape(steps, workers, 1)},
        actions=np.zeros((steps, workers, 3)),
    )

    episodes = finished_episodes(buffer)

    assert [one.value for one in episodes] == [0 + 2, 4 + 6, 1 + 3, 5 + 7]
    assert [int(one.observations[0]["state"][0]) for one in episodes] == [0, 4, 1, 5]


def test_steps_towards_episodes_take_all_first_rounds_and_some_later_ones() -> None:
    """Averaged over draws, every row has the weight of its episode, by counting."""
    episodes = [
        Episode([{"state": np.full(1, 10 * number + turn)} for turn in range(3)], np.zeros((3, 2), np.float32), 0.0)
        for number in range(4)
    ]
    batch = ImitationBatch(episodes, np.array([0.4, 0.3, 0.2, 0.1], np.float32), torch.device("cpu"))
    rng, total = np.random.default_rng(0), np.zeros(40)
    for _ in range(4000):
        observations, actions, weights = batch.draw(rng, later=2)
        states = observations["state"].flatten().numpy()
        assert states[:4].tolist() == [0, 10, 20, 30]
        assert len(states) == len(actions) == len(set(states)) == 6
        total[states] += weights.numpy() / 4000

    assert total[[0, 10, 20, 30]] == pytest.approx([0.4, 0.3, 0.2, 0.1])
    assert total[[1, 2, 11, 12, 21, 22, 31, 32]] == pytest.approx(np.repeat([0.4, 0.3, 0.2, 0.1], 2), rel=0.1)


def test_steps_towards_episodes_of_one_round_take_all() -> None:
    """There are no later rounds to choose from."""
    batch = ImitationBatch(
        [Episode([{"state": np.zeros(1)}], np.zeros((1, 2), np.float32), 0.0)] * 2, np.full(2, 0.5), torch.device("cpu")
    )
    _, actions, weights = batch.draw(np.random.default_rng(0), later=2)

    assert len(actions) == 2
    assert weights.tolist() == [0.5, 0.5]


def test_defaults_are_those_of_the_command() -> None:
    """Whoever takes the class in Python gets what `prunegym train` gives."""
    options = {one.name: one.default for one in fields(AgentOptions)}
    parameters = inspect.signature(PruningPPO.__init__).parameters
    shared = ("elites", "imitation_steps", "imitation_rate", "min_std")

    assert {name: parameters[name].default for name in shared} == {name: options[name] for name in shared}
