"""The agent of a training, as its configuration asks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from stable_baselines3.common.logger import configure
from stable_baselines3.common.vec_env import VecEnv

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.policies.ppo import PruningPPO
from prunegym.agents.training.workers import AgentConfig


def make_agent(config: AgentConfig, envs: VecEnv, episodes: int, log: Path) -> PruningPPO:
    """A new agent, or one that starts from a policy file.

    Args:
        config: The settings of PPO.
        envs: What it plays in.
        episodes: Of one update, a multiple of the environments.
        log: Folder for TensorBoard.

    Raises:
        PruningError: The policy file is missing, damaged or of another version.
    """
    start = None if config.policy is None else load_policy(config.policy, device=config.torch_device)[0]
    # a policy that is continued keeps what it was made to see
    features = start.features if start is not None else getattr(config, "features", "data")
    steps = episodes // envs.num_envs * config.episode_rounds
    model = PruningPPO(
        PruningPolicy,
        envs,
        n_steps=steps,
        batch_size=steps * envs.num_envs,
        n_epochs=config.ppo_epochs,
        learning_rate=config.learning_rate,
        # an episode is a few rounds towards one score: nothing is discounted
        gamma=1.0,
        gae_lambda=1.0,
        normalize_advantage=steps * envs.num_envs > 1,  # SB3 refuses to normalise a single one
        seed=config.seed,
        device=config.torch_device,
        elites=config.elites,
        imitation_steps=config.imitation_steps,
        imitation_rate=config.imitation_rate,
        min_std=config.min_std,
        policy_kwargs={"features": features, "log_std_init": float(np.log(config.std))},
    )
    if start is not None:
        model.policy.load_state_dict(start.state_dict())
        with torch.no_grad():
            model.policy.log_std.fill_(float(np.log(config.std)))
    model.set_logger(configure(str(log), ["tensorboard"] if config.tensorboard else []))
    return model
