"""The tables of the comparison grids, from the rows that `compare.py` kept in `results/`; `tables.py` prints them."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from statistics import fmean

from formats import markdown, with_interval, with_range
from rows import RESULTS
from rows import Table as Kept
from together import check_whole, lines
from together import together as grids_together

from prunegym.agents.comparison.bootstrap import Interval
from prunegym.agents.comparison.grid import KEY, TIMED
from prunegym.agents.comparison.summary import Table, at_seconds, fastest_seconds, summarise
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.runs import RunFolder

CONTROLLED = {"agent": "**agent**", "shuffled": "agent, shuffled", "mean": "agent, mean action"}
TITLES = {
    "resnet20_50": "ResNet-20, 50 %",
    "resnet20_35": "ResNet-20, 35 %",
    "resnet56_35": "ResNet-56, 35 %",
    "vgg16_half_20": "VGG-16/2, 20 %",
}
"""Grids without training."""
FINETUNED = {"resnet20_35_finetuned": "ResNet-20, 35 %", "vgg16_half_15_finetuned": "VGG-16/2, 15 %"}
IN_SHORT = ("agent", "cmaes", "cmaes_prior", "sensitivity", "random", "prior", "knapsack", "uniform")
"""What the README shows: the agent, the best of the others, chance, and what needs no search or hardly any."""


def read_grid(name: str) -> Table:
    """What is kept of a grid; its searchers in the order of its rows."""
    run = RunFolder(RESULTS / f"compare_{name}")
    rows = FinishedRows(run, KEY, TIMED).read()
    searchers = tuple(dict.fromkeys(str(one["searcher"]) for one in rows))
    check_whole(name, rows, searchers)
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


def in_all(grids: Sequence[tuple[Table, str]]) -> list[str]:
    """Those of the short table that every grid has."""
    return [name for name in IN_SHORT if all(name in grid.searchers for grid, _ in grids)]


def short() -> str:
    """A few searchers on each pair of network and budget, on test, with ranges over seeds, by the mean over pairs."""
    grids = list(titled(TITLES))
    names = in_all(grids)
    runs = {name: [grid.runs(name, f"test_{grid.stage}")[0] for grid, _ in grids] for name in names}
    means = {name: fmean(fmean(seeds) for seeds in of) for name, of in runs.items()}
    ranked = sorted(names, key=lambda name: -means[name])
    cells = ([CONTROLLED.get(name, name), f"{100 * means[name]:.1f}", *map(with_range, runs[name])] for name in ranked)
    whole = {one["network"]: float(one["test_score"]) for one in Kept(RESULTS / "unpruned.csv", ()).rows}
    before = [whole[network] for grid, _ in grids for network, _ in grid.pairs]
    unpruned = ["unpruned", f"{100 * fmean(before):.1f}", *(f"{100 * one:.1f}" for one in before)]
    return markdown(["", "mean", *(title for _, title in grids)], [unpruned, *cells])


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

    cells = ([CONTROLLED.get(name, name), *(cell(of[name]) for of in columns)] for name in in_all(grids))
    return markdown(["", *header], cells)


def compare(name: str = "resnet20_50") -> str:
    """All searchers of a grid, best first, in two columns; the agent's controls under its name."""
    scores = {one["searcher"]: one["score"] for one in summarise(read_grid(name))}
    ranked = sorted(scores, key=lambda one: -scores[one].mean)
    cells = [(CONTROLLED.get(one, one), with_interval(scores[one])) for one in ranked]
    half = -(-len(cells) // 2)
    pairs = zip_longest(cells[:half], cells[half:], fillvalue=("", ""))
    return markdown(("", "score", "", "score"), ([*left, *right] for left, right in pairs))


def together() -> str:
    """All post-training grids, by the mean over their pairs of network and budget."""
    rows = lines(grids_together(RESULTS, tuple(TITLES)))
    cells = ([CONTROLLED.get(name, name), *rest] for name, *rest in rows)
    return markdown(["", "mean", "minus agent", *(title for _, title in titled(TITLES))], cells)


def compare_finetuned() -> str:
    """What each searcher's plan ends at after fine-tuning, on the selection split and on test, with ranges."""
    grids = list(titled(FINETUNED))
    names = list(dict.fromkeys(name for grid, _ in grids for name in grid.searchers))
    stages = ("after_finetuning_score", "test_after_finetuning_score")

    def cells(name: str) -> list[str]:
        return [
            with_range(grid.runs(name, stage)[0]) if name in grid.searchers else ""
            for grid, _ in grids
            for stage in stages
        ]

    header = [cell for _, title in grids for cell in (title, "test")]
    return markdown(["", *header], ([CONTROLLED.get(name, name), *cells(name)] for name in names))
