"""An interrupted training ends as if nothing had happened, to the last bit."""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import TrainingSettings, train_network
from prunegym.pruning.training.checkpoint import Checkpoint

#: Everything that has a state: moments, the average, the order of images and their augmentation, dropout, statistics.
EVERYTHING: dict[str, Any] = {
    "optimizer": "adamw",
    "learning_rate": 0.01,
    "accumulate": 2,
    "ema": 0.8,
    "clip_grad": 1.0,
    "label_smoothing": 0.1,
}
#: Losses of an epoch of 96 digits in batches of 16.
BATCHES = 6


@dataclass(frozen=True)
class Interrupted(ClassificationTask):
    """Digits whose loss can only be asked for so many times."""

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """The loss, or an interruption."""
        COUNT["losses"] += 1
        if COUNT["losses"] > COUNT["allowed"]:
            raise KeyboardInterrupt
        return super().loss(outputs, targets)


COUNT = {"losses": 0, "allowed": 0}


def allow(losses: int) -> None:
    """Interrupt after so many batches."""
    COUNT.update(losses=0, allowed=losses)


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Few digits."""
    return Interrupted(load_data("digits", sizes={"train": BATCHES * 16}))


def network(seed: int = 0) -> nn.Module:
    """Batch normalisation, and dropout, which draws from the global generator."""
    torch.manual_seed(seed)
    layers = [nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5), nn.Linear(216, 10)]
    return nn.Sequential(*layers)


def rows_of(rows: Any) -> list[dict[str, Any]]:
    """Rows without the time they took."""
    return [{key: value for key, value in asdict(row).items() if key != "seconds"} for row in rows]


@pytest.mark.parametrize("changes", [{}, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize("losses", [2, BATCHES - 1, BATCHES, BATCHES + 3, 2 * BATCHES + 2])
def test_training_interrupted_at_any_batch_ends_in_the_same_weights(
    task: ClassificationTask, tmp_path: Path, changes: dict[str, Any], losses: int
) -> None:
    """With a checkpoint after each step: within an epoch, at its end, and with a half accumulated step.

    The weights that it goes on from are those of the checkpoint, and nothing that was kept is done again.
    """
    settings = TrainingSettings(epochs=3, batch_size=16, seed=3, **changes)
    teacher = network(5) if changes else None
    whole, cut, resumed = network(), network(), network(8)
    allow(10**9)
    expected = train_network(whole, task, settings, teacher=teacher)
    options: dict[str, Any] = {"teacher": teacher, "checkpoint": tmp_path / "c.pt", "checkpoint_minutes": 0.0}
    allow(losses)
    with pytest.raises(KeyboardInterrupt):
        train_network(cut, task, settings, **options)
    allow(10**9)
    torch.manual_seed(99)

    rows = train_network(resumed, task, settings, **options)

    kept = losses - losses % settings.accumulate  # whole steps
    assert COUNT["losses"] == 3 * BATCHES - kept
    assert rows_of(rows) == rows_of(expected)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


def test_checkpoints_between_epochs_change_nothing(
    task: ClassificationTask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often they are written."""
    results, written = [], []
    real = Checkpoint.write
    monkeypatch.setattr(Checkpoint, "write", lambda *args: written.append(args) or real(*args))
    for minutes in (0.0, 1000.0):
        allow(10**9)
        written.clear()
        model = network()
        settings = TrainingSettings(epochs=2, batch_size=16, ema=0.9)
        path = tmp_path / f"{minutes}.pt"
        train_network(model, task, settings, checkpoint=path, checkpoint_minutes=minutes)
        results.append(model.state_dict())
        assert len(written) == (2 * BATCHES + 2 if minutes == 0 else 2)

    assert all(torch.equal(value, results[1][name]) for name, value in results[0].items())


class Drawn:
    """A task of one's own, whose noise comes from the global generator."""

    name = "drawn"
    fingerprint = "drawn-1"

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed

    def batches(self, split: str, *, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        """Five batches, new ones each time."""
        for _batch in range(5):
            inputs = torch.randn(batch_size, 6)
            yield inputs, inputs.sum(1, keepdim=True)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Squared error, or an interruption."""
        self.allowed -= 1
        if self.allowed < 0:
            raise KeyboardInterrupt
        return F.mse_loss(outputs, targets)

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Higher is better."""
        return -(outputs - targets).abs()[:, 0]


@pytest.mark.parametrize("allowed", [3, 5, 8])
def test_task_that_draws_from_the_global_generator_resumes_too(allowed: int, tmp_path: Path) -> None:
    """What was skipped leaves no trace in it."""
    settings = TrainingSettings(epochs=3, batch_size=8, learning_rate=0.01)
    torch.manual_seed(1)
    start = nn.Sequential(nn.Linear(6, 4), nn.Dropout(0.3), nn.Linear(4, 1))
    whole, cut, resumed = (copy.deepcopy(start) for _ in range(3))
    train_network(whole, Drawn(10**9), settings)
    options: dict[str, Any] = {"checkpoint": tmp_path / "c.pt", "checkpoint_minutes": 0.0}
    with pytest.raises(KeyboardInterrupt):
        train_network(cut, Drawn(allowed), settings, **options)

    left = Drawn(10**9)
    train_network(resumed, left, settings, **options)

    assert 10**9 - left.allowed == 15 - allowed  # nothing that was kept is done again
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
