"""Options about how networks are trained: the same in `pretrain`, `prune`, `finetune` and `compare`."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, ClassVar, Literal

from prunegym.agents.configuration.option_rules import Options, at_least, only_with, positive, require

if TYPE_CHECKING:
    from prunegym.pruning.training import TrainingSettings

#: Learning rate and weight decay of AdamW unless asked for: PyTorch's own.
_ADAMW_RATE, _ADAMW_DECAY = 1e-3, 1e-2
_SGD_DECAY = 5e-4
#: What options of training are refused without.
_EPOCHS = "--epochs above 0"


@dataclass(frozen=True, kw_only=True)
class FittingOptions(Options):
    """How a network is trained, except for its learning rate: in a comparison that is a flag of the agents."""

    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 128
    """Images per batch, on each device. A training step takes --accumulate times --devices batches."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (with Nesterov momentum 0.9) or adamw."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """What follows the warm-up: the learning rate falls to 0 as a cosine, or stays constant."""
    warmup: float | None = None
    """Share of the epochs in which the learning rate rises from 0, in [0, 1]; by default a tenth, at most 5 epochs."""
    weight_decay: float | None = None
    """Weight decay of kernels and matrices; by default 0.0005 with sgd (an L2 penalty) and 0.01 with adamw."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes, in [0, 1)."""
    accumulate: int = 1
    """Batches whose gradients are averaged into one training step: larger steps than fit in memory."""
    clip_grad: float | None = None
    """Largest norm of the gradient of all parameters together; by default none."""
    ema: float | None = None
    """Keep an exponential moving average of the weights, with this decay per step (such as 0.999; less in the first
    steps): it is what is measured and saved."""
    amp: bool = False
    """Train in half precision where that is safe: bfloat16, or float16 with scaled losses on graphics cards without
    it."""
    devices: int = 1
    """Devices of the kind --device to train on side by side, each with batches of its own; on a processor, processes
    that share its cores."""
    checkpoint_minutes: float = 10.0
    """Minutes of training that an interruption may cost at most; a checkpoint is also written after each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "epochs")
        at_least(self, 1, "batch_size", "accumulate", "devices")
        warmup, decay, smoothing = self.warmup, self.weight_decay, self.label_smoothing
        require(warmup is None or 0 <= warmup <= 1, "warmup", "in [0, 1], a share of the epochs", warmup)
        require(decay is None or 0 <= decay < math.inf, "weight-decay", "at least 0", decay)
        require(0 <= smoothing < 1, "label-smoothing", "in [0, 1)", smoothing)
        clip, ema = self.clip_grad, self.ema
        require(clip is None or 0 < clip < math.inf, "clip-grad", "above 0", clip)
        require(ema is None or 0 < ema < 1, "ema", "in (0, 1)", ema)
        minutes = self.checkpoint_minutes
        require(0 <= minutes < math.inf, "checkpoint-minutes", "at least 0", minutes)
        unused = (one.name for one in fields(FittingOptions) if one.name != "epochs")
        only_with(self, self.epochs > 0, _EPOCHS, *unused)


@dataclass(frozen=True, kw_only=True)
class TrainingOptions(FittingOptions):
    """How a network is trained."""

    learning_rate: float | None = None
    """Highest learning rate; by default 0.01 with sgd and 0.001 with adamw."""

    sgd_rate: ClassVar[float] = 0.01
    """Learning rate of SGD unless asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.learning_rate is not None:
            positive(self, "learning_rate")
        only_with(self, self.epochs > 0, _EPOCHS, "learning_rate")

    def training_settings(self, seed: int) -> TrainingSettings:
        """The same, as :func:`prunegym.pruning.training.train_network` takes it.

        Args:
            seed: Of the order of the images, their augmentation and dropout.
        """
        from prunegym.pruning.training import TrainingSettings

        adamw = self.optimizer == "adamw"
        asked = {one.name: getattr(self, one.name) for one in fields(TrainingSettings) if hasattr(self, one.name)}
        given = {name: value for name, value in asked.items() if value is not None}
        defaults = {
            "learning_rate": _ADAMW_RATE if adamw else self.sgd_rate,
            "weight_decay": _ADAMW_DECAY if adamw else _SGD_DECAY,
        }
        return TrainingSettings(**{**defaults, **given, "seed": seed})


@dataclass(frozen=True, kw_only=True)
class DistillationOptions(Options):
    """How a pruned network imitates the unpruned one."""

    distill: bool = False
    """Let the pruned network imitate the unpruned one while it is fine-tuned."""
    distillation_weight: float = 0.9
    """Share of the imitation in the loss."""
    temperature: float = 4.0
    """Softens the outputs that are imitated."""

    def __post_init__(self) -> None:
        super().__post_init__()
        weight = self.distillation_weight
        require(0 <= weight <= 1, "distillation-weight", "in [0, 1]", weight)
        positive(self, "temperature")
        only_with(self, self.distill, "--distill", "distillation_weight", "temperature")
        only_with(self, getattr(self, "epochs", 1) > 0, _EPOCHS, "distill")
