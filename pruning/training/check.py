"""What would stop a training, found before work is spent on what it should train."""

from __future__ import annotations

import torch
from torch import nn

from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError
from prunegym.pruning.layout import common, laid_out, layout_for
from prunegym.pruning.modes import evaluating
from prunegym.pruning.task import ClassificationTask, Inputs, Task, forward, running
from prunegym.pruning.training.average import WeightAverage
from prunegym.pruning.training.batches import count_steps
from prunegym.pruning.training.distillation import Imitation
from prunegym.pruning.training.schedule import make_optimizer
from prunegym.pruning.training.settings import TrainingSettings

#: Kinds of devices that several may work side by side of.
_PARALLEL = ("cpu", "cuda")


def check_training(
    model: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
) -> None:
    """Make sure that a network can be trained, by letting a copy of it learn from one batch.

    The network stays as it is, and so do the global generators; a teacher is moved to ``device``.

    Args:
        model: What is to be trained, or the unpruned network that it will be made of.
        task: Data and loss.
        settings: How it is to be trained.
        teacher: Network whose outputs are to be imitated.
        device: Where to train.

    Raises:
        PruningError: There are fewer devices or batches than asked for, nothing can be trained, the network fails on a
            batch of the ``train`` split, or the teacher's outputs are others.
    """
    device = torch.device(device)
    check_devices(device, settings.devices)
    check_smoothing(task, settings.label_smoothing)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluating(teacher):
        count_steps(task, settings)
        twin = duplicate(model).to(device).train()
        make_optimizer(twin, settings)
        if settings.ema is not None:
            WeightAverage(twin, settings.ema)
        inputs, targets = _first_batch(task, settings, device)
        networks = [twin] if teacher is None else [twin, teacher.to(device)]
        inputs = laid_out(inputs, common(layout_for(one, inputs, training=True) for one in networks))
        with running("learn in training mode", task, settings.batch_size):
            outputs = forward(twin, inputs)
            loss = task.loss(outputs, targets)
            if teacher is not None:
                imitation = Imitation(teacher, settings.distillation_weight, settings.temperature)
                loss = imitation.mixed(loss, inputs, outputs)
            loss.backward()


def check_devices(device: torch.device, count: int) -> None:
    """Make sure that there are so many devices, before work is spent on what they should train.

    Raises:
        PruningError: There are not, or the device is a certain one.
    """
    if count == 1:
        return
    named = ":" in str(device)
    present = torch.cuda.device_count() if device.type == "cuda" else count
    if device.type not in _PARALLEL or named or count > present:
        most = 1 if named or device.type not in _PARALLEL else f"at most {present}"
        remedy = "Name the kind of device without a number" if named else "Lower it"
        raise PruningError(
            f"`devices` should be {most} with device {device}. Received {count}. {remedy}, or choose another device."
        )


def check_smoothing(task: Task, label_smoothing: float) -> None:
    """Refuse to smooth the labels of a task whose loss is its own.

    Raises:
        PruningError: That was asked for.
    """
    if label_smoothing and not isinstance(task, ClassificationTask):
        raise PruningError(
            f"`label_smoothing` should be 0 for a task of one's own. Received {label_smoothing} for "
            f"'{task.name}'. Smooth the targets in the task's loss instead."
        )


def _first_batch(task: Task, settings: TrainingSettings, device: torch.device) -> tuple[Inputs, object]:
    """A batch as the training will see it."""
    generator = torch.Generator().manual_seed(settings.seed)
    found = task.batches("train", batch_size=settings.batch_size, train=True, generator=generator, device=device)
    batch = next(iter(found), None)
    if batch is None:
        raise no_batches(task)
    return batch


def no_batches(task: Task) -> PruningError:
    """Describe a task without training examples; the error is returned, not raised."""
    return PruningError(
        f"`task` should give training batches. Received '{task.name}', which gave none. Let its method batches give "
        "some for the split train."
    )
