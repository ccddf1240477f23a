"""Run folders read into plain data."""

import json
import shutil
from pathlib import Path

import pytest

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.pruning.errors import PruningError
from prunegym.reporting.gather import gather


def test_folders_are_read_in_order_and_once(pruning_runs: dict[str, Path]) -> None:
    """Whatever names a folder is given by."""
    train, prune = pruning_runs["train"], pruning_runs["prune"]
    runs = gather([prune, train, train / ".." / "train"])

    assert [(run.command, run.name) for run in runs] == [("prune", "prune"), ("train", "train")]
    assert runs[0].result == RunFolder(prune).read_json("result.json")


def test_plans_are_named_as_in_tables(pruning_runs: dict[str, Path]) -> None:
    """A training's own plan is the policy's; those of a comparison are in files of their own."""
    train, compare, prune = gather([pruning_runs[name] for name in ("train", "compare", "prune")])
    stored = json.loads((pruning_runs["train"] / "plan.json").read_text())
    path = next(row["plan"] for row in compare.rows if row["searcher"] == "random")

    assert train.plans["policy"] == stored["own"]
    assert train.plans["best sampled"] == stored["best"]
    assert compare.plans["random"]["digits_resnet macs:0.5"] == json.loads((compare.folder / path).read_text())
    assert prune.plans == {}


def test_learning_curves_are_found_in_training_and_comparison(pruning_runs: dict[str, Path]) -> None:
    """One per seed."""
    train, compare = gather([pruning_runs["train"], pruning_runs["compare"]])

    assert [(one.network, one.budget, one.seed) for one in compare.trainings] == [
        ("digits_resnet", "macs:0.5", 0),
        ("digits_resnet", "macs:0.5", 1),
    ]
    assert list(train.trainings[0].metrics) == RunFolder(train.folder).read_rows("metrics.csv")


def test_images_of_each_split_are_counted(pruning_runs: dict[str, Path]) -> None:
    """All 1,797 digits are in one of them."""
    (run,) = gather([pruning_runs["train"]])

    assert sum(run.examples.values()) == 1797


def test_steps_of_a_demonstration_are_runs_too(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """They lie in its folder, each with its own configuration."""
    demo = tmp_path / "demo"
    RunFolder.create(demo, network="n", searcher="demo", budget="b", seed=0, config={}, command="demo")
    shutil.copytree(pruning_runs["prune"], demo / "prune_policy")

    assert [run.name for run in gather([demo])] == ["demo", "prune_policy"]


def test_runs_of_one_name_are_told_apart(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """By as much of their path as it takes."""
    for parent in ("a", "b"):
        shutil.copytree(pruning_runs["prune"], tmp_path / parent / "prune")

    assert [run.name for run in gather([tmp_path / "a" / "prune", tmp_path / "b" / "prune"])] == ["a/prune", "b/prune"]


def test_run_that_is_not_finished_is_read_as_far_as_it_went(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """A report of a run that is still going on is fair."""
    folder = tmp_path / "prune"
    folder.mkdir()
    shutil.copy(pruning_runs["prune"] / "config.json", folder)

    (run,) = gather([folder])
    assert run.result is None
    assert run.networks == []


def test_what_was_measured_in_time_is_read_from_a_table_of_its_own(pruning_runs: dict[str, Path]) -> None:
    """By the same key; the table of rows is the same for the same seed and has none of it."""
    folder = RunFolder(pruning_runs["compare"])
    (run,) = gather([pruning_runs["compare"]])

    assert "seconds" not in folder.read_rows("rows.csv")[0]
    assert [row["seconds"] for row in run.rows] == [row["seconds"] for row in folder.read_rows("rows_timing.csv")]
    assert all(row["latency_ratio"] > 0 for row in run.rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, r"`RUN` should be a run folder. Received '.*' \(there is no such folder\). Give the folder"),
        ("", r"\(there is no config.json in it\)"),
        ("{", r"`RUN` should lead to a readable JSON file"),
        ('{"command": 3}', "whose config.json does not say of which command. Choose another folder"),
        ("[]", "whose config.json does not say"),
    ],
)
def test_what_is_no_run_is_refused(content: str | None, message: str, tmp_path: Path) -> None:
    """With what was found and what to do."""
    folder = tmp_path / "run"
    if content is not None:
        folder.mkdir()
    if content:
        (folder / "config.json").write_text(content)

    with pytest.raises(PruningError, match=message):
        gather([folder])


def test_no_folder_is_refused() -> None:
    """There is nothing to report."""
    with pytest.raises(PruningError, match="`RUN` should be at least one run folder. Received none"):
        gather([])


def test_damaged_splits_are_refused(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """They are the only file that is neither JSON nor a table; nothing in it is unpickled."""
    folder = shutil.copytree(pruning_runs["prune"], tmp_path / "run")
    (folder / "splits.npz").write_bytes(b"PK rubbish")

    with pytest.raises(PruningError, match="`RUN` should hold whole files"):
        gather([folder])


def test_plans_outside_of_the_folder_are_not_read(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """A table of a stranger may name any path."""
    folder = shutil.copytree(pruning_runs["compare"], tmp_path / "run")
    path = str(RunFolder(folder).read_rows("rows.csv")[0]["plan"])
    shutil.copy(folder / path, tmp_path / "outside.json")
    (folder / "rows.csv").write_text((folder / "rows.csv").read_text().replace(path, "../outside.json"))

    (run,) = gather([folder])
    assert run.plans["uniform"] == {}
    assert run.plans["random"] != {}
