"""The agent against its start, post-training regime: no weight is trained; what recovery gives is what counts.

For each budget and seed an agent is trained; its own deterministic plan is compared on the selection split, in
float32, with the uniform plan, the one-shot knapsack plan, and the plan of the untrained agent (the knapsack
applied in the same rounds). Learning curves go beside the table.

    python benchmarks/post_training.py --data cifar10.npz --weights cifar10_resnet20.th --budgets macs:0.35
    python benchmarks/post_training.py --data cifar10.npz --weights cifar10_resnet20.th --budgets macs:0.5 --rounds 1
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from rows import RESULTS, Table

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.evaluate import plan_row
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import SEARCHERS, SearchResult, SearchSettings, own_plan
from prunegym.agents.setup import build_problem
from prunegym.agents.training.loop import METRICS, train
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.plan import PruningPlan


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of the network."""
    network: str = "cifar_resnet20"
    budgets: tuple[str, ...] = ("macs:0.35", "macs:0.5")
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluations: int = 200
    """Plans scored for each agent, its own plans included."""
    rounds: int = 3
    workers: int = 1
    """Worker processes."""
    reward_examples: int = 2000
    reward_split: int | None = None
    """Images set aside for the reward; needed where more than 5,000 are scored."""
    criterion: str = "taylor"
    reward: str = "improvement"
    """Reward profile; another than the default goes into another table (`name`)."""
    name: str = "post_training"
    """Name of the table in benchmarks/results."""
    runs: Path = Path("runs/benchmarks")
    """Where the run folders go; a run that was stopped goes on."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(RESULTS / f"{arguments.name}.csv", ("network", "budget", "searcher", "seed"))
    for budget in arguments.budgets:
        for seed in arguments.seeds:
            if not table.has(network=arguments.network, budget=budget, searcher="agent", seed=seed):
                one_agent(arguments, table, budget, seed)
    summarise(table)


def one_agent(arguments: Arguments, table: Table, budget: str, seed: int) -> None:
    """Train one agent and add its rows and those of its rivals."""
    config = TrainConfig(
        network=(arguments.network,),
        weights=(arguments.weights,),
        data=arguments.data,
        budget=(budget,),
        seed=seed,
        evaluations=arguments.evaluations,
        workers=arguments.workers,
        rounds=arguments.rounds,
        reward_examples=arguments.reward_examples,
        reward_split=arguments.reward_split,
        criterion=arguments.criterion,
        reward=arguments.reward,
        tensorboard=False,
    )
    folder = f"{arguments.name}__{arguments.network}__{budget.replace(':', '')}__s{seed}"
    run = RunFolder.create(
        arguments.runs / folder,
        network=arguments.network,
        searcher="ppo",
        budget=budget,
        seed=seed,
        config=config,
    )
    problem = build_problem(arguments.network, arguments.weights, config, config.budgets)
    result = train([problem], config, run)
    shutil.copy(run.path(METRICS), RESULTS / f"curve__{folder}.csv")
    key = problem.key(problem.budgets[0])
    start = own_plan(None, ChannelPruningEnv(problem, rounds=arguments.rounds), problem.budgets[0])
    for searcher in ("uniform", "knapsack"):
        found = SEARCHERS[searcher](problem, problem.budgets[0], SearchSettings())
        add(table, problem, budget, searcher, seed, arguments, found)
    for searcher, plan, spent in (
        ("untrained agent", start, 0),
        ("agent best sampled", result.best[key], result.evaluations),
        ("agent", result.own[key], result.evaluations),
    ):
        add(table, problem, budget, searcher, seed, arguments, _found(plan, spent, result.seconds))


def add(
    table: Table,
    problem: PruningProblem,
    budget: str,
    searcher: str,
    seed: int,
    arguments: Arguments,
    found: SearchResult,
) -> None:
    """One row: what a plan costs and scores."""
    row = plan_row(problem, problem.budgets[0], searcher, found)
    how = {"rounds": arguments.rounds, "criterion": arguments.criterion}
    table.append({**row, "budget": budget, "seed": seed, **how})


def _found(plan: PruningPlan, evaluations: int, seconds: float) -> SearchResult:
    return SearchResult(plan=plan, evaluations=evaluations, seconds=seconds)


def summarise(table: Table) -> None:
    """Print mean and range over seeds of each searcher's selection score."""
    for key in dict.fromkeys((row["budget"], row["searcher"]) for row in table.rows):
        rows = [row for row in table.rows if (row["budget"], row["searcher"]) == key]
        scores = np.array([float(row["selection_score"]) for row in rows])
        print(f"{key[0]:10} {key[1]:20} {scores.mean():.4f}  {scores.min():.4f} .. {scores.max():.4f}  n={len(rows)}")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
