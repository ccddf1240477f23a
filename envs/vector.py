"""Environments on a Ray cluster, as a vectorised environment of Stable-Baselines3.

Each environment lives in an actor. An actor that dies, alone or with its node, is replaced, and the new one plays the
episode again: its start and its actions are remembered here, and an environment does the same when it is told the same.
So neither the run nor an evaluation is lost, and the result is that of an undisturbed run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from prunegym.envs.cluster import Packed, connected, pack, unpack
from prunegym.pruning.errors import PruningError

ATTEMPTS = 5
"""Actors that may die over one step of an environment before the step is taken to be what kills them."""
PATIENCE = 120.0
"""Seconds until a new actor is given up to start with a processor of its own."""

Start = tuple[int | None, Any, dict[str, Any]]
"""Where an episode begins: seed, or else the state of the environment's generator, and options."""


@dataclass
class _Episode:
    """What an environment was told since its episode began."""

    start: Start
    actions: list[NDArray[Any]] = field(default_factory=list)


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


class RayVecEnv(VecEnv):
    """One actor of a Ray cluster for each environment.

    Environments should draw random numbers from their ``np_random`` only, as Gymnasium asks, and do the same when they
    are told the same.

    Args:
        parts: What each environment is made around, such as a pruning problem. It is sent once to each node, however
            many environments share it.
        make: Makes an environment, given its part.
        address: Of the cluster, see :func:`.connected`.
        threads: Processors of each actor, and threads that torch may use there.

    Raises:
        PruningError: There is no such cluster, or an environment cannot be made.
    """

    def __init__(
        self,
        parts: Sequence[Any],
        make: Callable[[Any], gym.Env[Any, Any]],
        *,
        address: str = "auto",
        threads: int = 1,
    ) -> None:
        self.closed = False
        self.replaced = 0
        """Actors that have been replaced so far."""
        self._threads = threads
        self._pending: list[Any] = []
        self._stack = ExitStack()
        self._ray = self._stack.enter_context(connected(address))
        try:
            self._send(parts, make)
            self._actors = [self._start(index, alone=False) for index in range(len(parts))]
            self._episodes = [_Episode((0, None, {})) for _ in parts]
            first = self._actors[0].spaces.remote()
            observations, actions = self._result(0, first, lambda actor: actor.spaces.remote())
            super().__init__(len(parts), observations, actions)
        except BaseException:
            self._stack.close()
            raise

    def _send(self, parts: Sequence[Any], make: Callable[[Any], gym.Env[Any, Any]]) -> None:
        """Put what the actors need into the object store, each thing once."""
        self._make = self._ray.put(pack(make))
        sent: dict[int, Any] = {}
        for part in parts:
            if id(part) not in sent:
                sent[id(part)] = self._ray.put(pack(part))
        self._parts = [sent[id(part)] for part in parts]
        self._free = _free_processors(self._ray) // self._threads
        if self._free < len(parts):
            warnings.warn(
                f"the cluster has free processors for {self._free} of {len(parts)} workers: the others share them",
                stacklevel=3,
            )

    def _start(self, index: int, *, alone: bool) -> Any:
        """Start the actor of an environment.

        Args:
            index: Of the environment.
            alone: Reserve no processor: for one that would otherwise wait for a node that is gone.
        """
        reserved = 0 if alone or index >= self._free else self._threads
        # spread: an actor that reserves nothing would else go where the others are
        actor = self._ray.remote(Worker).options(num_cpus=reserved, scheduling_strategy="SPREAD")
        return actor.remote(self._parts[index], self._make, self._threads)

    def _result(self, index: int, reference: Any, ask: Callable[[Any], Any] | None = None) -> Any:
        """Wait for an actor's answer; if it dies, for that of its replacement.

        Args:
            index: Of the environment.
            reference: To the answer.
            ask: Asks the replacement again; by default the answer is that of the episode played again.

        Raises:
            PruningError: The environment raised it, or actors die again and again.
        """
        errors = self._ray.exceptions
        for _ in range(ATTEMPTS):
            try:
                return self._ray.get(reference)
            except errors.RayTaskError as fault:
                raise _cause(fault) from None
            except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError) as fault:
                died: Exception = fault
            played_again = self._replace(index)
            reference = played_again if ask is None else ask(self._actors[index])
        raise PruningError(
            f"`--ray` should have workers that live. Received {ATTEMPTS} that died over one evaluation, the last of "
            f"{(str(died).splitlines() or [type(died).__name__])[0]} Look at the memory of the nodes; the run goes on "
            "from its last checkpoint when the command is repeated."
        ) from died

    def _replace(self, index: int) -> Any:
        """Put a new actor in the place of one that died, and let it play the episode again.

        Returns:
            Reference to the answer to the last thing that the episode was told.
        """
        self.replaced += 1
        self._actors[index] = self._start(index, alone=False)
        ready, _ = self._ray.wait([self._actors[index].spaces.remote()], timeout=PATIENCE)
        if not ready:
            self._ray.kill(self._actors[index])
            self._actors[index] = self._start(index, alone=True)
        episode = self._episodes[index]
        return self._actors[index].replay.remote(episode.start, episode.actions)

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, from the seeds and options that were set."""
        begins = list(zip(self._seeds, self._options, strict=True))
        # without a seed, an environment whose actor dies now would begin elsewhere: that is all right
        self._episodes = [_Episode((seed, None, dict(options))) for seed, options in begins]
        asked = [actor.reset.remote(seed, options) for actor, (seed, options) in zip(self._actors, begins, strict=True)]
        results = [self._result(index, one) for index, one in enumerate(asked)]
        observations, infos, starts = zip(*results, strict=True)
        self._episodes = [_Episode(start) for start in starts]
        self.reset_infos = list(infos)
        self._reset_seeds()
        self._reset_options()
        return self._stacked(observations)

    def step_async(self, actions: NDArray[Any]) -> None:
        """Send an action to every environment."""
        self._pending = []
        for actor, episode, action in zip(self._actors, self._episodes, actions, strict=True):
            episode.actions.append(np.array(action))
            self._pending.append(actor.step.remote(action))

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for all of them."""
        results = [self._result(index, one) for index, one in enumerate(self._pending)]
        self._pending = []
        observations, rewards, dones, infos, begun = zip(*results, strict=True)
        for index, one in enumerate(begun):
            if one is not None:
                self.reset_infos[index], start = one
                self._episodes[index] = _Episode(start)
        return self._stacked(observations), np.array(rewards, np.float32), np.array(dones), list(infos)

    def close(self) -> None:
        """End the actors, and the connection if it was made here."""
        if self.closed:
            return
        self.closed = True
        try:
            for actor in self._actors:
                self._ray.kill(actor)
        except self._ray.exceptions.RaySystemError:
            pass  # the cluster is gone, and they with it
        finally:
            self._stack.close()

    def has_attr(self, attr_name: str) -> bool:
        """Whether all environments have an attribute."""
        return all(self._each(None, lambda actor: actor.has_attribute.remote(attr_name)))

    def get_attr(self, attr_name: str, indices: VecEnvIndices = None) -> list[Any]:
        """An attribute of each environment."""
        return self._each(indices, lambda actor: actor.attribute.remote(attr_name))

    def set_attr(self, attr_name: str, value: Any, indices: VecEnvIndices = None) -> None:
        """Change an attribute of each environment, until its actor is replaced."""
        self._each(indices, lambda actor: actor.set_attribute.remote(attr_name, value))

    def env_method(
        self, method_name: str, *method_args: Any, indices: VecEnvIndices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Call a method of each environment."""
        return self._each(indices, lambda actor: actor.call.remote(method_name, method_args, method_kwargs))

    def env_is_wrapped(
        self, wrapper_class: type[gym.Wrapper[Any, Any, Any, Any]], indices: VecEnvIndices = None
    ) -> list[bool]:
        """Whether each environment is inside such a wrapper."""
        return self._each(indices, lambda actor: actor.is_wrapped.remote(wrapper_class))

    def _each(self, indices: VecEnvIndices, ask: Callable[[Any], Any]) -> list[Any]:
        chosen = list(self._get_indices(indices))
        asked = [ask(self._actors[index]) for index in chosen]
        return [self._result(index, one, ask) for index, one in zip(chosen, asked, strict=True)]

    def _stacked(self, observations: Sequence[Any]) -> Any:
        """Observations of all environments, one array for each part of the space."""
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {name: np.stack([one[name] for one in observations]) for name in self.observation_space.spaces}
        return np.stack(observations)


def _cause(fault: Any) -> BaseException:
    """What a worker raised, without the report that Ray wraps it into."""
    cause = getattr(fault, "cause", None)
    return cause if isinstance(cause, BaseException) else fault


def _free_processors(ray: Any) -> int:
    return int(ray.available_resources().get("CPU", 0))
