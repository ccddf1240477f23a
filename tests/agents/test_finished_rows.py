"""Finished rows: once each, with what is timed apart."""

from pathlib import Path
from typing import Any

import pytest

from prunegym.agents.run_folders.finished_rows import ROWS, TIMES, FinishedRows
from prunegym.agents.run_folders.runs import RunFolder

KEY = {"network": "n", "seed": 0}


@pytest.fixture
def rows(tmp_path: Path) -> FinishedRows:
    """Of an empty folder."""
    return FinishedRows(RunFolder(tmp_path), ("network", "seed"))


def row(**changes: Any) -> dict[str, Any]:
    """A finished piece."""
    return {**KEY, "score": 1 / 3, "seconds": 2.5, **changes}


def test_row_comes_back_with_its_times(rows: FinishedRows) -> None:
    """In the order in which rows were finished."""
    for seed in (1, 0):
        rows.append(row(seed=seed, seconds=seed + 0.5))

    assert rows.read() == [row(seed=1, seconds=1.5), row(seed=0, seconds=0.5)]


def test_table_is_the_same_whatever_the_time(rows: FinishedRows, tmp_path: Path) -> None:
    """Byte by byte; the seconds are in a file of their own."""
    (tmp_path / "other").mkdir()
    other = FinishedRows(RunFolder(tmp_path / "other"), ("network", "seed"))

    rows.append(row(seconds=1.0))
    other.append(row(seconds=2.0))

    assert rows.run.path(ROWS).read_bytes() == other.run.path(ROWS).read_bytes()
    assert rows.run.path(TIMES).read_bytes() != other.run.path(TIMES).read_bytes()


def test_finished_piece_is_not_made_again(rows: FinishedRows) -> None:
    """Its row is read; a network whose name is a number is still itself."""
    made = rows.once({"network": "7", "seed": 0}, lambda: row(network="7"))

    again = rows.once({"network": "7", "seed": 0}, pytest.fail)

    assert {**again, "network": "7"} == made


def test_row_killed_before_it_was_whole_is_made_again(rows: FinishedRows) -> None:
    """Its times were written and it was not: the later times count."""
    rows.run.append_row(TIMES, {**KEY, "seconds": 9.0})

    rows.once(KEY, row)

    assert rows.read() == [row()]


def test_rows_of_an_earlier_version_keep_their_times(rows: FinishedRows) -> None:
    """They had them in the table itself; new rows are added below."""
    rows.run.append_row(ROWS, {"network": "n", "seconds": 4.0, "seed": 1, "score": 0.5})
    rows.append(row())

    assert [(one["seed"], one["seconds"]) for one in rows.read()] == [(1, 4.0), (0, 2.5)]
