"""Depth: which blocks `dcpa` leaves out, and what that is worth beside the knapsack, which only narrows.

For each budget and seed the search runs with the ordinary options; its plan and that of the one-shot knapsack are
scored after recovery on the selection split, in float32.

    python benchmarks/depth.py --data cifar10.npz --weights cifar10_resnet56.th
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rows import RESULTS, Table

from prunegym.agents.configuration.config import PruneConfig
from prunegym.agents.evaluate import plan_row
from prunegym.agents.prune import find_plan
from prunegym.agents.setup import build_problem
from prunegym.pruning.budget import Budget


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of the network."""
    network: str = "cifar_resnet56"
    budgets: tuple[str, ...] = ("macs:0.35",)
    searchers: tuple[str, ...] = ("knapsack", "dcpa")
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluations: int = 100
    """Allowance of the search."""
    criterion: str = "taylor"
    name: str = "depth"
    """Name of the table in benchmarks/results."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    keys = ("network", "budget", "searcher", "seed", "allowance")
    table = Table(RESULTS / f"{arguments.name}.csv", keys)
    for budget in arguments.budgets:
        for seed in arguments.seeds:
            for searcher in arguments.searchers:
                key = (arguments.network, budget, searcher, seed, arguments.evaluations)
                if not table.has(**dict(zip(keys, key, strict=True))):
                    table.append(one_row(arguments, budget, searcher, seed))
    for row in table.rows:
        blocks = row["blocks_left_out"] or "none"
        score = float(row["selection_score"])
        print(f"{row['budget']:10} {row['searcher']:10} seed {row['seed']}  {score:.4f}  blocks left out: {blocks}")


def one_row(arguments: Arguments, budget_text: str, searcher: str, seed: int) -> dict[str, object]:
    """Search, and what came of it."""
    config = PruneConfig(
        network=arguments.network,
        weights=arguments.weights,
        data=arguments.data,
        budget=budget_text,
        searcher=searcher,
        evaluations=arguments.evaluations,
        criterion=arguments.criterion,
        seed=seed,
    )
    budget = Budget.parse(budget_text)
    problem = build_problem(arguments.network, arguments.weights, config, (budget,))
    found = find_plan(problem, budget, config, progress=True)
    return {
        **plan_row(problem, budget, searcher, found),
        "seed": seed,
        "allowance": arguments.evaluations,
        "criterion": arguments.criterion,
        "blocks": len(problem.scorer.network.blocks),
        "blocks_left_out": " ".join(found.plan.removed),
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
