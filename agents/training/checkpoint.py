"""State of a training run between updates, as tensors and plain values that load without unpickling code."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from prunegym.agents.policies.ppo import Episode, PruningPPO
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing

FORMAT = 1


def save_checkpoint(path: Path, model: PruningPPO, state: dict[str, Any]) -> None:
    """Write the agent's weights, optimiser and memory with ``state``, atomically."""
    episodes = [
        {
            "observations": [
                {key: torch.from_numpy(value.copy()) for key, value in step.items()} for step in one.observations
            ],
            "actions": torch.from_numpy(one.actions.copy()),
            "value": one.value,
            "looked": one.looked,
        }
        for kept in model.memory.episodes.values()
        for one in kept
    ]
    content = {
        "format": FORMAT,
        "policy": model.policy.state_dict(),
        "optimizer": model.policy.optimizer.state_dict(),
        "timesteps": model.num_timesteps,
        "updates": model._n_updates,
        "episodes": episodes,
        "state": state,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)


def load_checkpoint(path: Path, model: PruningPPO) -> dict[str, Any]:
    """Put the agent back to where :func:`save_checkpoint` left it.

    Returns:
        The ``state`` that was saved with it.

    Raises:
        PruningError: damaged, unsafe, or of another version.
    """
    try:
        content = torch.load(path, map_location=model.device, weights_only=True)
    except Exception as fault:
        raise PruningError(
            f"`--out` should hold a readable checkpoint. Received {path}, which does not load "
            f"({type(fault).__name__}). Remove the file to start the run anew."
        ) from fault
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise PruningError(
            f"`--out` should hold a checkpoint of format {FORMAT}. Received another in {path}. "
            "Remove the file to start the run anew."
        )
    model.policy.load_state_dict(content["policy"])
    model.policy.optimizer.load_state_dict(content["optimizer"])
    model.num_timesteps = int(content["timesteps"])
    model._n_updates = int(content["updates"])
    for one in content["episodes"]:
        observations = [{key: value.cpu().numpy() for key, value in step.items()} for step in one["observations"]]
        actions = one["actions"].cpu().numpy().astype(np.float32)
        model.memory.add(Episode(observations, actions, float(one["value"]), bool(one.get("looked"))))
    return dict(content["state"])
