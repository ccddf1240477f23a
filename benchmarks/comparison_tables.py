"""The tables of the comparison grids, from the rows that `compare.py` kept in `results/`; `tables.py` prints them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from statistics import fmean

from formats import markdown, with_interval, with_range
from rows import RESULTS
from together import lines
from together import together as grids_together

from prunegym.agents.comparison.grid import KEY, TIMED
from prunegym.agents.comparison.summary import Table, summarise
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
IN_SHORT = ("agent", "cmaes", "sensitivity", "random", "prior", "knapsack", "uniform")
"""What the README shows: the agent, the best of the others, chance, and what needs no search or hardly any."""


def read_grid(name: str) -> Table:
    """What is kept of a grid; its searchers in the order of its rows."""
    rows = FinishedRows(RunFolder(RESULTS / f"compare_{name}"), KEY, TIMED).read()
    return Table(rows, (), tuple(dict.fromkeys(str(one["searcher"]) for one in rows)))


def titled(titles: dict[str, str]) -> Iterator[tuple[Table, str]]:
    """The grids that there are, each with its title and the number of its seeds."""
    for name, title in titles.items():
        if (RESULTS / f"compare_{name}").is_dir():
            grid = read_grid(name)
            seeds = len(grid.seeds)
            yield grid, f"{title} ({seeds} seed{'s' if seeds > 1 else ''})"


def short() -> str:
    """A few searchers on each pair of network and budget, with ranges over seeds, by the mean over pairs."""
    grids = list(titled(TITLES))
    runs = {name: [grid.runs(name, grid.stage)[0] for grid, _ in grids] for name in IN_SHORT}
    means = {name: fmean(fmean(seeds) for seeds in of) for name, of in runs.items()}
    ranked = sorted(IN_SHORT, key=lambda name: -means[name])
    cells = ([CONTROLLED.get(name, name), f"{100 * means[name]:.1f}", *map(with_range, runs[name])] for name in ranked)
    return markdown(["MACs kept", "mean", *(title for _, title in grids)], cells)


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
