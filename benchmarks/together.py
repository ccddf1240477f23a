"""The post-training grids of `compare.py` together: means over (network, budget) pairs, places, performance profiles.

    python benchmarks/together.py

Pairs count equally, whatever the number of their seeds; searchers that are missing in one of the grids are left out.
Writes results/compare_together.md and compare_together.png.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from formats import markdown, with_interval
from rows import RESULTS

from prunegym.agents.comparison.bootstrap import LEVEL, Runs, performance_profiles
from prunegym.agents.comparison.grid import KEY, TIMED
from prunegym.agents.comparison.pictures import draw_profiles
from prunegym.agents.comparison.summary import Table, summarise
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.runs import RunFolder

GRIDS = ("resnet20_50", "resnet20_35", "resnet56_35", "vgg16_half_20")
NAME = "compare_together"


def main() -> None:
    """Write page and picture, and print the page."""
    page = write(together(RESULTS), RESULTS)
    print(page)


def together(results: Path, grids: Sequence[str] = GRIDS) -> Table:
    """The rows of all grids that there are, of the searchers that all of them have."""
    folders = [folder for name in grids if (folder := results / f"compare_{name}").is_dir()]
    by_grid = [FinishedRows(RunFolder(folder), KEY, TIMED).read() for folder in folders]
    names = [dict.fromkeys(str(row["searcher"]) for row in rows) for rows in by_grid]
    common = tuple(one for one in names[0] if all(one in others for others in names))
    for name, rows in zip(folders, by_grid, strict=True):
        check_whole(name.name.removeprefix("compare_"), rows, common)
    return Table([row for rows in by_grid for row in rows if row["searcher"] in common], (), common)


def check_whole(grid: str, rows: Sequence[Mapping[str, Any]], searchers: Sequence[str]) -> None:
    """Make sure that all searchers have the same seeds, before means over them stand side by side.

    Raises:
        SystemExit: They have not.
    """
    seeds = {one: {row["seed"] for row in rows if row["searcher"] == one} for one in searchers}
    short = [one for one, found in seeds.items() if found != set().union(*seeds.values())]
    if short:
        raise SystemExit(f"compare_{grid} lacks seeds of {', '.join(short)}: finish it with compare.py first")


def write(table: Table, results: Path) -> str:
    """The page, which is written with its picture."""
    runs = {name: table.runs(name, table.stage) for name in table.searchers}
    title = f"after recovery, selection split, {len(table.pairs)} pairs"
    with TemporaryDirectory() as folder:
        draw_profiles(Path(folder) / NAME, performance_profiles(runs), title=title)
        shutil.copyfile(Path(folder) / f"{NAME}.png", results / f"{NAME}.png")
    seeds = ", ".join(f"{' '.join(pair)}: {len(table.seeds_of(pair))}" for pair in table.pairs)
    head = (
        "# All post-training grids together\n\n"
        "Accuracy after recovery on the selection split in percent. Mean over pairs of network and budget with its "
        f"{LEVEL:.0%} bootstrap interval over pairs, which is too narrow for so few; paired differences to the agent; "
        f"mean of each pair with the place in it. Seeds: {seeds}."
    )
    header = ["", "mean over pairs", "minus agent", *map(" ".join, table.pairs)]
    page = f"{head}\n\n{markdown(header, lines(table))}\n\n![performance profiles]({NAME}.png)\n"
    (results / f"{NAME}.md").write_text(page, encoding="utf-8")
    return page


def lines(table: Table) -> list[list[str]]:
    """Searcher, mean over pairs, difference to the agent, and mean and place of each pair; the best first."""
    runs = {name: table.runs(name, table.stage) for name in table.searchers}
    return [
        [
            one["searcher"],
            with_interval(one["score"]),
            "" if one["difference"] is None else with_interval(one["difference"]),
            *(_with_place(runs, index, one["searcher"]) for index in range(len(table.pairs))),
        ]
        for one in sorted(summarise(table), key=lambda one: -one["score"].mean)
    ]


def _with_place(runs: Mapping[str, Runs], index: int, searcher: str) -> str:
    """Mean of a searcher on one pair, and its place among all."""
    means = {name: fmean(of[index]) for name, of in runs.items()}
    return f"{100 * means[searcher]:.1f} ({1 + sum(one > means[searcher] for one in means.values())})"


if __name__ == "__main__":
    main()
