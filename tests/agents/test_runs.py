import errno
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prunegym.agents.run_folders import runs
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.pruning.errors import PruningError


@dataclass(frozen=True)
class TrainConfig:
    budget: str = "macs:0.5"
    steps: int = 10
    device: str = "cpu"
    out: Path | None = None


def create(out: Path | None, config: TrainConfig | None = None, **changes: Any) -> RunFolder:
    """A run with settings that the tests need not care about."""
    settings = {"network": "resnet20", "searcher": "ppo", "budget": "macs:0.5", "seed": 0, **changes}
    return RunFolder.create(out, config=config or TrainConfig(), **settings)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """A new run."""
    return create(tmp_path / "run")


@pytest.fixture
def full_disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, nothing reaches the disk any more."""

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    return lambda: monkeypatch.setattr(os, "fsync", fail)


def test_default_folder_is_named_after_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name can be read and holds no character that a shell or a file system minds."""
    monkeypatch.chdir(tmp_path)

    run = create(None, network=["my/nets.py:small", "vgg__19"], seed=3)

    pattern = r"runs/my-nets\.py-small\+vgg_19__ppo__bmacs-0\.5__s3__\d{8}-\d{6}"
    assert not run.resumed
    assert run.folder.is_dir()
    assert re.fullmatch(pattern, run.folder.as_posix())


def test_runs_of_one_second_get_different_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two searches started by one script must not write into each other."""
    monkeypatch.chdir(tmp_path)

    folders = {create(None).folder for _ in range(3)}

    assert len(folders) == 3


def test_very_long_names_fit_into_a_file_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten networks with paths would pass the limit of 255 bytes."""
    monkeypatch.chdir(tmp_path)

    assert len(create(None, network=["deep/folder/net.py:f"] * 40).folder.name) < 255


def test_config_holds_the_command_and_all_settings(run: RunFolder) -> None:
    """What was asked can be read from the folder alone."""
    assert run.read_json("config.json") == {
        "command": "train",
        "network": ["resnet20"],
        "searcher": "ppo",
        "budget": "macs:0.5",
        "seed": 0,
        "config": {"budget": "macs:0.5", "steps": 10, "device": "cpu", "out": None},
    }


def test_environment_says_what_ran_and_where(run: RunFolder) -> None:
    """A number can be traced to the code, the libraries and the machine that made it."""
    env = run.read_json("env.json")

    assert {"started", "command", "git", "versions", "device", "cpu", "threads"} <= set(env)
    for library in ["python", "torch", "torchvision", "gymnasium", "stable-baselines3", "torch-geometric"]:
        assert env["versions"][library]
    assert env["versions"]["torch"] == torch.__version__
    assert env["device"] == "cpu"
    assert env["cpu"]


def test_same_run_is_resumed_with_its_rows(run: RunFolder) -> None:
    """The command repeated with the folder goes on where it stopped; where it was resumed is noted."""
    run.append_row("metrics.csv", {"step": 1})
    started = run.read_json("env.json")["started"]

    again = create(run.folder)

    env = again.read_json("env.json")
    assert again.resumed
    assert again.read_rows("metrics.csv") == [{"step": 1}]
    assert env["started"] == started
    assert len(env["resumed"]) == 1


def test_run_killed_before_its_environment_was_written_is_resumed(run: RunFolder) -> None:
    """config.json is written first, so a folder with nothing else is still this run's."""
    run.path("env.json").unlink()

    assert create(run.folder).resumed
    assert run.path("env.json").exists()


def test_place_of_the_output_does_not_make_another_run(run: RunFolder) -> None:
    """A folder may be moved, or named in another way, before it is resumed."""
    assert create(run.folder, TrainConfig(out=Path("elsewhere"))).resumed


@pytest.mark.parametrize(
    ("changes", "difference"),
    [
        ({"seed": 1}, "seed was 0 and is 1"),
        ({"network": "vgg"}, r"network was \['resnet20'\] and is \['vgg'\]"),
        ({"config": replace(TrainConfig(), steps=20)}, "config.steps was 10 and is 20"),
        ({"command": "transfer"}, "command was 'train' and is 'transfer'"),
    ],
)
def test_folder_of_another_run_is_refused(run: RunFolder, changes: dict[str, Any], difference: str) -> None:
    """Rows of two configurations in one table could not be told apart; the message names what differs."""
    before = sorted((path.name, path.read_bytes()) for path in run.folder.iterdir())

    with pytest.raises(PruningError, match=rf"`--out` should be .*config.json differs: {difference}"):
        create(run.folder, **changes)

    assert sorted((path.name, path.read_bytes()) for path in run.folder.iterdir()) == before


def test_run_is_extended_in_the_fields_that_allow_it(run: RunFolder) -> None:
    """config.json keeps the latest; other fields are compared as ever."""
    longer = replace(TrainConfig(), steps=20)

    again = create(run.folder, longer, extendable=("steps", "network"), network="vgg")

    assert again.resumed
    assert again.read_json("config.json")["config"]["steps"] == 20
    with pytest.raises(PruningError, match="seed was 0 and is 1$|seed was 0 and is 1[;.]"):
        create(run.folder, longer, extendable=("steps", "network"), seed=1)


def test_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    """`--out ~` must not fill somebody's home."""
    (tmp_path / "thesis.tex").touch()

    with pytest.raises(PruningError, match=r"holds 'thesis\.tex' and no config\.json\. Choose another"):
        create(tmp_path)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"config": 1}'])
def test_damaged_config_is_refused(run: RunFolder, content: str) -> None:
    """A folder whose configuration cannot be read is not taken for this run's."""
    run.path("config.json").write_text(content)

    with pytest.raises(PruningError, match="`--out` should"):
        create(run.folder)


def test_folder_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    """Argument, rule, value, remedy."""
    (tmp_path / "file").touch()

    with pytest.raises(PruningError, match=r"`--out` should be a place that.*Received .*Choose"):
        create(tmp_path / "file" / "run")


def test_default_parent_that_is_a_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file called `runs` must not send the search for a free name into an endless loop."""
    monkeypatch.chdir(tmp_path)
    Path("runs").touch()

    with pytest.raises(PruningError, match="`--out` should be a place that can be written to"):
        create(None)


def test_rows_come_back_as_they_were(run: RunFolder) -> None:
    """Numbers exactly, text as text, missing as None, labels that merely look like numbers untouched."""
    rows = [
        {"step": 1, "reward": 1 / 3, "note": 'a, "b"', "done": True, "sha": "12e4567"},
        {"step": 2, "reward": float("-inf"), "note": "007", "done": False, "sha": None},
    ]

    for row in rows:
        run.append_row("metrics.csv", row)

    assert run.read_rows("metrics.csv") == rows


def test_rows_take_arrays_and_tensors_of_one_number(run: RunFolder) -> None:
    """Metrics come from numpy and torch."""
    run.append_row("metrics.csv", {"a": np.float64(0.1), "b": torch.tensor(2), "c": np.bool_(True)})

    assert run.read_rows("metrics.csv") == [{"a": 0.1, "b": 2, "c": True}]


def test_row_is_one_line_even_with_line_breaks_in_it(run: RunFolder) -> None:
    """Recovery after a kill counts lines."""
    run.append_row("metrics.csv", {"note": "one\ntwo"})

    assert run.read_rows("metrics.csv") == [{"note": "one two"}]
    assert run.path("metrics.csv").read_bytes() == b"note\none two\n"


def test_rows_may_leave_columns_out_but_not_bring_new_ones(run: RunFolder) -> None:
    """One header for all rows: tidy."""
    run.append_row("metrics.csv", {"step": 1, "loss": 0.5})
    run.append_row("metrics.csv", {"step": 2})

    with pytest.raises(PruningError, match="should have only the columns of .*Received also accuracy"):
        run.append_row("metrics.csv", {"step": 3, "accuracy": 1.0})

    assert run.read_rows("metrics.csv") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]


@pytest.mark.parametrize("cut", range(1, len("step,loss\n1,0.5\n2,0.25\n")))
def test_table_cut_anywhere_is_continued(tmp_path: Path, cut: int) -> None:
    """A kill may leave any prefix of the file; whole rows are kept, the torn one is written again."""
    whole = b"step,loss\n1,0.5\n2,0.25\n"
    run = RunFolder(tmp_path)
    run.path("metrics.csv").write_bytes(whole[:cut])

    kept = run.read_rows("metrics.csv")
    for row in [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}][len(kept) :]:
        run.append_row("metrics.csv", row)

    assert run.path("metrics.csv").read_bytes() == whole


def test_full_disk_keeps_the_rows_and_adds_no_half(run: RunFolder, full_disk: Callable[[], None]) -> None:
    """What was learned so far stays readable, and the message tells what to do."""
    run.append_row("metrics.csv", {"step": 1})
    full_disk()

    with pytest.raises(PruningError, match=r"`--out` should be .*No space left on device.*Free some space"):
        run.append_row("metrics.csv", {"step": 2})

    assert run.path("metrics.csv").read_bytes() == b"step\n1\n"


def test_full_disk_keeps_the_earlier_json(run: RunFolder, full_disk: Callable[[], None]) -> None:
    """Results are replaced in one step or not at all."""
    run.write_json("result.json", {"accuracy": 0.9})
    full_disk()

    with pytest.raises(PruningError, match="Free some space"):
        run.write_json("result.json", {"accuracy": 0.91})

    assert run.read_json("result.json") == {"accuracy": 0.9}


def test_no_table_has_no_rows(run: RunFolder) -> None:
    """A run that was stopped before its first row reports an empty table."""
    assert run.read_rows("metrics.csv") == []


@pytest.mark.parametrize("content", [b"a,b\n1\n", b"a\n\xff\n", b'a\n"1\n'])
def test_damaged_table_is_refused(run: RunFolder, content: bytes) -> None:
    """Rows are never guessed."""
    run.path("metrics.csv").write_bytes(content)

    with pytest.raises(PruningError, match=r"tables are whole\. Received .*metrics\.csv"):
        run.read_rows("metrics.csv")


def test_not_compared_fields_are_fields_of_the_output_only() -> None:
    """Whatever changes a result must be compared before a run is resumed; how often it is saved does not."""
    assert runs.NOT_COMPARED == {"out", "json", "progress", "checkpoint_minutes", "ray", "time_limit"}


def test_env_json_is_plain_json(run: RunFolder) -> None:
    """Other programs read it."""
    json.loads(run.path("env.json").read_text(), parse_constant=pytest.fail)
