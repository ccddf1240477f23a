"""What would stop a training, found before work is spent on what it should train."""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.layout import common, laid_out, layout_for
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
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


def check_pruned_training(
    network: PrunableNetwork,
    plan: PruningPlan,
    task: Task,
    settings: TrainingSettings,
    *,
    device: torch.device | str = "cpu",
) -> None:
    """Make sure that a network can still be trained once it is pruned, by letting a smaller one learn from one batch.

    A network is traced in evaluation mode. A branch that only training runs (``if self.training``) is not seen there:
    it keeps its width, and does not fit what it reads. The network and the global generators stay as they are.

    Args:
        network: The unpruned network, which has passed :func:`check_training`.
        plan: What makes it smaller.
        task: Data and loss.
        settings: How it is to be trained.
        device: Where to train.

    Raises:
        PruningError: The smaller network fails on a batch of the ``train`` split.
    """
    device = torch.device(device)
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        batch = _first_batch(task, settings, device)
        fault = _fault(network, plan, task, batch)
        if fault is None:
            return
        groups = network.graph.groups
        read = [one.name for one in groups if _fault(network, _only(network, plan, one), task, batch) is not None]
    reason = (str(fault).splitlines() or [""])[0]
    keep = " ".join(f"--keep '{name}'" for name in read) or "--keep and the names of the layers that it reads"
    raise PruningError(
        f"`network` should learn in training mode when it is pruned, as it does unpruned. Received {network.name}, "
        f"which raised {type(fault).__name__} then: {reason.rstrip('.')}. What only training runs (if self.training) "
        f"is not seen in evaluation mode, and is not pruned with the rest. Use {keep}, or a network without that "
        "branch; or do not fine-tune (epochs=0)."
    )


def _only(network: PrunableNetwork, plan: PruningPlan, group: ChannelGroup) -> PruningPlan:
    """The part of a plan that is about one group."""
    mask = np.ones(network.graph.units, dtype=np.bool_)
    mask[group.units] = plan.mask(network.graph)[group.units]
    return PruningPlan.from_mask(network.graph, mask)


def _fault(network: PrunableNetwork, plan: PruningPlan, task: Task, batch: tuple[Inputs, object]) -> Exception | None:
    """What the network that a plan leaves raises while it learns from a batch; None if nothing."""
    inputs, targets = batch
    twin = duplicate(network.pruned(plan)).train()  # a copy: what is not cut is shared with the unpruned network
    try:
        task.loss(forward(twin, inputs), targets).backward()
    except Exception as fault:  # whatever a network may raise
        return fault
    return None


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
