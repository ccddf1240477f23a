"""Recovery: what follows pruning. Compensation, recalibration, reconstruction, distillation."""

from prunegym.pruning.recovery.compensation import compensated_tensors
from prunegym.pruning.recovery.divergence import divergence
from prunegym.pruning.recovery.normalisation import recalibrate, recalibrating
from prunegym.pruning.recovery.reconstruction import Reconstruction, reconstruct
from prunegym.pruning.recovery.steps import RECOVERY_BATCH, Teacher, train_steps, training_batches
from prunegym.pruning.recovery.targets import Fitting, Targets, observe_targets

__all__ = [
    "RECOVERY_BATCH",
    "Fitting",
    "Reconstruction",
    "Targets",
    "Teacher",
    "compensated_tensors",
    "divergence",
    "observe_targets",
    "recalibrate",
    "recalibrating",
    "reconstruct",
    "train_steps",
    "training_batches",
]
