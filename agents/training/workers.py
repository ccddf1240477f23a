"""Environments side by side: in this process, or in worker processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias

import torch
from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv, VecEnv
from stable_baselines3.common.vec_env.base_vec_env import VecEnvObs, VecEnvStepReturn

from prunegym.agents.configuration.config import TrainConfig, TransferConfig
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import Observer, Padding
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.user_code import user_code_by_value

AgentConfig: TypeAlias = TrainConfig | TransferConfig

#: What a pipe to a process that is gone raises.
_GONE = (EOFError, BrokenPipeError, ConnectionResetError)


def shared_padding(problems: Sequence[PruningProblem]) -> Padding:
    """Sizes of an observation that holds every problem's network."""
    paddings = [Observer(problem.scorer.network, problem.scorer.statistics).padding for problem in problems]
    result = paddings[0]
    for padding in paddings[1:]:
        result = result.covering(padding)
    return result


def make_env(problem: PruningProblem, config: AgentConfig, padding: Padding) -> ChannelPruningEnv:
    """The environment of one problem as the configuration asks."""
    return ChannelPruningEnv(problem, **_settings(config, padding))


def _settings(config: AgentConfig, padding: Padding) -> dict[str, Any]:
    """Arguments of an environment: plain values, so that a worker needs no file of the configuration."""
    return {"rounds": config.episode_rounds, "mode": config.mode, "profile": config.reward, "padding": padding}


def make_envs(problems: Sequence[PruningProblem], config: AgentConfig, padding: Padding) -> VecEnv:
    """Environments of all problems side by side: in this process, in one each for several workers, or in actors.

    Raises:
        PruningError: There is no such cluster, or what should be computed there needs a graphics card.
    """
    copies = -(-config.workers // len(problems))
    chosen = [problem for problem in problems for _ in range(copies)]
    threads = max(1, torch.get_num_threads() // len(chosen)) if config.workers > 1 else None
    if config.ray is not None:
        from prunegym.envs.vector import RayVecEnv

        check_device(config.torch_device)
        make = partial(ChannelPruningEnv, **_settings(config, padding))
        return RayVecEnv(chosen, make, address=config.ray, threads=threads or torch.get_num_threads())

    def factory(problem: PruningProblem) -> Callable[[], ChannelPruningEnv]:
        def make() -> ChannelPruningEnv:
            if threads is not None:
                torch.set_num_threads(threads)
                # Ctrl-C reaches the whole process group; whoever started the workers ends them
                signal.signal(signal.SIGINT, signal.SIG_IGN)
            return make_env(problem, config, padding)

        return make

    factories: list[Callable[[], Any]] = [factory(problem) for problem in chosen]
    if config.workers == 1:
        return DummyVecEnv(factories)
    with user_code_by_value():
        return ProcessVecEnv(factories)


def check_device(device: torch.device) -> None:
    """Refuse to send work for a graphics card to a cluster.

    Raises:
        PruningError: The device is one.
    """
    if device.type != "cpu":
        raise PruningError(
            f"`--device` should be cpu with --ray. Received {device}: graphics cards of a cluster are not shared out. "
            "Write --device cpu, or leave out --ray."
        )


class ProcessVecEnv(SubprocVecEnv):
    """One process for each environment; one that is gone ends the training with a message."""

    def reset(self) -> VecEnvObs:
        """Begin an episode in every environment."""
        try:
            return super().reset()
        except _GONE as fault:
            raise self._lost() from fault

    def step_async(self, actions: Any) -> None:
        """Send an action to every environment."""
        try:
            super().step_async(actions)
        except _GONE as fault:
            raise self._lost() from fault

    def step_wait(self) -> VecEnvStepReturn:
        """Wait for all of them."""
        try:
            return super().step_wait()
        except _GONE as fault:
            raise self._lost() from fault

    def close(self) -> None:
        """End the processes, whatever state they are in."""
        try:
            super().close()
        except _GONE:
            self.closed = True
            for process in self.processes:
                process.terminate()
                with suppress(OSError):
                    process.join(timeout=5)

    def _lost(self) -> PruningError:
        """Describe a worker that is gone; the error is returned, not raised."""
        for process in self.processes:
            process.join(timeout=0.1)  # to learn how it ended
        codes = [process.exitcode for process in self.processes if process.exitcode is not None]
        how = f"exit code {codes[0]}" if codes else "without an exit code"
        return PruningError(
            f"`--workers` should be processes that live as long as the training. Received one that ended ({how}; -9 is "
            "what a system that is short of memory leaves). Free some memory and repeat the command, which goes on "
            "from the last checkpoint, or use fewer workers in another run."
        )
