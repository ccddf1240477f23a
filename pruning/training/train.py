"""Train a network, on one device or on several."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from torch import nn

from prunegym.pruning.copies import duplicate
from prunegym.pruning.modes import evaluating
from prunegym.pruning.task import ClassificationTask, Task
from prunegym.pruning.training.check import check_devices, check_smoothing
from prunegym.pruning.training.loop import EpochRow, Job, Training
from prunegym.pruning.training.settings import TrainingSettings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

CHECKPOINT_MINUTES = 10.0
"""Longest time between two checkpoints."""
#: Distance between the seeds of dropout on several devices.
_SEED_STRIDE = 1_000_003


def train_network(
    model: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_minutes: float = CHECKPOINT_MINUTES,
    progress: bool = False,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> list[EpochRow]:
    """Train a network in place.

    On several devices, each has a process with a copy of everything: model, task and ``on_epoch`` have to be picklable,
    and ``on_epoch`` is called in the first of these processes.

    Args:
        model: Trained in place; ends on ``device``, in evaluation mode.
        task: Data and loss.
        settings: Everything else that the result depends on.
        teacher: Network whose outputs are imitated, for instance the unpruned one.
        device: Where to train; with several devices their kind.
        checkpoint: File to save after each epoch, and in between. If it exists, training continues from it, to the same
            result as without the interruption: bit for bit on one device, up to rounding on several.
        checkpoint_minutes: Longest time without a checkpoint.
        progress: Show a bar on standard error.
        on_epoch: Called with each new epoch's row, after its checkpoint is saved.

    Returns:
        One row per epoch, those before a resumption included.

    Raises:
        PruningError: The checkpoint belongs to another training, something does not fit, or the loss is not finite (the
            last checkpoint is kept).
    """
    # Fabric is imported where a training starts: see devices.py
    from prunegym.pruning.training import devices

    device = torch.device(device)
    check_devices(device, settings.devices)
    task = _smoothed(task, settings.label_smoothing)
    job = Job(model, task, settings, teacher, checkpoint, checkpoint_minutes, progress, on_epoch)
    if settings.devices == 1:
        return _train(devices.one_device(device, settings.amp), job).rows
    fabric = devices.several_devices(device, settings.devices, settings.amp)
    with TemporaryDirectory() as folder:
        # what the processes learn comes back in the checkpoint
        job = replace(job, checkpoint=checkpoint or Path(folder) / "checkpoint.pt")
        devices.launch(fabric, _train, job)
        return _finished(job, device)


def _train(fabric: Fabric, job: Job) -> Training:
    """Do the job on one of the devices."""
    if fabric.world_size > 1:
        # tensors come to other processes in shared memory, and each should train a network of its own
        job = replace(job, model=duplicate(job.model))
    # dropout can only draw from the global generators: seeded here, left as they were afterwards
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluating(job.teacher):
        torch.manual_seed(job.settings.seed + fabric.global_rank * _SEED_STRIDE)
        training = Training(fabric, job)
        training.run()
    return training


def _finished(job: Job, device: torch.device) -> list[EpochRow]:
    """Bring home the result of other processes."""
    checkpoint = job.open_checkpoint()
    state = None if checkpoint is None else checkpoint.read()
    assert state is not None
    job.model.load_state_dict(state["state_dict"])
    job.model.to(device).eval()
    return [EpochRow(**row) for row in state["rows"]]


def _smoothed(task: Task, label_smoothing: float) -> Task:
    """Smooth the labels of a task's loss."""
    check_smoothing(task, label_smoothing)
    if not isinstance(task, ClassificationTask) or not label_smoothing:
        return task
    return replace(task, label_smoothing=label_smoothing)
