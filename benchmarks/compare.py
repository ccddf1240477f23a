"""The comparison grids: all searchers on four pairs of network and budget without training, six on two with it.

    python benchmarks/compare.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th \
        --vgg16-half vgg16_half.safetensors

Each grid is a run folder of `prunegym compare` below --runs and goes on where it was; `--only resnet20_50` makes one.
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

from prunegym.agents.comparison.command import run_compare
from prunegym.agents.comparison.config import CompareConfig
from prunegym.agents.run_folders.running import Reporter
from prunegym.agents.searching.searchers import SEARCHERS

ALL = (*(name for name in SEARCHERS if name != "policy"), "agent", "shuffled", "mean")
ABLATIONS = ("agent:structure", "agent:random")
TRAINED = ("uniform", "knapsack", "prior", "agent")
"""With training; beside them of the others the two that came highest without training on the same network."""

POST_TRAINING = {"evaluations": 200, "repeats": 5, "searcher": ALL, "curve_examples": 1000, "test": True}
SMALLER = {**POST_TRAINING, "evaluations": 100, "repeats": 3}
FINETUNED = {
    **{"evaluations": 60, "repeats": 3, "test": True, "regime": "finetuned", "epochs": 3},
    **{"finetune_repeats": 1, "rounds": 1, "amp": True},
}
GRIDS: dict[str, dict[str, Any]] = {
    "resnet20_50": {
        **{"network": "cifar_resnet20", "budget": "macs:0.5", "rounds": 1},
        **{**POST_TRAINING, "searcher": (*ALL, *ABLATIONS)},
    },
    "resnet20_35": {"network": "cifar_resnet20", "budget": "macs:0.35", "rounds": 3, **POST_TRAINING},
    "resnet56_35": {"network": "cifar_resnet56", "budget": "macs:0.35", "rounds": 3, **SMALLER},
    "vgg16_half_20": {"network": "cifar_vgg16_half", "budget": "macs:0.2", "rounds": 3, **SMALLER},
    "resnet20_35_finetuned": {
        **{"network": "cifar_resnet20", "budget": "macs:0.35", **FINETUNED},
        "searcher": (*TRAINED, "cmaes", "netadapt"),
    },
    "vgg16_half_15_finetuned": {
        **{"network": "cifar_vgg16_half", "budget": "macs:0.15", **FINETUNED},
        "searcher": (*TRAINED, "cmaes", "tpe"),
    },
}
"""Agents' ablations are trainings of their own: they run where a training is cheapest. Agents prune in one round at
50 % MACs, where three start lower (LOG.md), and in three below."""


@dataclass(frozen=True)
class Arguments(BaseNetworks):
    """What to run: the grids whose weights are given."""

    only: tuple[str, ...] = ()
    """Names of grids; by default all whose weights are given."""
    repeats: int | None = None
    """Fewer seeds, to begin with; more can follow."""
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
        one_grid(config, RESULTS / f"compare_{name}")


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
