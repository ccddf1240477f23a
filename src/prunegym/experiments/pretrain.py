"""Train a base network on the train split, to be pruned later."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.configuration.training_options import TrainingOptions
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.experiments.fitting import fit
from prunegym.pruning.files import replacing
from prunegym.pruning.task import Task
from prunegym.pruning.training import evaluate_network

WEIGHTS = "model.safetensors"


@dataclass(frozen=True, kw_only=True)
class PretrainResult:
    """A trained network."""

    weights: Path
    """For ``--weights``."""
    epochs: int
    test_score: float
    """Accuracy on the test images after the last epoch."""
    test_loss: float


def pretrain(
    model: nn.Module,
    task: Task,
    config: TrainingOptions,
    run: RunFolder,
    *,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
    limit: TimeLimit = NO_LIMIT,
) -> PretrainResult:
    """Train a network; an interrupted run goes on from its last epoch.

    Args:
        model: Trained in place.
        task: Data and loss.
        config: Epochs, learning rate and the rest of the schedule.
        run: Where weights, checkpoint and metrics go.
        seed: Of the order and augmentation of the images.
        device: Where to train.
        progress: Show a bar.
        limit: When to stop: after the epoch under way.

    Raises:
        PruningError: The loss became non-finite, or a file could not be written; the checkpoint is kept.
    """
    rows = fit(
        model,
        task,
        config.training_settings(seed),
        run=run,
        checkpoint_minutes=config.checkpoint_minutes,
        device=device,
        progress=progress,
        limit=limit,
    )
    save_weights(run.path(WEIGHTS), model)
    measured = evaluate_network(model, task, "test", device=device)
    return PretrainResult(
        weights=run.path(WEIGHTS), epochs=len(rows), test_score=measured.score, test_loss=measured.loss
    )


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a network's weights as safetensors, for ``--weights``; replaces the file in one step."""
    # cloned: safetensors refuses tensors that share memory
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
