from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from prunegym.agents.configuration.config import PretrainConfig
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.experiments import fitting
from prunegym.experiments.fitting import complete_rows, note_epoch
from prunegym.experiments.pretrain import PretrainResult, pretrain, save_weights
from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.errors import PruningError
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import EpochRow, evaluate_network

ROWS = [EpochRow(epoch, 0.1, 1.0, 0.5, 0.0) for epoch in (1, 2, 3)]


@pytest.fixture(scope="module")
def task() -> ClassificationTask:
    """Few digits to train on."""
    return ClassificationTask(load_data("digits", sizes={"train": 128}))


def trained(folder: Path, task: ClassificationTask, **changes: Any) -> PretrainResult:
    """A network trained for a moment."""
    folder.mkdir(exist_ok=True)
    config = PretrainConfig(network="digits_vgg", **{"epochs": 2, "batch_size": 32, **changes})
    return pretrain(build_network("digits_vgg"), task, config, RunFolder(folder), progress=False)


def test_weights_fit_the_network_and_give_the_accuracy_that_was_told(tmp_path: Path, task: ClassificationTask) -> None:
    """The file is what `--weights` takes."""
    result = trained(tmp_path, task)

    model = build_network("digits_vgg", weights=result.weights, seed=9)
    assert evaluate_network(model, task, "test").score == result.test_score
    assert [row["epoch"] for row in RunFolder(tmp_path).read_rows("metrics.csv")] == [1, 2]


def test_interrupted_training_goes_on_to_the_same_weights(
    tmp_path: Path, task: ClassificationTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the checkpoint of the first epoch and its row in the table: the second is left to do."""
    whole = trained(tmp_path / "whole", task)
    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_row", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trained(tmp_path / "cut", task)

    done: list[int] = []
    monkeypatch.setattr(fitting, "note_epoch", lambda run, row, **_: done.append(row.epoch))
    again = trained(tmp_path / "cut", task)

    assert done == [2]
    before, after = load_file(whole.weights), load_file(again.weights)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert again.test_score == whole.test_score
    assert [row["epoch"] for row in RunFolder(tmp_path / "cut").read_rows("metrics.csv")] == [1, 2]


@pytest.mark.parametrize("present", [[], ROWS[:1], ROWS[1:], ROWS])
def test_table_is_completed_whatever_is_missing(tmp_path: Path, present: list[EpochRow]) -> None:
    """One row per epoch, in order, the same bytes as without an interruption; seconds stand apart."""
    whole, run = (RunFolder(tmp_path / name) for name in ("whole", "cut"))
    for folder, rows in ((whole, ROWS), (run, present)):
        folder.folder.mkdir()
        for row in rows:
            note_epoch(folder, row)

    complete_rows(run, [replace(row, seconds=7.0) for row in ROWS])

    assert run.path("metrics.csv").read_bytes() == whole.path("metrics.csv").read_bytes()
    assert [row["epoch"] for row in run.read_rows("timing.csv")] == [1, 2, 3]
    assert "seconds" not in run.read_rows("metrics.csv")[0]


def test_weights_of_tied_tensors_are_written(tmp_path: Path) -> None:
    """The format refuses tensors that share memory."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Linear(3, 3))
    model[1].weight = model[0].weight

    save_weights(tmp_path / "model.safetensors", model)

    assert torch.equal(load_file(tmp_path / "model.safetensors")["1.weight"], model[0].weight)


def test_loss_that_explodes_is_refused_with_a_remedy(tmp_path: Path, task: ClassificationTask) -> None:
    """One error, and the first checkpoint is kept."""
    with pytest.raises(PruningError, match=r"`learning_rate` should be low enough .*Lower it"):
        trained(tmp_path, task, learning_rate=1e30)
