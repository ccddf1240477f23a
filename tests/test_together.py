"""Grids of different sizes in one table: pairs count equally, places are within a pair."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from prunegym.agents.comparison.grid import COLUMNS, KEY, TIMED
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.runs import RunFolder

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script; those of the benchmarks import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module("together")


def add_grid(results: Path, name: str, budget: str, scores: dict[str, list[float]]) -> None:
    """Rows of a grid with the score of each searcher and seed."""
    folder = results / f"compare_{name}"
    folder.mkdir(parents=True)
    kept = FinishedRows(RunFolder(folder), KEY, TIMED)
    rest: dict[str, Any] = dict.fromkeys(COLUMNS)
    for searcher, values in scores.items():
        for seed, value in enumerate(values):
            key = {"network": "net", "budget": budget, "searcher": searcher, "seed": seed, "finetune_seed": None}
            figures = {"reward_score": value, "after_recovery_score": value, "after_pruning_score": 0.1, "plan": "p"}
            kept.append({**rest, **key, **figures, "evaluations": 10, "seconds": 1.0, "cost": 0.5})


def test_pairs_count_equally_whatever_their_seeds(script: ModuleType, tmp_path: Path) -> None:
    """Three seeds of one and two of the other; who is missing in one of them is left out."""
    add_grid(tmp_path, "a", "macs:0.5", {"agent": [0.7, 0.8, 0.9], "random": [0.6, 0.6, 0.6], "extra": [0.9] * 3})
    add_grid(tmp_path, "b", "macs:0.2", {"agent": [0.3, 0.5], "random": [0.6, 0.8]})

    table = script.together(tmp_path, ("a", "b", "not there"))
    page = script.write(table, tmp_path)

    assert table.searchers == ("agent", "random")
    assert "| random | 65.0 (60.0 to 70.0) | 5.0 (-20.0 to 30.0) | 60.0 (2) | 70.0 (1) |" in page
    assert "| agent | 60.0 (40.0 to 80.0) | | 80.0 (1) | 40.0 (2) |" in page
    assert "net macs:0.5: 3, net macs:0.2: 2" in page
    assert (tmp_path / "compare_together.md").read_text() == page
    assert (tmp_path / "compare_together.png").stat().st_size > 0


def test_grid_that_lacks_a_seed_of_a_searcher_is_refused(script: ModuleType, tmp_path: Path) -> None:
    """Means over different seeds would stand side by side."""
    add_grid(tmp_path, "a", "macs:0.5", {"agent": [0.7, 0.8], "random": [0.6]})

    with pytest.raises(SystemExit, match="compare_a lacks seeds of random: finish it with compare.py"):
        script.together(tmp_path, ("a",))
