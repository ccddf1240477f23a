"""The command ``prunegym evaluations``: list or export what a run scored."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from prunegym.agents.evaluations.config import EvaluationsConfig
from prunegym.agents.evaluations.store import STORE, read_evaluations
from prunegym.agents.run_folders.running import Reporter, Result
from prunegym.agents.tables import format_table
from prunegym.pruning.files import replacing

_SUMMED = ("run", "network", "recovery", "search", "split", "examples")


def run_evaluations(config: EvaluationsConfig, reporter: Reporter) -> Result:
    """List evaluations by run, network, search and split; export all of them if a file is named."""
    found = [row for run in config.runs for row in evaluations_of(run.expanduser())]
    rows = summed(found)
    content: dict[str, Any] = {"rows": rows}
    lines = [format_table(rows)]
    if config.csv is not None:
        path = config.csv.expanduser()
        _export(found, path)
        content["csv"] = str(path)
        lines.append(f"{len(found)} evaluations: {path}")
    return Result(content, "\n".join(lines))


def evaluations_of(run: Path) -> list[dict[str, Any]]:
    """The evaluations of a run folder and of the folders in it.

    Raises:
        PruningError: There are none, or a file is damaged.
    """
    files = sorted(run.rglob(STORE)) or [run / STORE]
    return [{"run": str(file.parent), **row} for file in files for row in read_evaluations(file)]


def summed(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each run, network, search, split and number of examples."""
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for one in found:
        key = tuple(one[name] for name in _SUMMED)
        row = rows.setdefault(key, {**dict(zip(_SUMMED, key, strict=True)), "evaluations": 0, "best_score": None})
        row["evaluations"] += 1
        row["best_score"] = max((s for s in (row["best_score"], one["score"]) if s is not None), default=None)
        row["seconds"] = one["seconds"]
    return list(rows.values())


def _export(found: Sequence[dict[str, Any]], path: Path) -> None:
    with replacing(path, argument="--csv") as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]) if found else ["evaluation"])
        writer.writeheader()
        for row in found:
            writer.writerow({**row, "settings": json.dumps(row["settings"]), "plan": json.dumps(row["plan"])})
