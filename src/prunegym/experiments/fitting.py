"""Train a network in a run folder: checkpoint, tables of its epochs, going on after an interruption, time limit."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.pruning.task import Task
from prunegym.pruning.training import EpochRow, TrainingSettings, train_network

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
TIMING = "timing.csv"


def fit(
    model: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    run: RunFolder | None = None,
    checkpoint: Path | None = None,
    checkpoint_minutes: float,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    progress: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> list[EpochRow]:
    """Train a network in place, from where an interrupted run left it.

    Args:
        model: The network.
        task: Data and loss.
        settings: Everything else that the result depends on.
        run: Gets the checkpoint and the tables of the epochs.
        checkpoint: File for the checkpoint where there is no run folder; by default none is written.
        checkpoint_minutes: Longest time without a checkpoint.
        teacher: Network whose outputs are imitated.
        device: Where to train.
        progress: Show a bar.
        limit: When to stop: after the epoch under way.

    Returns:
        One row per epoch, those before an interruption included.

    Raises:
        TimeUp: The limit is reached.
        PruningError: Something does not fit, the loss is not finite, or a file could not be written; the last
            checkpoint is kept.
    """
    with limit.heeded():
        rows = train_network(
            model,
            task,
            settings,
            teacher=teacher,
            device=device,
            checkpoint=checkpoint if run is None else run.path(CHECKPOINT),
            checkpoint_minutes=checkpoint_minutes,
            progress=progress,
            on_epoch=None if run is None else partial(note_epoch, run, limit=limit),
        )
    if run is not None:
        complete_rows(run, rows)
    return rows


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
