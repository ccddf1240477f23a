"""Prune a network of your own: train it, keep 40 % of its MACs, save the smaller one, and load it again.

python examples/prune_your_network.py
"""

import sys
from pathlib import Path

import torch
from torch import nn

import prunegym
from prunegym.pruning.training import TrainingSettings, train_network

folder = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/prune_your_network")

# the handwritten digits of scikit-learn, 8x8 pixels; any images will do, as tensors or as a folder
task = prunegym.ClassificationTask(prunegym.load_data("digits"))


def network() -> nn.Module:
    """Two convolutions and two linear layers."""
    return nn.Sequential(
        *(nn.Conv2d(1, 24, 3, padding=1), nn.BatchNorm2d(24), nn.ReLU(), nn.MaxPool2d(2)),
        *(nn.Conv2d(24, 48, 3, padding=1), nn.BatchNorm2d(48), nn.ReLU(), nn.AdaptiveAvgPool2d(1)),
        *(nn.Flatten(), nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 10)),
    )


torch.manual_seed(0)
model = network()
train_network(model, task, TrainingSettings(epochs=8, learning_rate=0.05))

# 40 plans by CMA-ES; each is scored after its layers have been fitted to those of the unpruned network
result = prunegym.prune(model, task, "macs:0.4", searcher="cmaes_prior", evaluations=40, epochs=0)
print(result.scores, f"{result.after.macs:,} of {result.before.macs:,} MACs")

prunegym.save(result, folder)
smaller = prunegym.load(folder, model=network())
print(smaller)
