"""A frozen policy on a network it never saw, beside uniform and knapsack (zero-shot, post-training regime).

    python benchmarks/transfer.py --data cifar10.npz --weights cifar10_resnet56.th --policies A/policy.safetensors

Finished rows are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, Table

from prunegym.agents.configuration.config import EvaluateConfig
from prunegym.agents.evaluate import plan_row
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.searching.searchers import SearchSettings, own_plan, searcher_named
from prunegym.agents.setup import build_problem
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    policies: tuple[Path, ...]
    """Policy files, trained elsewhere."""
    weights: str
    """Weights of the network that the policies have not seen."""
    network: str = "cifar_resnet56"
    budgets: tuple[str, ...] = ("macs:0.5", "macs:0.35")


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(RESULTS / "transfer.csv", ("network", "budget", "searcher", "policy"))
    config = EvaluateConfig(
        network=(arguments.network,), weights=(arguments.weights,), data=arguments.data, budget=arguments.budgets
    )
    problem = build_problem(arguments.network, arguments.weights, config, config.budgets)
    for budget in problem.budgets:
        for name in ("uniform", "knapsack"):
            add(table, problem, budget, name, "", 1)
        for path in arguments.policies:
            rounds = int(load_policy(path)[1]["rounds"])
            add(table, problem, budget, f"untrained agent, {rounds} rounds", "", rounds)
            add(table, problem, budget, "policy", str(path), rounds)
    for row in table.rows:
        print(row["budget"], row["searcher"], Path(row["policy"]).parent.name, row["selection_score"])


def add(table: Table, problem: PruningProblem, budget: Budget, searcher: str, policy: str, rounds: int) -> None:
    """One row: what a plan costs and scores."""
    label = Path(policy).parent.name
    if table.has(network=problem.scorer.network.name, budget=budget, searcher=searcher, policy=label):
        return
    settings = SearchSettings(policy=Path(policy) if policy else None)
    if searcher.startswith("untrained"):
        found = searcher_named("knapsack")(problem, budget, settings)
        problem.priors.clear()  # of the policies before
        start = own_plan(None, ChannelPruningEnv(problem, rounds=rounds), budget)
        found = type(found)(plan=start, evaluations=0, seconds=found.seconds)
    else:
        found = searcher_named(searcher)(problem, budget, settings)
    row = plan_row(problem, budget, searcher, found)
    table.append({**row, "policy": label, "rounds": rounds, "criterion": problem.scorer.settings.criterion})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
