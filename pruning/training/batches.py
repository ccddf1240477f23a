"""Which batches of a pass over the data a device works on, from wherever the pass was interrupted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from prunegym.pruning.errors import PruningError
from prunegym.pruning.task import ClassificationTask, Inputs, Task
from prunegym.pruning.training.checkpoint import generator_states, set_generator_states
from prunegym.pruning.training.settings import TrainingSettings

Batch: TypeAlias = tuple[Inputs, Any]


@dataclass(frozen=True)
class Pass:
    """One pass over the ``train`` split, as one of several devices sees it.

    Each device takes every so-manieth batch; an incomplete last step is left out, as an incomplete last batch is.

    Args:
        task: Gives the batches.
        settings: Batch size, devices, and batches per step.
        steps: Of the pass.
        device: Where the tensors should be.
        rank: Number of this device.
        generator: Of order and augmentation; it stands where the pass begins.
        global_states: Where the global generators stood when the pass began: a task may draw from them too.
    """

    task: Task
    settings: TrainingSettings
    steps: int
    device: torch.device
    rank: int
    generator: torch.Generator
    global_states: Mapping[str, Tensor]

    def batches(self, done: int) -> Iterator[Batch]:
        """What is left when this device has worked on ``done`` of its batches."""
        settings = self.settings
        per_step = settings.batches_per_step
        stop = self.steps * per_step if per_step > 1 else None
        wanted = slice(done * settings.devices + self.rank, stop, settings.devices)
        if isinstance(self.task, ClassificationTask):
            yield from self.task.batches("train", **self._arguments, wanted=wanted)
            return
        for number, batch in self._left(done * settings.devices):
            in_turn = number >= wanted.start and (number - wanted.start) % settings.devices == 0
            if in_turn and (stop is None or number < stop):
                yield batch

    @property
    def _arguments(self) -> dict[str, Any]:
        return {
            "batch_size": self.settings.batch_size,
            "train": True,
            "generator": self.generator,
            "device": self.device,
        }

    def _left(self, count: int) -> Iterator[tuple[int, Batch]]:
        """The batches after the first ``count``, with their numbers, of a task that can only give all of them.

        The global generators are where they were when the pass began while that is drawn which is skipped, and then
        where they are now.
        """
        now = generator_states(self.device)
        set_generator_states(self.global_states, self.device)
        batches = iter(self.task.batches("train", **self._arguments))
        for _ in range(count):
            next(batches, None)
        if count:
            set_generator_states(now, self.device)
        yield from enumerate(batches, start=count)


def count_steps(task: Task, settings: TrainingSettings) -> int:
    """Steps of a pass over the ``train`` split, on which the learning rate depends.

    Raises:
        PruningError: There are fewer batches than one step takes.
    """
    batches, needed = _count_batches(task, settings.batch_size), settings.batches_per_step
    if batches < needed:
        raise PruningError(
            f"`accumulate` times `devices` should be at most the {batches} batches of an epoch. Received {needed}. "
            "Lower one of them, or `batch_size`."
        )
    return batches // needed


def _count_batches(task: Task, batch_size: int) -> int:
    """Batches of a pass, at least one."""
    if isinstance(task, ClassificationTask):
        return max(1, len(task.data.train) // batch_size)
    # another task need not know its length: go through it once
    found = task.batches("train", batch_size=batch_size, train=True, generator=torch.Generator())
    return max(1, sum(1 for _ in found))
