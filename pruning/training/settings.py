"""What the result of a training depends on, besides network, data and teacher."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

from prunegym.pruning.errors import PruningError, unknown_name

OptimizerName: TypeAlias = Literal["sgd", "adamw"]
ScheduleName: TypeAlias = Literal["cosine", "constant"]
OPTIMIZERS: tuple[OptimizerName, ...] = ("sgd", "adamw")
SCHEDULES: tuple[ScheduleName, ...] = ("cosine", "constant")

#: Warm-up when none is asked for: a tenth of the epochs, at most so many.
_LONGEST_WARMUP = 5.0


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the result of a training depends on, besides network, data and teacher.

    Raises:
        PruningError: A value is out of range.
    """

    epochs: int
    """Passes over the ``train`` split."""
    learning_rate: float = 0.1
    """At the end of the warm-up."""
    batch_size: int = 128
    """Examples per batch, on each device; an optimiser step takes ``accumulate * devices`` batches."""
    optimizer: OptimizerName = "sgd"
    """``sgd`` with Nesterov momentum, or ``adamw``."""
    momentum: float = 0.9
    """Of SGD, where 0 turns it off; for AdamW the decay of the mean gradient, its first beta."""
    weight_decay: float = 5e-4
    """Of kernels and matrices; biases and scales of normalisations have none, since shrinking them does not
    regularise but disturbs what pruning criteria read from them. An L2 penalty for SGD, decoupled for AdamW."""
    schedule: ScheduleName = "cosine"
    """After the warm-up: ``cosine`` to zero, or ``constant``."""
    warmup: float | None = None
    """Share of the epochs in which the learning rate rises from zero; None takes a tenth, at most 5 epochs."""
    label_smoothing: float = 0.0
    """For classification, in [0, 1)."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one step."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; None clips nothing."""
    ema: float | None = None
    """Decay per step of an exponential moving average of the weights, which then is the result; None takes the last
    weights."""
    amp: bool = False
    """Compute in half precision where autocast deems it safe: bfloat16, or float16 with scaled losses on graphics
    cards without it."""
    distillation_weight: float = 0.9
    """Share of the imitation of the teacher in the loss, in [0, 1]."""
    temperature: float = 4.0
    """Softens the outputs that are imitated."""
    devices: int = 1
    """Devices side by side, each with batches of its own."""
    seed: int = 0
    """Of the order of the data, its augmentation, and dropout."""

    def __post_init__(self) -> None:
        if self.optimizer not in OPTIMIZERS:
            raise unknown_name("optimizer", self.optimizer, OPTIMIZERS)
        if self.schedule not in SCHEDULES:
            raise unknown_name("schedule", self.schedule, SCHEDULES)
        clip, ema, warmup = self.clip_grad, self.ema, self.warmup
        rules: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "warmup": (warmup is None or 0 <= warmup <= 1, "in [0, 1], a share of the epochs"),
            "label_smoothing": (0 <= self.label_smoothing < 1, "in [0, 1)"),
            "accumulate": (self.accumulate >= 1, "at least 1"),
            "clip_grad": (clip is None or 0 < clip < math.inf, "above 0"),
            "ema": (ema is None or 0 < ema < 1, "in (0, 1), such as 0.999"),
            "distillation_weight": (0 <= self.distillation_weight <= 1, "in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
            "devices": (self.devices >= 1, "at least 1"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise PruningError(
                    f"`{name}` should be {rule}. Received {getattr(self, name)}. Correct it, or leave it out "
                    "for the default."
                )

    @property
    def warmup_epochs(self) -> float:
        """Length of the warm-up, epochs."""
        if self.warmup is not None:
            return self.warmup * self.epochs
        return min(_LONGEST_WARMUP, self.epochs / 10)

    @property
    def batches_per_step(self) -> int:
        """Batches of all devices that an optimiser step averages over."""
        return self.accumulate * self.devices
