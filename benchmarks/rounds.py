"""What progressive pruning is worth before anything is learned: the untrained agent's plan, by rounds and criterion.

    python benchmarks/rounds.py --data cifar10.npz --weights cifar10_resnet20.th

Finished rows are skipped.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import tyro
from rows import RESULTS, Table

from prunegym.agents.configuration.config import EvaluateConfig
from prunegym.agents.evaluate import plan_row
from prunegym.agents.searching.searchers import SearchResult, own_plan
from prunegym.agents.setup import build_problem, build_task
from prunegym.envs.channel_pruning import ChannelPruningEnv


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of the network."""
    network: str = "cifar_resnet20"
    budgets: tuple[str, ...] = ("macs:0.35", "macs:0.5")
    criteria: tuple[str, ...] = ("taylor", "taylor_squared", "l1")
    rounds: tuple[int, ...] = (1, 3)


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(RESULTS / "rounds.csv", ("network", "budget", "criterion", "rounds"))
    for criterion in arguments.criteria:
        config = EvaluateConfig(
            network=(arguments.network,),
            weights=(arguments.weights,),
            data=arguments.data,
            budget=arguments.budgets,
            criterion=criterion,
        )
        problem = build_problem(
            arguments.network, arguments.weights, config, config.budgets, task=build_task(config)
        )
        for budget in problem.budgets:
            for rounds in arguments.rounds:
                key = {"network": arguments.network, "budget": str(budget), "criterion": criterion, "rounds": rounds}
                if table.has(**key):
                    continue
                started = time.perf_counter()
                plan = own_plan(None, ChannelPruningEnv(problem, rounds=rounds), budget)
                found = SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - started)
                row = plan_row(problem, budget, "untrained agent", found)
                table.append({**row, "criterion": criterion, "rounds": rounds})
    for row in table.rows:
        print(row["budget"], row["criterion"], row["rounds"], row["selection_score"])


if __name__ == "__main__":
    main(tyro.cli(Arguments))
