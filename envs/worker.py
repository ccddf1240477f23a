"""What runs in an actor of a Ray cluster: one environment. Apart from the rest, so that actors start quickly."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import gymnasium as gym
import torch
from numpy.typing import NDArray

from prunegym.envs.cluster import Packed, unpack

Start = tuple[int | None, Any, dict[str, Any]]
"""Where an episode begins: seed, or else the state of the environment's generator, and options."""


class Worker:
    """One environment; its methods are called through Ray.

    Args:
        packed: What the environment is made around.
        make: Makes it, given that.
        threads: That torch may use.
    """

    def __init__(self, packed: Packed, make: Packed, threads: int) -> None:
        torch.set_num_threads(threads)
        self._ingredients = make, packed

    @cached_property
    def env(self) -> gym.Env[Any, Any]:
        """The environment; not made with the actor, because Ray would not say why it could not be."""
        make, packed = self._ingredients
        made: gym.Env[Any, Any] = unpack(make)(unpack(packed))
        del self._ingredients
        return made

    def spaces(self) -> tuple[gym.Space[Any], gym.Space[Any]]:
        """Of observations and actions."""
        return self.env.observation_space, self.env.action_space

    def reset(self, seed: int | None, options: dict[str, Any]) -> tuple[Any, dict[str, Any], Start]:
        """Begin an episode; also says how to begin the same again."""
        state = None if seed is not None else self.env.unwrapped.np_random.bit_generator.state
        observation, info = self.env.reset(seed=seed, options=options or None)
        return observation, info, (seed, state, options)

    def step(self, action: NDArray[Any]) -> tuple[Any, float, bool, dict[str, Any], Any]:
        """Go on, and begin the next episode where one ends: the last value is its info and start, else None."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        done = terminated or truncated
        info["TimeLimit.truncated"] = truncated and not terminated
        begun = None
        if done:
            info["terminal_observation"] = observation
            observation, *begun = self.reset(None, {})
        return observation, float(reward), done, info, begun

    def replay(self, start: Start, actions: Sequence[NDArray[Any]]) -> Any:
        """Do again what another worker did; the result is that of its last reset or step."""
        seed, state, options = start
        if state is not None:
            self.env.unwrapped.np_random.bit_generator.state = state
        result: Any = self.reset(seed, options)
        for action in actions:
            result = self.step(action)
        return result

    def attribute(self, name: str) -> Any:
        """An attribute of the environment."""
        return self.env.get_wrapper_attr(name)

    def has_attribute(self, name: str) -> bool:
        """Whether the environment has it."""
        return self.env.has_wrapper_attr(name)

    def set_attribute(self, name: str, value: Any) -> None:
        """Change an attribute of the environment; a replacement of this worker would not know."""
        setattr(self.env.unwrapped, name, value)

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of the environment."""
        return self.env.get_wrapper_attr(name)(*args, **kwargs)

    def is_wrapped(self, wrapper: type[gym.Wrapper[Any, Any, Any, Any]]) -> bool:
        """Whether the environment is inside such a wrapper."""
        from stable_baselines3.common.env_util import is_wrapped

        return is_wrapped(self.env, wrapper)
