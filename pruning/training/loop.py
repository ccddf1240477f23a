"""The training loop: one pass over the data after another, from the last checkpoint to the end of the schedule."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.layout import CONTIGUOUS, common, laid_out, lay_out, layout_on
from prunegym.pruning.task import Inputs, Task, forward, running, scores_of
from prunegym.pruning.training.average import WeightAverage
from prunegym.pruning.training.batches import Pass, count_steps
from prunegym.pruning.training.check import no_batches
from prunegym.pruning.training.checkpoint import (
    Checkpoint,
    generator_states,
    set_generator_states,
    shapes_of,
    weights_digest,
)
from prunegym.pruning.training.distillation import Imitation
from prunegym.pruning.training.schedule import learning_rate_at, make_optimizer
from prunegym.pruning.training.settings import TrainingSettings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

#: Steps after which several devices ask each other whether a checkpoint is due: asking takes a message to all of them.
_STEPS_BETWEEN_QUESTIONS = 20


@dataclass(frozen=True)
class EpochRow:
    """What one epoch of training did.

    Args:
        epoch: Counted from 1.
        learning_rate: Of its last step.
        loss: Mean over its training batches, distillation and label smoothing included.
        score: Mean over its training examples, as augmented and while the weights changed; None where the task does not
            score what the network gives in training mode, as that of a detector may not.
        seconds: Time it took.
    """

    epoch: int
    learning_rate: float
    loss: float
    score: float | None
    seconds: float


@dataclass(frozen=True)
class Job:
    """What there is to do."""

    model: nn.Module
    task: Task
    settings: TrainingSettings
    teacher: nn.Module | None
    checkpoint: Path | None
    checkpoint_minutes: float
    progress: bool
    on_epoch: Callable[[EpochRow], None] | None

    def open_checkpoint(self) -> Checkpoint | None:
        """The checkpoint, if there is to be one."""
        if self.checkpoint is None:
            return None
        identity = {
            **asdict(self.settings),
            "data": self.task.fingerprint,
            "tensors": shapes_of(self.model),
            "teacher": "" if self.teacher is None else weights_digest(self.teacher),
        }
        return Checkpoint(self.checkpoint, identity)


@dataclass
class Tally:
    """What an epoch has come to so far, on this device."""

    batches: int = 0
    examples: int = 0
    loss: float = 0.0
    score: float = 0.0
    seconds: float = 0.0
    rate: float = 0.0

    def add(self, loss: float, scores: Tensor | None) -> None:
        """Count a batch; without scores the epoch has none."""
        self.batches += 1
        self.loss += loss
        self.examples += 1 if scores is None else len(scores)
        self.score += math.nan if scores is None else float(scores.sum())


class Training:
    """The state of one training: everything a checkpoint holds."""

    def __init__(self, fabric: Fabric, job: Job) -> None:
        self.fabric, self.job, self.settings, self.task = fabric, job, job.settings, job.task
        self.checkpoint = job.open_checkpoint()
        self.model = job.model.to(fabric.device)
        self.imitation: Imitation | None = None
        if job.teacher is not None:
            teacher = job.teacher.to(fabric.device)
            self.imitation = Imitation(teacher, self.settings.distillation_weight, self.settings.temperature)
        self.rows: list[EpochRow] = []
        self.scored = True
        self.generator = torch.Generator().manual_seed(self.settings.seed)
        self._begin_pass()
        self.saved = time.monotonic()

    def run(self) -> None:
        """Train from the checkpoint, if there is one, to the end of the schedule."""
        networks = [self.model] if self.imitation is None else [self.model, self.imitation.teacher]
        self.layout = common(layout_on(one, self.task, "train", self.fabric.device) for one in networks)
        lay_out(self.model, self.layout)  # before the optimiser takes its layout from the weights
        try:
            self._run()
        finally:
            self.model.eval()
            lay_out(self.model, CONTIGUOUS)

    def _run(self) -> None:
        """Go through the epochs that are left."""
        settings = self.settings
        self.optimizer = make_optimizer(self.model, settings)
        self.average = None if settings.ema is None else WeightAverage(self.model, settings.ema)
        # a device of any kind: see devices.one_device
        moves = settings.devices > 1
        self.network, self.stepper = self.fabric.setup(self.model, self.optimizer, move_to_device=moves)
        self.steps = count_steps(self.task, settings)
        self._restore()
        done = self.steps * len(self.rows) + self.tally.batches // settings.accumulate
        shown = self.job.progress and self.fabric.is_global_zero
        total = self.steps * settings.epochs
        with tqdm(total=total, initial=done, desc="training", unit="step", disable=not shown) as bar:
            while len(self.rows) < settings.epochs:
                self._epoch(bar)
        if self.average is not None:
            self.model.load_state_dict(self.average.network.state_dict())

    def _begin_pass(self) -> None:
        """Note where all generators are when a pass over the data begins."""
        self.tally = Tally()
        self.pass_start, self.pass_states = self.generator.get_state(), generator_states(self.fabric.device)

    def _epoch(self, bar: tqdm[Any]) -> None:
        """Go once through the training examples, or through those that are left."""
        self.model.train()
        start, before = time.perf_counter(), self.tally.seconds
        for inputs, targets in self._pass().batches(self.tally.batches):
            first = self.tally.batches % self.settings.accumulate == 0
            last = (self.tally.batches + 1) % self.settings.accumulate == 0
            if first:
                self._set_rate()
            self._learn(laid_out(inputs, self.layout), targets, first=first, last=last)
            self.tally.seconds = before + time.perf_counter() - start
            if last:
                self._show(bar)
                if self._is_due():
                    self._save()
        row = self._row()
        self.rows.append(row)
        self._begin_pass()
        self._save()
        if self.job.on_epoch is not None and self.fabric.is_global_zero:
            self.job.on_epoch(row)

    def _pass(self) -> Pass:
        """The pass over the data that began last."""
        fabric = self.fabric
        return Pass(
            task=self.task,
            settings=self.settings,
            steps=self.steps,
            device=fabric.device,
            rank=fabric.global_rank,
            generator=self.generator,
            global_states=self.pass_states,
        )

    def _set_rate(self) -> None:
        """Give the optimiser the learning rate of the step that begins."""
        settings = self.settings
        step = self.tally.batches // settings.accumulate
        self.tally.rate = learning_rate_at(
            len(self.rows) + (step + 0.5) / self.steps,
            epochs=settings.epochs,
            warmup_epochs=settings.warmup_epochs,
            peak=settings.learning_rate,
            schedule=settings.schedule,
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.tally.rate

    def _learn(self, inputs: Inputs, targets: Any, *, first: bool, last: bool) -> None:
        """Add the gradient of a batch to those of its step, and take the step after the last of them."""
        fabric, settings = self.fabric, self.settings
        learning = running("learn in training mode", self.task, settings.batch_size)
        with learning, fabric.no_backward_sync(self.network, enabled=not last):
            outputs = forward(self.network, inputs)
            loss = self.task.loss(outputs, targets)
            if self.imitation is not None:
                with fabric.autocast():
                    loss = self.imitation.mixed(loss, inputs, outputs)
            value = loss.detach().item()
            if not math.isfinite(value):
                raise self._not_finite(value)
            if first:
                self.optimizer.zero_grad(set_to_none=True)
            fabric.backward(loss if settings.accumulate == 1 else loss / settings.accumulate)
        if last:
            if settings.clip_grad is not None:
                # where float16 overflows, the scaler leaves out the step
                fabric.clip_gradients(self.network, self.stepper, max_norm=settings.clip_grad, error_if_nonfinite=False)
            self.stepper.step()
            if self.average is not None:
                self.average.update(self.model)
        self.tally.add(value, self._scores(outputs, targets))

    def _scores(self, outputs: Any, targets: Any) -> Tensor | None:
        """Scores of a batch in training mode, or None where the task has none for that.

        Many detectors give other outputs then. In evaluation mode a score is needed: what is wrong with it shows there.
        """
        if not self.scored:
            return None
        try:
            with torch.no_grad():
                return scores_of(self.task, outputs, targets)
        except Exception as fault:
            warnings.warn(
                f"epochs have no score: that of '{self.task.name}' raised {type(fault).__name__} ({fault}) on what the "
                "network returns in training mode",
                stacklevel=2,
            )
            self.scored = False
            return None

    def _not_finite(self, loss: float) -> PruningError:
        """Describe a loss that is infinite or no number, and say what is left."""
        kept = ""
        if self.checkpoint is not None and self.rows:
            kept = f"; the checkpoint of epoch {len(self.rows)} is kept in {self.checkpoint.path}"
        step = self.tally.batches // self.settings.accumulate + 1
        return PruningError(
            "`learning_rate` should be low enough for the loss to stay finite. Received "
            f"{self.settings.learning_rate}: the loss is {loss} at step {step} of epoch "
            f"{len(self.rows) + 1}{kept}. Lower it, or look for values in the data or the initial weights "
            "that are not finite."
        )

    def _row(self) -> EpochRow:
        """What the epoch came to, on all devices."""
        one = self.tally
        counts = torch.tensor([one.batches, one.examples, one.loss, one.score], dtype=torch.float64)
        batches, examples, loss, score = self._gathered(counts).sum(0).tolist()
        if not batches:
            raise no_batches(self.task)
        mean = None if math.isnan(score) else score / examples
        return EpochRow(len(self.rows) + 1, one.rate, loss / batches, mean, one.seconds)

    def _show(self, bar: tqdm[Any]) -> None:
        """Tell how the epoch is going."""
        one = self.tally
        epoch = f"{len(self.rows) + 1}/{self.settings.epochs}"
        score = {} if math.isnan(one.score) else {"score": f"{one.score / one.examples:.3f}"}
        bar.set_postfix(epoch=epoch, loss=f"{one.loss / one.batches:.3f}", **score, refresh=False)
        bar.update()

    def _is_due(self) -> bool:
        """Whether it is time for a checkpoint; all devices agree on the first one's clock."""
        if self.checkpoint is None:
            return False
        due = time.monotonic() - self.saved >= 60 * self.job.checkpoint_minutes
        if self.settings.devices == 1:
            return due
        step = self.tally.batches // self.settings.accumulate
        return step % _STEPS_BETWEEN_QUESTIONS == 0 and self.fabric.broadcast(due)

    def _save(self) -> None:
        """Write the state, atomically; every device takes part."""
        if self.checkpoint is None:
            return
        device = self.fabric.device
        generators, pass_states = (
            {name: self._gathered(state) for name, state in states.items()}
            for states in (generator_states(device), self.pass_states)
        )
        tally = asdict(self.tally)
        tallies = self._gathered(torch.tensor(list(tally.values()), dtype=torch.float64))
        if self.fabric.is_global_zero:
            average = None if self.average is None else self.average.state_dict()
            self.checkpoint.write(
                {
                    # the result so far, where the file is taken for a file of weights
                    "state_dict": self.model.state_dict() if average is None else average["network"],
                    "model": self.model.state_dict(),
                    "optimizer": self.optimizer.state_dict(),
                    "average": average,
                    "precision": self.fabric.strategy.precision.state_dict(),
                    "generator": self.pass_start,
                    "generators": generators,
                    "pass_generators": pass_states,
                    "tallies": tallies,
                    "rows": [asdict(row) for row in self.rows],
                }
            )
        self.saved = time.monotonic()
        self.fabric.barrier()

    def _restore(self) -> None:
        """Take up the state of the checkpoint, if there is one."""
        state = None if self.checkpoint is None else self.checkpoint.read()
        if state is None:
            return
        rank = self.fabric.global_rank
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.fabric.strategy.precision.load_state_dict(state["precision"])
        self.pass_start = state["generator"]
        self.generator.set_state(self.pass_start)
        self.rows = [EpochRow(**row) for row in state["rows"]]
        batches, examples, *rest = state["tallies"][rank].tolist()
        self.tally = Tally(int(batches), int(examples), *rest)
        # cloned: torch crashes on states that are part of another tensor
        now, self.pass_states = (
            {name: states[rank].clone() for name, states in state[key].items()}
            for key in ("generators", "pass_generators")
        )
        set_generator_states(now, self.fabric.device)

    def _gathered(self, tensor: Tensor) -> Tensor:
        """A tensor of every device, ``(devices, ...)``, on the CPU."""
        if self.settings.devices == 1:
            return tensor.cpu()[None]
        everywhere = self.fabric.all_gather(tensor.to(self.fabric.device))
        assert isinstance(everywhere, Tensor)
        return everywhere.cpu().reshape(self.settings.devices, *tensor.shape)
