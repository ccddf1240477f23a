"""A few optimiser steps: with labels, or towards the unpruned network."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.inference import InferenceForm
from prunegym.pruning.layout import CONTIGUOUS, lay_out, layout_on
from prunegym.pruning.modes import evaluating, training_mode
from prunegym.pruning.recovery.divergence import divergence
from prunegym.pruning.recovery.features import Stage, StageFeatures, find_stages
from prunegym.pruning.recovery.watching import Place
from prunegym.pruning.task import Inputs, Task, running
from prunegym.pruning.training.schedule import trained_parameters

RECOVERY_BATCH = 128
"""Examples of each recovery step."""
FEATURES = 10.0
"""Weight of the features in the loss of distillation."""
TEMPERATURE = 2.0
"""Softens the outputs that are compared in distillation."""
LossOn: TypeAlias = Callable[[Inputs, Any], Tensor]
"""The loss of a batch, from its inputs and targets."""


def train_steps(
    model: nn.Module,
    task: Task,
    *,
    steps: int,
    learning_rate: float = 0.02,
    batch_size: int = RECOVERY_BATCH,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    seed: int = 0,
    form: InferenceForm | None = None,
    device: torch.device | str = "cpu",
    teacher: Teacher | None = None,
    split: str = "train",
    limit: int | None = None,
    progress: bool = False,
) -> float:
    """A few optimiser steps, in place.

    Args:
        model: the pruned network.
        task: gives training batches and the loss.
        steps: optimiser steps; the learning rate falls linearly to 0 over them.
        learning_rate: of the first step.
        batch_size: examples per step.
        momentum: Nesterov momentum.
        weight_decay: share of each weight taken off per unit of learning rate.
        seed: of batches and dropout, the same for every plan, so that plans are compared on equal terms.
        form: layout and precision to compute in; weights stay in float32. By default float32.
        device: where to run.
        teacher: what to imitate; labels are then not looked at.
        split: where the batches come from.
        limit: only the first so many examples of it.
        progress: show a bar.

    Returns:
        The last loss.

    Raises:
        PruningError: the loss became NaN or infinite, the network cannot learn, or there are no training batches.
    """
    if steps <= 0:
        return float("nan")
    form = form or InferenceForm((), half=False, layout=layout_on(model, task, "train", device))
    lay_out(model, form.layout)  # before the optimiser takes its layout from the weights
    optimiser = torch.optim.SGD(
        trained_parameters(model), lr=learning_rate, momentum=momentum, weight_decay=weight_decay, nesterov=True
    )
    schedule = torch.optim.lr_scheduler.LinearLR(optimiser, 1.0, 1e-3, total_iters=steps)
    value = float("nan")
    # dropout draws from the global generator: seeded here, and left as it was
    loss_of = _labelled(model, task, form) if teacher is None else teacher.loss_of(model, form)
    with training_mode(model), loss_of as loss_on, torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(seed)
        batches = islice(training_batches(task, batch_size, seed, device, split=split, limit=limit), steps)
        for step, batch in enumerate(tqdm(batches, "recovery", steps, disable=not progress, unit="step")):
            with running("learn in training mode", task, batch_size):
                loss = loss_on(*batch)
                value = float(loss.detach())
            if not np.isfinite(value):
                raise PruningError(
                    f"`learning_rate` should keep the loss finite. Received {learning_rate}, and the loss "
                    f"became {value} at recovery step {step}. Lower it."
                )
            with running("learn in training mode", task, batch_size):
                optimiser.zero_grad(set_to_none=True)
                loss.backward()
            optimiser.step()
            schedule.step()
    lay_out(model, CONTIGUOUS)
    return value


@contextmanager
def _labelled(model: nn.Module, task: Task, form: InferenceForm) -> Iterator[LossOn]:
    """The task's own loss."""
    yield lambda inputs, targets: task.loss(form.run(model, inputs), targets)


@dataclass(frozen=True)
class Teacher:
    """The unpruned network, to be imitated at the end of each stage and in its outputs, without labels.

    Hinton et al., "Distilling the Knowledge in a Neural Network", 2015; Romero et al., "FitNets", ICLR 2015.
    """

    model: nn.Module
    graph: ChannelGraph
    mask: NDArray[np.bool_]
    """Units that the pruned network keeps ``(units,)``."""
    features: float = FEATURES
    """Weight of the features' relative squared error."""
    temperature: float = TEMPERATURE

    @contextmanager
    def loss_of(self, model: nn.Module, form: InferenceForm) -> Iterator[LossOn]:
        """The loss of a pruned network, for as long as it is trained."""
        stages: dict[Place, Stage] | None = None
        with ExitStack() as stack:
            stack.enter_context(evaluating(self.model))

            def loss(inputs: Inputs, _targets: Any) -> Tensor:
                nonlocal stages
                if stages is None:
                    stages = find_stages(self.model, self.graph, self.mask, inputs)
                    wanted, present = (StageFeatures(one, stages) for one in (self.model, model))
                    stack.enter_context(wanted.attached())
                    stack.enter_context(present.attached())
                    watches.extend((wanted, present))
                wanted, present = watches
                with torch.no_grad():
                    teacher_outputs = form.run(wanted.forward, inputs)
                outputs = form.run(present.forward, inputs)
                total = divergence(outputs, teacher_outputs, self.temperature)
                met = [place for place in wanted.features if place in present.features]
                errors = [stages[place].error(present.features[place], wanted.features[place]) for place in met]
                known = [error for error in errors if error is not None]
                return total + self.features * torch.stack(known).mean() if known else total

            watches: list[StageFeatures] = []
            yield loss


def training_batches(
    task: Task,
    batch_size: int,
    seed: int,
    device: torch.device | str,
    *,
    split: str = "train",
    limit: int | None = None,
) -> Iterator[tuple[Inputs, Any]]:
    """Shuffled and augmented batches of a split without end, always the same for a seed.

    Raises:
        PruningError: there are none.
    """
    generator = torch.Generator().manual_seed(seed)
    while True:
        empty = True
        for batch in task.batches(
            split, batch_size=batch_size, limit=limit, train=True, generator=generator, device=device
        ):
            empty = False
            yield batch
        if empty:
            raise PruningError(
                f"`task` should give batches of the {split} split for recovery steps. Received none of "
                f"{batch_size} examples. Give it more data, or choose another recovery than distill."
            )
