"""What a training depends on: its settings, and the learning rate of each step."""

import math
from dataclasses import dataclass

from prunegym.pruning.errors import PruningError


@dataclass(frozen=True, kw_only=True)
class TrainingSettings:
    """What the result of a training depends on, besides the network and the data."""

    epochs: int
    learning_rate: float
    batch_size: int
    weight_decay: float
    momentum: float
    warmup_epochs: float
    label_smoothing: float
    amp: bool
    teacher: str
    """Hash of the weights that are imitated; empty without a teacher."""
    distillation_weight: float
    temperature: float
    seed: int

    def __post_init__(self) -> None:
        rules: dict[str, tuple[bool, str]] = {
            "epochs": (self.epochs >= 1, "at least 1"),
            "learning_rate": (0 < self.learning_rate < math.inf, "above 0"),
            "batch_size": (self.batch_size >= 1, "at least 1"),
            "weight_decay": (0 <= self.weight_decay < math.inf, "at least 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "warmup_epochs": (0 <= self.warmup_epochs <= self.epochs, f"in [0, {self.epochs}], the epochs"),
            "distillation_weight": (0 <= self.distillation_weight <= 1, "in [0, 1]"),
            "temperature": (0 < self.temperature < math.inf, "above 0"),
        }
        for name, (holds, rule) in rules.items():
            if not holds:
                raise PruningError(
                    f"`{name}` should be {rule}. Received {getattr(self, name)}. Correct it, or leave it out "
                    "for the default."
                )


def learning_rate_at(epoch: float, *, epochs: int, warmup_epochs: float, peak: float) -> float:
    """Learning rate of a step: linear from 0 to ``peak``, then half a cosine to 0.

    Args:
        epoch: Time in the middle of the step, in epochs since the start.
        epochs: Length of the schedule.
        warmup_epochs: Length of its linear part.
        peak: Highest value.
    """
    if epoch < warmup_epochs:
        return peak * epoch / warmup_epochs
    remaining = max(epochs - warmup_epochs, 1e-9)
    return peak * 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup_epochs) / remaining)))
