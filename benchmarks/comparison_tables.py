"""The tables of the comparison grids, from the rows that `compare.py` kept in `results/`; `tables.py` prints them."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from statistics import fmean

from formats import markdown, with_interval, with_range
from rows import RESULTS

from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.experiments.comparison.bootstrap import Interval
from prunegym.experiments.comparison.rows import KEY, TIMED
from prunegym.experiments.comparison.summary import Table, at_seconds, fastest_seconds

TITLES = {"resnet20_35": "ResNet-20, 35 %", "resnet56_35": "ResNet-56, 35 %"}
BOLD = {"agent": "**agent**"}


def read_grid(name: str) -> Table:
    """What is kept of a grid; its searchers in the order of its rows."""
    run = RunFolder(RESULTS / f"compare_{name}")
    rows = FinishedRows(run, KEY, TIMED).read()
    searchers = tuple(dict.fromkeys(str(one["searcher"]) for one in rows))
    seeds = {one: {row["seed"] for row in rows if row["searcher"] == one} for one in searchers}
    short = [one for one, found in seeds.items() if found != set().union(*seeds.values())]
    if short:
        raise SystemExit(f"compare_{name} lacks seeds of {', '.join(short)}: finish it with compare.py first")
    with run.path("curves.csv").open(newline="") as file:
        lines = list(csv.DictReader(file))
    numbers = ("seconds", "after_recovery_score")
    curves = [{**one, "seed": int(one["seed"]), **{name: float(one[name]) for name in numbers}} for one in lines]
    return Table(rows, curves, searchers)


def titled(titles: dict[str, str]) -> Iterator[tuple[Table, str]]:
    """The grids that there are, each with its title and the number of its seeds."""
    for name, title in titles.items():
        if (RESULTS / f"compare_{name}").is_dir():
            grid = read_grid(name)
            seeds = len(grid.seeds)
            yield grid, f"{title} ({seeds} seed{'s' if seeds > 1 else ''})"


def compare() -> str:
    """Every searcher of each grid, on the selection split and on test, with ranges over seeds, by the mean on test."""
    grids = list(titled(TITLES))
    names = [name for name in grids[0][0].searchers if all(name in grid.searchers for grid, _ in grids)]
    stages = ("after_recovery_score", "test_after_recovery_score")
    runs = {name: [grid.runs(name, stage)[0] for grid, _ in grids for stage in stages] for name in names}
    ranked = sorted(names, key=lambda name: -fmean(fmean(seeds) for seeds in runs[name][1::2]))
    header = [cell for _, title in grids for cell in (f"{title}: selection", "test")]
    return markdown(["", *header], ([BOLD.get(name, name), *map(with_range, runs[name])] for name in ranked))


def equal_seconds() -> str:
    """The same searchers after the seconds that the fastest search of each pair took, on 1,000 selection images."""
    grids = list(titled(TITLES))
    columns, header = [], []
    for grid, title in grids:
        marks = fastest_seconds(grid)
        assert marks is not None
        header.append(f"{title}, {min(marks.values()):.0f} s")
        columns.append({one["searcher"]: one["score"] for one in at_seconds(grid, marks)})

    def cell(score: Interval | None) -> str:
        return "no plan yet" if score is None else with_interval(score)

    names = [name for name in columns[0] if all(name in column for column in columns)]
    cells = ([BOLD.get(name, name), *(cell(of[name]) for of in columns)] for name in names)
    return markdown(["", *header], cells)
