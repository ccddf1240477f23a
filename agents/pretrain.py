"""Train a base network on the train split, to be pruned later."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from prunegym.agents.runs import RunFolder
from prunegym.agents.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.training_options import TrainingOptions
from prunegym.pruning.files import replacing
from prunegym.pruning.task import Task
from prunegym.pruning.training import EpochRow, evaluate_network, train_network

WEIGHTS = "model.safetensors"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TIMING = "timing.csv"


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
    with limit.heeded():
        rows = train_network(
            model,
            task,
            config.training_settings(seed),
            device=device,
            checkpoint=run.path(CHECKPOINT),
            checkpoint_minutes=config.checkpoint_minutes,
            progress=progress,
            on_epoch=partial(note_epoch, run, limit=limit),
        )
    complete_rows(run, rows)
    save_weights(run.path(WEIGHTS), model)
    measured = evaluate_network(model, task, "test", device=device)
    return PretrainResult(
        weights=run.path(WEIGHTS), epochs=len(rows), test_score=measured.score, test_loss=measured.loss
    )


def note_epoch(run: RunFolder, row: EpochRow, limit: TimeLimit = NO_LIMIT) -> None:
    """Write down what an epoch did, its seconds apart, once its checkpoint is saved; then stop if the time is up.

    A function of a module, so that other processes can be told to.

    Raises:
        PruningError: The row could not be written; the next attempt makes up for it.
        TimeUp: The limit is reached.
    """
    for name, values in _tables([row]).items():
        run.append_row(name, values[0])
    limit.check()


def complete_rows(run: RunFolder, rows: list[EpochRow]) -> None:
    """Write the tables of a training again if a kill between a checkpoint and its row left one out."""
    for name, values in _tables(rows).items():
        if [row["epoch"] for row in run.read_rows(name)] != [row["epoch"] for row in values]:
            run.write_rows(name, values)


def _tables(rows: list[EpochRow]) -> dict[str, list[dict[str, Any]]]:
    """Rows of epochs as tables: what is the same for the same seed, and what is not."""
    metrics = [{name: value for name, value in vars(row).items() if name != "seconds"} for row in rows]
    return {METRICS: metrics, TIMING: [{"epoch": row.epoch, "seconds": round(row.seconds, 3)} for row in rows]}


def save_weights(path: Path, model: nn.Module) -> None:
    """Write a network's weights as safetensors, for ``--weights``; replaces the file in one step."""
    # cloned: safetensors refuses tensors that share memory
    tensors = {name: value.detach().cpu().clone().contiguous() for name, value in model.state_dict().items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, {"format": "pt"})
