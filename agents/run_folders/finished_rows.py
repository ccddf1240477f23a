"""Finished rows of a run: one for each piece of work, on the disk before the next piece begins.

What is measured in time stands in a file of its own, so that ``rows.csv`` is the same, byte by byte, for the same seed,
however often the run was interrupted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from prunegym.agents.run_folders.runs import RunFolder

Row: TypeAlias = dict[str, Any]

ROWS = "rows.csv"
TIMES = "rows_timing.csv"
"""What differs from run to run, by the key of its row."""


class FinishedRows:
    """The rows of a run folder.

    Args:
        run: The folder.
        key: Columns that identify a row.
        timed: Columns that are measured in time.
    """

    def __init__(self, run: RunFolder, key: tuple[str, ...], timed: tuple[str, ...] = ("seconds",)) -> None:
        self.run = run
        self.key = key
        self.timed = timed

    def read(self) -> list[Row]:
        """All rows with their times, in the order in which they were finished."""
        # of a row that was interrupted between its two files the times are there twice
        times = {self._key(row): row for row in self.run.read_rows(TIMES)}
        found = []
        for row in self.run.read_rows(ROWS):
            timed = times.get(self._key(row), {})
            found.append({**row, **{name: timed[name] for name in self.timed if name in timed}})
        return found

    def append(self, row: Mapping[str, Any]) -> None:
        """Keep a row.

        Raises:
            PruningError: It could not be written; those before are kept.
        """
        times = {name: row[name] for name in self.timed if name in row}
        if times:
            self.run.append_row(TIMES, {**{name: row[name] for name in self.key}, **times})
        # last: a row that is there is finished
        self.run.append_row(ROWS, {name: value for name, value in row.items() if name not in self.timed})

    def once(self, key: Mapping[str, Any], make: Callable[[], Row]) -> Row:
        """The row of a piece of work: as it was finished before, or made and kept now.

        Args:
            key: Values of the key's columns.
            make: Does the work.
        """
        wanted = self._key(key)
        for row in self.read():
            if self._key(row) == wanted:
                return row
        made = make()
        self.append(made)
        return made

    def _key(self, row: Mapping[str, Any]) -> tuple[str, ...]:
        # as text: a network called 7 is read back as a number
        return tuple("" if row.get(name) is None else str(row[name]) for name in self.key)
