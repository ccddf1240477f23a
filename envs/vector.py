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
from typing import Any

import gymnasium as gym
import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvIndices, VecEnvObs, VecEnvStepReturn

from prunegym.envs.cluster import cause_of, connected, pack, reason_of
from prunegym.envs.worker import Start, Worker
from prunegym.pruning.errors import PruningError

ATTEMPTS = 5
"""Actors that may die over one step of an environment before the step is taken to be what kills them."""
PATIENCE = 300.0
"""Seconds that an actor may take to start with processors of its own; then it has to share."""


@dataclass
class _Episode:
    """What an environment was told since its episode began."""

    start: Start
    actions: list[NDArray[Any]] = field(default_factory=list)


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
            self._actors: list[Any] = [None] * len(parts)
            self._start_all(range(len(parts)), self._free)
            self._episodes = [_Episode((0, None, {})) for _ in parts]
            first = {0: self._actors[0].spaces.remote()}
            observations, actions = self._answers(first, lambda actor: actor.spaces.remote())[0]
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

    def _start_all(self, indices: Sequence[int], free: int) -> None:
        """Start actors of environments, so many with processors of their own if they get them in time."""
        ready = {}
        for position, index in enumerate(indices):
            self._start(index, reserve=position < free)
            ready[self._actors[index].spaces.remote()] = index
        _, waiting = self._ray.wait(list(ready), num_returns=len(ready), timeout=PATIENCE)
        for reference in waiting:  # for processors that others have taken, or of a node that is gone
            index = ready[reference]
            self._ray.kill(self._actors[index])
            self._start(index, reserve=False)

    def _start(self, index: int, *, reserve: bool) -> None:
        """Start the actor of an environment, with processors of its own or without."""
        # spread: an actor that reserves nothing would else go where the others are
        options = {"num_cpus": self._threads if reserve else 0, "scheduling_strategy": "SPREAD"}
        actor = self._ray.remote(Worker).options(**options)
        self._actors[index] = actor.remote(self._parts[index], self._make, self._threads)

    def _answers(self, asked: dict[int, Any], ask: Callable[[Any], Any] | None = None) -> list[Any]:
        """Wait for the answers of actors; where one dies, for that of its replacement.

        Args:
            asked: References to the answers, by environment.
            ask: Asks a replacement again; by default its answer is that of the episode played again.

        Raises:
            PruningError: An environment raised it, or actors die again and again.
        """
        errors = self._ray.exceptions
        answers: dict[int, Any] = dict.fromkeys(asked)
        for _ in range(ATTEMPTS):
            died: dict[int, Exception] = {}
            for index, reference in asked.items():
                try:
                    answers[index] = self._ray.get(reference)
                except errors.RayTaskError as fault:
                    raise cause_of(fault) from None
                except (errors.RayActorError, errors.ObjectLostError, errors.WorkerCrashedError) as fault:
                    died[index] = fault
            if not died:
                return list(answers.values())
            asked = self._replace(list(died), ask)
        last = next(iter(died.values()))
        raise PruningError(
            f"`--ray` should have workers that live. Received {ATTEMPTS} that died over one evaluation "
            f"({reason_of(last)}). Look at the memory of the nodes and at the logs of Ray, and repeat the command: it "
            "goes on from the last checkpoint."
        ) from last

    def _replace(self, dead: Sequence[int], ask: Callable[[Any], Any] | None) -> dict[int, Any]:
        """Put new actors in the place of those that died, and let them play their episodes again.

        Returns:
            References to what they answer, by environment.
        """
        self.replaced += len(dead)
        free = _free_processors(self._ray) // self._threads
        for index in dead:
            self._ray.kill(self._actors[index])  # if it is only out of reach
        self._start_all(dead, free)
        answers = {}
        for index in dead:
            actor, episode = self._actors[index], self._episodes[index]
            answers[index] = actor.replay.remote(episode.start, episode.actions)
            if ask is not None:
                answers[index] = ask(actor)
        return answers

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment, from the seeds and options that were set."""
        begins = list(zip(self._seeds, self._options, strict=True))
        # without a seed, an environment whose actor dies now would begin elsewhere: that is all right
        self._episodes = [_Episode((seed, None, dict(options))) for seed, options in begins]
        asked = [actor.reset.remote(seed, options) for actor, (seed, options) in zip(self._actors, begins, strict=True)]
        results = self._answers(dict(enumerate(asked)))
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
        results = self._answers(dict(enumerate(self._pending)))
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
        return self._answers({index: ask(self._actors[index]) for index in self._get_indices(indices)}, ask)

    def _stacked(self, observations: Sequence[Any]) -> NDArray[Any] | dict[str, NDArray[Any]]:
        """Observations of all environments, one array for each part of the space."""
        if isinstance(self.observation_space, gym.spaces.Dict):
            return {name: np.stack([one[name] for one in observations]) for name in self.observation_space.spaces}
        return np.stack(observations)


def _free_processors(ray: Any) -> int:
    return int(ray.available_resources().get("CPU", 0))
