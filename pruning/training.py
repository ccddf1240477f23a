"""Training, fine-tuning and measuring networks.

The schedule is fixed beforehand and the last epoch counts: no split is looked at to choose one.
"""

import hashlib
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing
from prunegym.pruning.measuring import Measurement, channels_last, evaluate_network
from prunegym.pruning.modes import evaluating
from prunegym.pruning.schedule import TrainingSettings, learning_rate_at
from prunegym.pruning.task import ClassificationTask, Inputs, Task, forward
from prunegym.pruning.weights import read_weights

__all__ = ["EpochRow", "Measurement", "distillation_loss", "evaluate_network", "train_network", "weights_digest"]

#: Of checkpoints; files of another version are refused.
_CHECKPOINT_VERSION = 1
#: Warm-up when none is asked for: a tenth of the epochs, at most so many.
_LONGEST_WARMUP = 5.0


@dataclass(frozen=True)
class EpochRow:
    """What one epoch of training did.

    Args:
        epoch: Counted from 1.
        learning_rate: Of its last step.
        loss: Mean over its training batches, distillation and label smoothing included.
        score: Mean over its training examples, as augmented and while the weights changed.
        seconds: Time it took.
    """

    epoch: int
    learning_rate: float
    loss: float
    score: float
    seconds: float


def train_network(
    model: nn.Module,
    task: Task,
    *,
    epochs: int,
    learning_rate: float = 0.1,
    batch_size: int = 128,
    weight_decay: float = 5e-4,
    momentum: float = 0.9,
    warmup_epochs: float | None = None,
    label_smoothing: float = 0.0,
    amp: bool = False,
    teacher: nn.Module | None = None,
    distillation_weight: float = 0.9,
    temperature: float = 4.0,
    device: torch.device | str = "cpu",
    seed: int = 0,
    checkpoint: Path | None = None,
    progress: bool = False,
    on_epoch: Callable[[EpochRow], None] | None = None,
) -> list[EpochRow]:
    """Train a network in place by SGD with Nesterov momentum, linear warm-up and a cosine to zero.

    Args:
        model: Trained in place; ends on ``device``, in evaluation mode.
        task: Data and loss.
        epochs: Passes over the ``train`` split.
        learning_rate: At the end of the warm-up.
        batch_size: Examples per step.
        weight_decay: L2 penalty of kernels and matrices; biases and batch-norm scales have none, since
            shrinking them does not regularise but disturbs what pruning criteria read from them.
        momentum: 0 turns momentum off.
        warmup_epochs: None takes a tenth of the epochs, at most 5.
        label_smoothing: For classification, in [0, 1).
        amp: Compute in bfloat16 where autocast deems it safe.
        teacher: Network whose outputs are imitated, for instance the unpruned one.
        distillation_weight: Share of the imitation in the loss, in [0, 1].
        temperature: Softens the outputs that are compared.
        device: Where to train.
        seed: Of the order of the data, its augmentation, and dropout.
        checkpoint: File to save after each epoch. If it exists, training continues from it, to the same
            result as without the interruption.
        progress: Show a bar on standard error.
        on_epoch: Called with each new epoch's row, after its checkpoint is saved.

    Returns:
        One row per epoch, those before a resumption included.

    Raises:
        PruningError: An argument is out of range, the checkpoint belongs to another training, or the loss is
            not finite (the checkpoint of the epoch before is kept).

    References:
        Hinton et al., "Distilling the Knowledge in a Neural Network", 2015.
    """
    settings = TrainingSettings(
        epochs=epochs,
        learning_rate=learning_rate,
        batch_size=batch_size,
        weight_decay=weight_decay,
        momentum=momentum,
        warmup_epochs=min(_LONGEST_WARMUP, epochs / 10) if warmup_epochs is None else warmup_epochs,
        label_smoothing=label_smoothing,
        amp=amp,
        teacher="" if teacher is None else weights_digest(teacher),
        distillation_weight=distillation_weight,
        temperature=temperature,
        seed=seed,
    )
    task = _smoothed(task, label_smoothing)
    # dropout can only draw from the global generators: seeded here, left as they were afterwards
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), evaluating(teacher):
        torch.manual_seed(seed)
        training = _Training(model, task, settings, teacher, torch.device(device), checkpoint)
        return training.run(progress, on_epoch)


def distillation_loss(outputs: Tensor, teacher_outputs: Tensor, temperature: float) -> Tensor:
    r"""Divergence of softened outputs from the teacher's.

    .. math:: T^2 \; \mathrm{KL}(\mathrm{softmax}(t / T) \,\|\, \mathrm{softmax}(s / T))

    Args:
        outputs: Logits :math:`s`, ``(B, classes, ...)``.
        teacher_outputs: Logits :math:`t` of the same shape.
        temperature: :math:`T`; the factor keeps the gradient's size comparable across temperatures.

    Returns:
        Mean over everything but the classes: a scalar, in nats.
    """
    student = F.log_softmax(outputs.float() / temperature, dim=1)
    target = F.log_softmax(teacher_outputs.float() / temperature, dim=1)
    divergence = F.kl_div(student, target, reduction="none", log_target=True).sum(dim=1)
    return divergence.mean() * temperature**2


class _Training:
    """The state of one training: everything a checkpoint holds."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        settings: TrainingSettings,
        teacher: nn.Module | None,
        device: torch.device,
        checkpoint: Path | None,
    ) -> None:
        self.model = model.to(device)
        self.teacher = None if teacher is None else teacher.to(device)
        self.task = task
        self.settings = settings
        self.device = device
        self.checkpoint = checkpoint
        self.rows: list[EpochRow] = []
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.optimizer = torch.optim.SGD(
            _parameter_groups(model, settings.weight_decay),
            lr=settings.learning_rate,
            momentum=settings.momentum,
            nesterov=settings.momentum > 0,
        )

    def run(self, progress: bool, on_epoch: Callable[[EpochRow], None] | None) -> list[EpochRow]:
        """Train from the checkpoint, if there is one, to the end of the schedule."""
        _lay_out(self.model, torch.channels_last)  # before momentum takes its layout from the weights
        try:
            return self._run(_count_batches(self.task, self.settings.batch_size), progress, on_epoch)
        finally:
            self.model.eval()
            _lay_out(self.model, torch.contiguous_format)

    def _run(self, steps: int, progress: bool, on_epoch: Callable[[EpochRow], None] | None) -> list[EpochRow]:
        """Go through the epochs that are left."""
        if self.checkpoint is not None and self.checkpoint.exists():
            self._restore(self.checkpoint)
        total, done = steps * self.settings.epochs, steps * len(self.rows)
        with tqdm(total=total, initial=done, desc="training", unit="step", disable=not progress) as bar:
            while len(self.rows) < self.settings.epochs:
                row = self._epoch(steps, bar)
                self.rows.append(row)
                if self.checkpoint is not None:
                    self._save(self.checkpoint)
                if on_epoch is not None:
                    on_epoch(row)
        return self.rows

    def _epoch(self, steps: int, bar: "tqdm[Any]") -> EpochRow:
        """Go once through the training examples."""
        self.model.train()
        settings, start = self.settings, time.perf_counter()
        loss_sum = score_sum = rate = 0.0
        batches = examples = 0
        for inputs, targets in self.task.batches(
            "train",
            batch_size=settings.batch_size,
            train=True,
            generator=self.generator,
            device=self.device,
        ):
            batches += 1
            rate = learning_rate_at(
                len(self.rows) + (batches - 0.5) / steps,
                epochs=settings.epochs,
                warmup_epochs=settings.warmup_epochs,
                peak=settings.learning_rate,
            )
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            loss, scores = self._step(channels_last(inputs), targets, batches)
            loss_sum += loss
            score_sum += float(scores.sum())
            examples += len(scores)
            bar.set_postfix(loss=f"{loss:.3f}", refresh=False)
            bar.update()
        if not batches:
            raise PruningError(
                f"`task` should give training batches. Received '{self.task.name}', which gave none."
            )
        seconds = time.perf_counter() - start
        return EpochRow(len(self.rows) + 1, rate, loss_sum / batches, score_sum / examples, seconds)

    def _step(self, inputs: Inputs, targets: Any, step: int) -> tuple[float, Tensor]:
        """Take one step; return the loss and the scores ``(B,)`` before it."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            outputs = forward(self.model, inputs)
        loss = self.task.loss(outputs, targets)
        if self.teacher is not None:
            loss = self._distil(self.teacher, inputs, outputs, loss)
        value = loss.detach().item()
        if not math.isfinite(value):
            raise self._not_finite(value, step)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        with torch.no_grad():
            return value, self.task.score(outputs, targets)

    def _not_finite(self, loss: float, step: int) -> PruningError:
        """Describe a loss that is infinite or no number, and say what is left."""
        kept = ""
        if self.checkpoint is not None and self.rows:
            kept = f"; the checkpoint of epoch {len(self.rows)} is kept in {self.checkpoint}"
        return PruningError(
            "`learning_rate` should be low enough for the loss to stay finite. Received "
            f"{self.settings.learning_rate}: the loss is {loss} at step {step} of epoch "
            f"{len(self.rows) + 1}{kept}. Lower it, or look for values in the data or the initial weights "
            "that are not finite."
        )

    def _distil(self, teacher: nn.Module, inputs: Inputs, outputs: Any, loss: Tensor) -> Tensor:
        """Mix imitation of the teacher into the loss."""
        with torch.no_grad(), torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.amp):
            wanted = forward(teacher, inputs)
        if not isinstance(outputs, Tensor) or not isinstance(wanted, Tensor) or outputs.shape != wanted.shape:
            raise PruningError(
                "`teacher` should return one tensor of the shape the network returns. Received "
                f"{_shape(wanted)} for {_shape(outputs)}. Train without a teacher, or with a fitting one."
            )
        weight = self.settings.distillation_weight
        return (1 - weight) * loss + weight * distillation_loss(outputs, wanted, self.settings.temperature)

    def _save(self, path: Path) -> None:
        """Write the state, atomically."""
        state = {
            "version": _CHECKPOINT_VERSION,
            "settings": asdict(self.settings),
            "data": self.task.fingerprint,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "generator": self.generator.get_state(),
            "global_generator": torch.get_rng_state(),
            "cuda_generators": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
            "rows": [asdict(row) for row in self.rows],
        }
        with replacing(path, argument="checkpoint") as temporary:
            torch.save(state, temporary)

    def _restore(self, path: Path) -> None:
        """Take up the state of a checkpoint of the same training."""
        state: Mapping[str, Any] = read_weights(path, argument="checkpoint")
        if state.get("version") != _CHECKPOINT_VERSION:
            raise PruningError(
                f"`checkpoint` should be of version {_CHECKPOINT_VERSION}. Received {path} of version "
                f"{state.get('version')}. Delete it to start afresh, or choose another file."
            )
        now = {
            **asdict(self.settings),
            "data": self.task.fingerprint,
            "tensors": _shapes(self.model.state_dict()),
        }
        then = {**state["settings"], "data": state["data"], "tensors": _shapes(state["model"])}
        differing = [name for name in now if now[name] != then.get(name)]
        if differing:
            name = differing[0]
            values = (
                ""
                if name in ("data", "tensors", "teacher")
                else f" ({then.get(name)} there, {now[name]} now)"
            )
            raise PruningError(
                f"`checkpoint` should be of the same training. Received {path}, which differs in "
                f"{', '.join(differing)}{values}. Delete it to start afresh, or choose another file."
            )
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.generator.set_state(state["generator"])
        torch.set_rng_state(state["global_generator"])
        if torch.cuda.is_available() and len(state["cuda_generators"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_generators"])
        self.rows = [EpochRow(**row) for row in state["rows"]]


def _smoothed(task: Task, label_smoothing: float) -> Task:
    """Smooth the labels of a task's loss."""
    if not label_smoothing:
        return task
    if not isinstance(task, ClassificationTask):
        raise PruningError(
            f"`label_smoothing` should be 0 for a task of one's own. Received {label_smoothing} for "
            f"'{task.name}'. Smooth the targets in the task's loss instead."
        )
    return replace(task, label_smoothing=label_smoothing)


def _lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Change the memory layout of 4-D weights; networks with 5-D ones keep theirs."""
    if all(parameter.ndim < 5 for parameter in model.parameters()):
        model.to(memory_format=memory_format)


def weights_digest(model: nn.Module) -> str:
    """Hash a network's weights."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.detach().cpu().double().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Divide the parameters into those that decay and those that do not."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise PruningError(
            "`model` should have parameters that require a gradient. Received one without. Unfreeze it."
        )
    return [
        {"params": [parameter for parameter in trained if parameter.ndim > 1], "weight_decay": weight_decay},
        {"params": [parameter for parameter in trained if parameter.ndim <= 1], "weight_decay": 0.0},
    ]


def _count_batches(task: Task, batch_size: int) -> int:
    """Count the steps of an epoch, on which the schedule depends."""
    if isinstance(task, ClassificationTask):
        return max(1, len(task.data.train) // batch_size)
    # another task need not know its length: go through it once
    return max(
        1,
        sum(1 for _ in task.batches("train", batch_size=batch_size, train=True, generator=torch.Generator())),
    )


def _shape(value: Any) -> str:
    """Describe what a network returned."""
    return str(tuple(value.shape)) if isinstance(value, Tensor) else type(value).__name__


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shapes of a network's tensors by name."""
    return {name: tuple(value.shape) for name, value in state.items()}
