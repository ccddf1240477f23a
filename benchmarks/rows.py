"""Result tables of the benchmarks: one CSV each, one row per finished piece; a script that was stopped goes on.

Every row carries the date, the commit, versions and the machine it was measured on.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Mapping
from datetime import date
from pathlib import Path
from typing import Any

from prunegym.agents.run_folders.provenance import describe_environment
from prunegym.pruning.files import replacing

RESULTS = Path(__file__).parent / "results"


class Table:
    """A CSV of results that is appended to.

    Args:
        path: the file; it is made with its first row.
        keys: columns that identify a row.
    """

    def __init__(self, path: Path, keys: tuple[str, ...]) -> None:
        self.path = path
        self.keys = keys

    @property
    def rows(self) -> list[dict[str, str]]:
        """What the file holds now; another process may be adding to it."""
        if not self.path.exists():
            return []
        with self.path.open(newline="") as file:
            return list(csv.DictReader(file))

    def has(self, **key: Any) -> bool:
        """True if a row with these values is there; rows from before a column was there have nothing in it."""
        return any(all(row.get(name, "") == str(value) for name, value in key.items()) for row in self.rows)

    def replace(self, row: Mapping[str, Any]) -> None:
        """Write a row in the place of the one that has its keys, if there is one; the table may get columns by it."""
        full = {name: str(value) for name, value in {**row, **provenance()}.items()}
        rows = self.rows
        places = [place for place, one in enumerate(rows) if all(one[key] == full[key] for key in self.keys)]
        if places:
            rows[places[0]] = full
        else:
            rows.append(full)
        columns = list(dict.fromkeys(name for one in (full, *rows) for name in one))
        with replacing(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns, restval="")
            writer.writeheader()
            writer.writerows(rows)

    def append(self, row: Mapping[str, Any]) -> None:
        """Write a row and wait until it is on the disk."""
        full = {**row, **provenance()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = self.rows
        with self.path.open("a", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(rows[0] if rows else full))
            if not rows:
                writer.writeheader()
            writer.writerow(full)
            file.flush()
            os.fsync(file.fileno())


def provenance() -> dict[str, Any]:
    """Where a row comes from."""
    environment = describe_environment("cpu")
    git = environment["git"] or {"commit": "unknown", "dirty": True}
    versions = environment["versions"]
    return {
        "date": date.today().isoformat(),
        "commit": git["commit"][:10] + ("+" if git["dirty"] else ""),
        "torch": versions["torch"],
        "sb3": versions["stable-baselines3"],
        "cpu": environment["cpu"],
        "threads": environment["threads"],
    }
