"""A task that is no classification: find the centre of a bright disk, and prune by how near the answer is.

python examples/your_own_task.py
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import prunegym
from prunegym.pruning.training import TrainingSettings, train_network

SIZE = 16


def pictures(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Images ``(N, 1, 16, 16)`` of disks in noise, and their centres ``(N, 2)`` in [0, 1]."""
    draw = np.random.default_rng(seed)
    centres = draw.uniform(0.2, 0.8, (count, 2))
    rows, columns = np.mgrid[:SIZE, :SIZE] / SIZE
    distances = (rows - centres[:, :1, None]) ** 2 + (columns - centres[:, 1:, None]) ** 2
    images = (distances < 0.02) + draw.normal(0, 0.3, (count, SIZE, SIZE))
    return torch.from_numpy(images).float().unsqueeze(1), torch.from_numpy(centres).float()


class Centres:
    """Batches, a loss and a score: all that prunegym asks of a task."""

    name = "centres"
    fingerprint = "disks 16x16, version 1"  # scores are remembered under this text

    def __init__(self) -> None:
        sizes = {"train": 2000, "calibration": 256, "reward": 256, "selection": 500, "test": 500}
        self.splits = {name: pictures(size, seed) for seed, (name, size) in enumerate(sizes.items())}

    def batches(
        self,
        split: str,
        *,
        batch_size: int,
        limit: int | None = None,
        train: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of a split, shuffled where a network is trained."""
        images, centres = (one[:limit] for one in self.splits[split])
        order = torch.randperm(len(images), generator=generator) if train else torch.arange(len(images))
        for rows in order.split(batch_size):
            yield images[rows].to(device), centres[rows].to(device)

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        """Mean squared distance."""
        return F.mse_loss(outputs.float(), targets)

    def score(self, outputs: Any, targets: Any) -> Tensor:
        """Nearness of each answer ``(B,)``: 1 for the right place."""
        return torch.exp(-10 * (outputs.float() - targets).norm(dim=1))


task = Centres()
torch.manual_seed(0)
model = nn.Sequential(
    *(nn.Conv2d(1, 16, 5, 2, 2), nn.BatchNorm2d(16), nn.ReLU()),
    *(nn.Conv2d(16, 32, 3, 2, 1), nn.BatchNorm2d(32), nn.ReLU()),
    *(nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 2)),
)
train_network(model, task, TrainingSettings(epochs=10, learning_rate=0.05))

result = prunegym.prune(model, task, "macs:0.5", searcher="prior", evaluations=3, epochs=0)
print(result.scores)
