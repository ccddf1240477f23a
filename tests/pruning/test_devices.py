"""Where a training runs: precision, and processes that work together."""

import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import Precision
from torch import Tensor, nn

from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import EpochRow, TrainingSettings, check_devices, devices, train_network
from prunegym.pruning.training.batches import Pass, count_steps
from prunegym.pruning.training.checkpoint import generator_states
from prunegym.pruning.training.devices import Autocast, launch, one_device, precision_for, several_devices

CPU = torch.device("cpu")


def test_precision_is_single_unless_asked_for() -> None:
    """bfloat16 on a processor."""
    assert type(precision_for(CPU, amp=False)) is Precision
    assert precision_for(CPU, amp=True).precision == "bf16-mixed"


@pytest.mark.parametrize(("modern", "expected"), [(True, "bf16-mixed"), (False, "16-mixed")])
def test_old_graphics_card_computes_in_float16(modern: bool, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 would be emulated, slower than float32."""
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: modern or including_emulation)
    monkeypatch.setattr(torch.amp, "GradScaler", lambda device: device)  # there need not be a card here

    assert precision_for(torch.device("cuda"), amp=True).precision == expected


def test_inputs_and_outputs_stay_as_they_are() -> None:
    """What autocast leaves in float32 should not have been rounded before."""
    precision = precision_for(CPU, amp=True)
    numbers = torch.tensor([1.0009765625])

    assert precision.convert_input(numbers) is numbers
    assert precision.convert_output(numbers) is numbers


def test_scaled_float16_losses_train_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The scale grows and is part of the checkpoint; gradients are clipped at their own size."""
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=3)
    monkeypatch.setattr(devices, "precision_for", lambda device, amp: Autocast("16-mixed", "cpu", scaler))
    task = ClassificationTask(load_data("digits", sizes={"train": 64}))
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    start = model[1].weight.detach().clone()
    settings = TrainingSettings(
        epochs=2, batch_size=16, learning_rate=0.1, momentum=0.0, weight_decay=0.0, clip_grad=1e-3, amp=True
    )

    train_network(model, task, settings, checkpoint=tmp_path / "c.pt")

    assert scaler.get_scale() == 1024.0 * 2 ** (8 // 3)
    state = torch.load(tmp_path / "c.pt", weights_only=True)
    assert state["precision"]["scale"] == scaler.get_scale()
    assert 0 < float((model[1].weight - start).norm().detach()) <= 8 * 0.1 * 1e-3


def test_any_kind_of_device_can_be_alone() -> None:
    """Fabric knows few kinds; it is not asked to move anything."""
    assert one_device(torch.device("meta"), amp=False).device == torch.device("meta")


@pytest.mark.parametrize(
    ("device", "count", "message"),
    [
        ("meta", 2, "`devices` should be 1 with device meta. Received 2. Lower it"),
        ("cuda", 64, r"`devices` should be at most \d+ with device cuda. Received 64"),
        ("cuda:1", 2, "`devices` should be 1 with device cuda:1. Received 2. Name the kind of device without"),
    ],
)
def test_more_devices_than_there_are_are_refused(device: str, count: int, message: str) -> None:
    """Before a process is started; as many processes as one likes may share a processor."""
    check_devices(CPU, 64)
    with pytest.raises(PruningError, match=message):
        check_devices(torch.device(device), count)


def test_what_cannot_be_sent_to_other_processes_is_refused() -> None:
    """The message names it and what to do."""
    with pytest.raises(PruningError, match="Received 2 with something that Python cannot pickle.*open files, locks"):
        launch(several_devices(CPU, 2, amp=False), _note, threading.Lock())

    assert "MASTER_PORT" not in os.environ


def test_tensors_are_sent_in_shared_memory() -> None:
    """A data set is not copied for each process."""
    _, (data,) = devices.Parcel({"images": torch.zeros(10**6)}).__reduce__()

    assert len(data) < 10**4


def _note(fabric: Fabric, job: Any) -> None:
    """Do nothing."""


USER_CODE = """
from beside_mine import WIDTH, rectified
from torch import nn

class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(1, WIDTH, 3), nn.BatchNorm2d(WIDTH), nn.Linear(WIDTH, 10)
        self.unused = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(rectified(self.norm(self.body(images))).mean((2, 3)))

def net():
    return Small()
"""


def _append(path: Path, row: EpochRow) -> None:
    """Write down an epoch."""
    with path.open("a") as file:
        file.write(f"{row.epoch} {os.getpid()}\n")


@pytest.mark.slow
def test_two_processes_do_what_one_does_with_accumulated_steps(tmp_path: Path) -> None:
    """Up to rounding, for a network of the user's file; running statistics are those of the first device's batches.

    The file imports another beside it, and is gone by the time that the processes begin.
    """
    (tmp_path / "mine.py").write_text(USER_CODE)
    (tmp_path / "beside_mine.py").write_text("WIDTH = 6\n\ndef rectified(x):\n    return x.relu()\n")
    task = ClassificationTask(load_data("digits", sizes={"train": 96}))
    options: dict[str, Any] = {"epochs": 2, "batch_size": 16, "learning_rate": 0.05, "clip_grad": 1.0, "ema": 0.5}
    alone, together = (build_network(f"{tmp_path / 'mine.py'}:net") for _ in range(2))
    for name in ("mine.py", "beside_mine.py"):
        (tmp_path / name).unlink()
    expected = train_network(alone, task, TrainingSettings(**options, accumulate=2))

    rows = train_network(
        together,
        task,
        TrainingSettings(**options, devices=2),
        on_epoch=partial(_append, tmp_path / "rows"),
        checkpoint=tmp_path / "c.pt",
    )

    for (name, mine), theirs in zip(alone.named_parameters(), together.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6), name
    for one, other in zip(rows, expected, strict=True):
        assert (one.epoch, one.learning_rate) == (other.epoch, other.learning_rate)
        assert (one.loss, one.score) == (pytest.approx(other.loss, rel=1e-5), pytest.approx(other.score))
    written = [line.split() for line in (tmp_path / "rows").read_text().splitlines()]
    assert [epoch for epoch, _ in written] == ["1", "2"]
    assert str(os.getpid()) not in {process for _, process in written}
    assert not together.training


@pytest.mark.slow
def test_interrupted_processes_go_on_to_the_same_weights(tmp_path: Path) -> None:
    """After the first of two epochs; dropout goes on in each of them."""
    task = ClassificationTask(load_data("digits", sizes={"train": 96}))
    settings = TrainingSettings(epochs=2, batch_size=16, learning_rate=0.05, devices=2)
    whole, cut, resumed = (_with_dropout() for _ in range(3))
    expected = train_network(whole, task, settings)
    with pytest.raises(PruningError, match="stopped on purpose"):
        train_network(cut, task, settings, checkpoint=tmp_path / "c.pt", on_epoch=_stop)

    rows = train_network(resumed, task, settings, checkpoint=tmp_path / "c.pt")

    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    assert [{**asdict(row), "seconds": 0} for row in rows] == [{**asdict(row), "seconds": 0} for row in expected]


def _stop(row: EpochRow) -> None:
    """An error of ours in one of the processes."""
    raise PruningError("stopped on purpose")


def _with_dropout() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))


@pytest.mark.slow
def test_process_that_dies_ends_the_training_with_a_message() -> None:
    """As the system's killer of memory hogs does it."""
    task = ClassificationTask(load_data("digits", sizes={"train": 64}))
    settings = TrainingSettings(epochs=1, batch_size=16, devices=2)

    with pytest.raises(PruningError, match="`devices` should be processes that live. Received 2, one of which ended"):
        train_network(_with_dropout(), task, settings, on_epoch=_die)


def _die(row: EpochRow) -> None:
    os.kill(os.getpid(), 9)


class Numbers:
    """A task of one's own that gives all of its batches to every device."""

    name, fingerprint = "numbers", "numbers-1"

    def batches(self, split: str, *, batch_size: int, **_: Any) -> Iterator[tuple[Tensor, Tensor]]:
        for number in range(7):
            yield torch.full((batch_size, 1), float(number)), torch.zeros(batch_size, 1)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return (outputs - targets).square().mean()

    def score(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return -outputs[:, 0]


def test_devices_share_the_batches_of_a_pass() -> None:
    """Each takes every second one; the incomplete last step is left out, whatever was done before."""
    settings = TrainingSettings(epochs=1, batch_size=2, devices=2)
    steps = count_steps(Numbers(), settings)

    def given(rank: int, done: int) -> list[float]:
        one = Pass(Numbers(), settings, steps, CPU, rank, torch.Generator(), generator_states(CPU))
        return [float(inputs[0]) for inputs, _ in one.batches(done)]

    assert steps == 3
    assert given(0, 0) == [0, 2, 4]
    assert given(1, 0) == [1, 3, 5]
    assert given(0, 1) == [2, 4]
    assert given(1, 2) == [5]
