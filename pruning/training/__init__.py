"""Training, fine-tuning and measuring networks.

The schedule is fixed beforehand and the last epoch counts: no split is looked at to choose one.
"""

from prunegym.pruning.measuring import Measurement, compare_networks, evaluate_network
from prunegym.pruning.training.check import check_devices, check_pruned_training, check_training
from prunegym.pruning.training.checkpoint import weights_digest
from prunegym.pruning.training.distillation import distillation_loss
from prunegym.pruning.training.loop import EpochRow
from prunegym.pruning.training.settings import TrainingSettings
from prunegym.pruning.training.train import train_network

__all__ = [
    "EpochRow",
    "Measurement",
    "TrainingSettings",
    "check_devices",
    "check_pruned_training",
    "check_training",
    "compare_networks",
    "distillation_loss",
    "evaluate_network",
    "train_network",
    "weights_digest",
]
