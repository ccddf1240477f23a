"""The comparison grids: five searchers on two networks at 35 % of their MACs, recovered by reconstruction.

    python benchmarks/compare.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th

Each grid is a run folder of `prunegym compare` below --runs and goes on where it was; `--only resnet20_35` makes one.
Rows, table, curves and pictures are copied to results/compare_NAME/, also of a grid that is interrupted, with what it
takes to go on: where there is no run folder, it is made from there, so that a grid begun on one machine can be ended on
another (see kept.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from base_networks import BaseNetworks
from kept import keep, restore
from rows import RESULTS

from prunegym.agents.run_folders.running import Reporter
from prunegym.experiments.comparison.command import run_compare
from prunegym.experiments.comparison.config import CompareConfig

COMPARED = {
    "evaluations": 100,
    "repeats": 3,
    "rounds": 1,
    "searcher": ("prior", "cmaes_prior", "cmaes", "random", "agent"),
    "curve_examples": 1000,
    "test": True,
}
"""One round: what an agent sees of the network between rounds is no evaluation, and would be paid for by nobody."""
GRIDS: dict[str, dict[str, Any]] = {
    "resnet20_35": {"network": "cifar_resnet20", "budget": "macs:0.35", **COMPARED},
    "resnet56_35": {"network": "cifar_resnet56", "budget": "macs:0.35", **COMPARED},
}


@dataclass(frozen=True)
class Arguments(BaseNetworks):
    """What to run: the grids whose weights are given."""

    only: tuple[str, ...] = ()
    """Names of grids; by default all whose weights are given."""
    repeats: int | None = None
    """Fewer seeds, to begin with; more can follow."""
    kept: Path = RESULTS
    """Where rows, tables and pictures are copied to."""
    runs: Path = Path("runs/benchmarks")
    """Where the run folders are."""


def main(arguments: Arguments) -> None:
    """Run what is missing."""
    for name in arguments.only or GRIDS:
        options = GRIDS[name]
        again = {} if arguments.repeats is None else {"repeats": arguments.repeats}
        file = arguments.weights[options["network"]]
        if file is None:
            print(f"{name}: no weights")
            continue
        config = CompareConfig(
            **{**options, **again, "network": (options["network"],), "budget": (options["budget"],)},
            data=arguments.data,
            weights=(file,),
            out=arguments.runs / f"compare_{name}",
        )
        one_grid(config, arguments.kept / f"compare_{name}")


def one_grid(config: CompareConfig, kept: Path) -> None:
    """Begin a grid, or go on with it from its run folder or from what is kept, and keep what it came to."""
    run = config.out
    assert run is not None
    if restore(kept, run, config):
        print(f"run folder: {run} (made from {kept})")
    try:
        print(run_compare(config, Reporter(say=print, progress=True)).text)
    finally:
        keep(run, kept)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
