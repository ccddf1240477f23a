"""What would stop a training is found before a search."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import prunegym
from prunegym.commands import api, network_commands
from prunegym.commands.cli import main
from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import TrainingSettings, check_pruned_training, check_training, train_network


@pytest.fixture(scope="module")
def short() -> ClassificationTask:
    """Few digits."""
    return ClassificationTask(load_data("digits", sizes={"train": 64}))


def flat() -> nn.Module:
    """Normalisation of single numbers, which needs two examples; and dropout."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 10))


class Listed(nn.Module):
    """Returns a list."""

    def __init__(self) -> None:
        super().__init__()
        self.body = flat()

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        return [self.body(images)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accumulate": 5}, "`accumulate` times `devices` should be at most the 4 batches of an epoch. Received 5"),
        ({"batch_size": 1}, "`network` should learn.* Received 'digits' in batches of 1, .*more than 1 value"),
        ({"model": flat().requires_grad_(False)}, "`model` should have parameters that require a gradient"),
        ({"model": nn.Flatten()}, "`model` should have parameters that require a gradient"),
        ({"model": build_network("digits_vgg", num_classes=7)}, r"one output per class: \(B, 10\)"),
        ({"teacher": build_network("digits_vgg", num_classes=7)}, r"`teacher` should .*\(16, 7\) for \(16, 10\)"),
        ({"teacher": Listed()}, r"`teacher` should return one tensor .*Received list for \(16, 10\)"),
        ({"device": "meta", "devices": 2}, "`devices` should be 1 with device meta"),
    ],
)
def test_training_that_cannot_be_is_refused(short: ClassificationTask, change: dict[str, Any], message: str) -> None:
    """As the training itself would, or with what the network raised."""
    given = {name: change.pop(name) for name in ("model", "teacher", "device") if name in change}
    settings = TrainingSettings(epochs=1, **{"batch_size": 16, **change})

    with pytest.raises(PruningError, match=message):
        check_training(given.pop("model", flat()), short, settings, **given)


def test_smoothing_of_another_loss_and_absent_batches_are_refused() -> None:
    """Of a task of one's own."""

    class Empty:
        name, fingerprint = "empty", "empty-1"

        def batches(self, split: str, **_: Any) -> list[Any]:
            return []

    task: Any = Empty()
    with pytest.raises(PruningError, match="`label_smoothing` should be 0 for a task of one's own"):
        check_training(flat(), task, TrainingSettings(epochs=1, label_smoothing=0.1))
    with pytest.raises(PruningError, match="`task` should give training batches. Received 'empty'.* Let its method"):
        check_training(flat(), task, TrainingSettings(epochs=1))


def test_check_changes_nothing(short: ClassificationTask) -> None:
    """Neither weights nor statistics nor modes, of network and teacher, nor the global generators."""
    model, teacher = flat().eval(), flat()
    before = [{name: value.clone() for name, value in one.state_dict().items()} for one in (model, teacher)]
    state = torch.get_rng_state()

    check_training(model, short, TrainingSettings(epochs=1, batch_size=16, ema=0.9), teacher=teacher)

    for one, values in zip((model, teacher), before, strict=True):
        assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())
    assert not model.training
    assert teacher.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def search(*_: Any, **__: Any) -> None:
    """What should not begin."""
    raise AssertionError("the search has begun")


FEW = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "16", "--device", "cpu"]


def test_command_refuses_before_the_search(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And leaves no folder."""
    monkeypatch.setattr(network_commands, "find_plan", search)
    flags = ["prune", "--network", "digits_vgg", *FEW, "--accumulate", "1000", "--out", str(tmp_path / "run")]

    assert main(flags) == 2

    assert "`accumulate` times `devices` should be at most" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["pretrain", "finetune"])
def test_command_that_trains_leaves_no_folder(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where its training cannot be."""
    flags = ["--network", "digits_vgg", "--device", "cpu", "--accumulate", "1000", "--out", str(tmp_path / "run")]

    assert main([command, *flags]) == 2

    assert "`accumulate` times `devices` should be at most" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_python_face_refuses_before_the_search(
    toys: Callable[[str], PrunableNetwork],
    task_for: Callable[[PrunableNetwork], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A network of several outputs cannot be imitated as it is."""
    monkeypatch.setattr(api, "find_plan", search)
    network = toys("dict_output")

    with pytest.raises(PruningError, match="`teacher` should return one tensor"):
        prunegym.prune(network.model, task_for(network), epochs=1, batch_size=32, distill=True, device="cpu")


def test_comparison_refuses_before_the_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever would be compared."""
    monkeypatch.setattr("prunegym.experiments.comparison.command.compare", search)
    flags = ["--network", "digits_vgg", *FEW, "--searcher", "uniform", "--epochs", "1", "--accumulate", "1000"]

    assert main(["compare", *flags, "--out", str(tmp_path / "run")]) == 2

    assert "`accumulate` times `devices` should be at most" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Regularised(nn.Module):
    """A branch that only training runs, so that it is not traced."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 6, 3)
        self.branch, self.head = nn.Conv2d(8, 8, 1), nn.Linear(6, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.first(images).relu()
        if self.training:
            maps = maps + 0.1 * self.branch(maps)
        logits: torch.Tensor = self.head(self.second(maps).relu().mean((2, 3)))
        return logits


def halved(*keep: str) -> tuple[PrunableNetwork, PruningPlan]:
    """The network without some of its groups, and a plan of half of each other group."""
    network = PrunableNetwork(Regularised(), torch.randn(2, 1, 8, 8), name="regularised", keep=keep)
    return network, PruningPlan.from_counts(network.graph, network.graph.sizes // 2)


def test_branch_of_training_is_found_by_a_smaller_network(short: ClassificationTask) -> None:
    """The message names what the branch reads; with that kept, it can be trained."""
    settings = TrainingSettings(epochs=1, batch_size=16)
    network, plan = halved()
    check_training(network.model, short, settings)

    with pytest.raises(PruningError, match="Received regularised, which raised RuntimeError.* Use --keep 'first', or"):
        check_pruned_training(network, plan, short, settings)
    with pytest.raises(PruningError, match="`network` should learn in training mode.* raised RuntimeError: "):
        train_network(network.pruned(plan), short, settings)

    kept, smaller = halved("first")
    state = {name: value.clone() for name, value in kept.model.state_dict().items()}
    check_pruned_training(kept, smaller, short, settings)
    assert all(torch.equal(value, state[name]) for name, value in kept.model.state_dict().items())
    assert all(parameter.grad is None for parameter in kept.model.parameters())


def test_branch_of_training_is_refused_before_the_search(
    short: ClassificationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it, what it found would be lost."""
    monkeypatch.setattr(api, "find_plan", search)
    few = {"statistics_examples": 16, "recovery_examples": 16, "reward_examples": 16, "device": "cpu"}

    with pytest.raises(PruningError, match="Use --keep 'first', or a network without that branch; or do not fine-tune"):
        prunegym.prune(Regularised(), short, epochs=1, batch_size=16, **few)
