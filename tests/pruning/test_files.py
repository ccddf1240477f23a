import errno
import json
import os
import subprocess
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from prunegym.pruning import files
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import append, plain, read_json, remove_leftovers, replacing, write_failure, write_json


class Regime(Enum):
    POST_TRAINING = "post-training"


@dataclass(frozen=True)
class Config:
    path: Path
    widths: tuple[int, ...]
    regime: Regime = Regime.POST_TRAINING


def test_plain_turns_our_values_into_json() -> None:
    """Everything that configurations and results hold has a JSON form."""
    value = {
        "config": Config(Path("a/b"), (1, 2)),
        "array": np.arange(3),
        "scalar": np.float32(0.5),
        "tensor": torch.tensor([1.0, float("nan")]),
        "device": torch.device("cpu"),
        "set": {2, 1},
        3: True,
    }

    assert plain(value) == {
        "config": {"path": os.path.join("a", "b"), "widths": [1, 2], "regime": "post-training"},
        "array": [0, 1, 2],
        "scalar": 0.5,
        "tensor": [1.0, None],
        "device": "cpu",
        "set": [1, 2],
        "3": True,
    }


def test_plain_refuses_what_json_cannot_hold() -> None:
    """An object silently turned into its repr could not be read back."""
    with pytest.raises(TypeError, match="Received a object"):
        plain({"x": object()})


def test_json_survives_the_round_trip(tmp_path: Path) -> None:
    """Floats come back exactly, text as text, folders are made."""
    value = {"third": 1 / 3, "name": "é", "none": None, "list": [1, 2.5]}

    write_json(tmp_path / "new" / "value.json", value)

    assert read_json(tmp_path / "new" / "value.json") == value


def test_written_json_is_standard_json(tmp_path: Path) -> None:
    """Other programs do not read NaN."""
    write_json(tmp_path / "value.json", {"loss": float("inf")})

    assert json.loads((tmp_path / "value.json").read_text(), parse_constant=pytest.fail) == {"loss": None}


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe\x00", b"[" * 100_000])
def test_damaged_json_is_refused_with_its_path(tmp_path: Path, content: bytes) -> None:
    """A damaged file ends in one clear error, whatever is wrong with it."""
    (tmp_path / "plan.json").write_bytes(content)

    with pytest.raises(PruningError, match=r"`--plan` should lead to a readable JSON.*Received .*plan\.json"):
        read_json(tmp_path / "plan.json", argument="--plan")


def test_missing_json_is_refused(tmp_path: Path) -> None:
    """The message is the same kind as for a damaged file."""
    with pytest.raises(PruningError, match="No such file"):
        read_json(tmp_path / "none.json")


def test_failed_write_keeps_the_old_file_and_leaves_no_other(tmp_path: Path) -> None:
    """Nothing already written is lost when the block raises half-way."""
    path = tmp_path / "model.bin"
    path.write_text("old")

    def write_half() -> None:
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()

    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("model.bin", "old")]


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, "No space left on device"), RuntimeError("writing file failed")],
)
def test_full_disk_names_argument_place_and_remedy(tmp_path: Path, failure: Exception) -> None:
    """torch.save reports a full disk as a RuntimeError."""
    with (
        pytest.raises(PruningError, match=r"`--save` should be a place.*Received '.*w\.pt' \(.*\)\. (Free|Choose)"),
        replacing(tmp_path / "w.pt", argument="--save"),
    ):
        raise failure


def test_temporary_file_keeps_the_suffix(tmp_path: Path) -> None:
    """np.savez appends .npz to any other name, and the renaming would miss the file."""
    with replacing(tmp_path / "indices.npz") as temporary:
        np.savez(temporary, train=np.arange(3))

    assert np.load(tmp_path / "indices.npz")["train"].tolist() == [0, 1, 2]


def test_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    """The user gave a file where a folder belongs."""
    (tmp_path / "file").touch()

    with pytest.raises(PruningError, match="Choose a folder that you may write to"):
        write_json(tmp_path / "file" / "x.json", 1)


def test_append_drops_what_a_kill_left_and_keeps_the_rest(tmp_path: Path) -> None:
    """The caller says how much of the file is whole."""
    path = tmp_path / "table"
    append(path, 0, b"a\n")
    path.write_bytes(b"a\nhal")

    append(path, 2, b"b\n")

    assert path.read_bytes() == b"a\nb\n"


def test_leftovers_of_dead_processes_are_removed(tmp_path: Path) -> None:
    """Those of living ones, finished files and hidden files of others stay."""
    dead = subprocess.Popen(["true"])
    dead.wait()
    gone = [f".checkpoint.{dead.pid}.pt", f".table.{dead.pid}", ".tmpHTV9Ht"]
    stay = [f".checkpoint.{os.getpid()}.pt", "checkpoint.pt", ".hidden", ".tmp", f"checkpoint.{dead.pid}.pt"]
    folder = tmp_path / "part"
    folder.mkdir()
    for name in (*gone, *stay):
        (folder / name).touch()

    remove_leftovers(tmp_path)

    assert {path.name for path in folder.iterdir()} == set(stay)


def test_failed_write_without_a_reason_is_explained_by_a_full_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch says of one is of no help."""
    monkeypatch.setattr(files.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))

    error = write_failure(Path("runs/checkpoint.pt"), RuntimeError("unexpected pos 64 vs 12"))

    assert "(No space left on device). Free some space there" in str(error)
