"""What policies that were learned elsewhere are worth on networks they never saw, beside searches there.

    python benchmarks/transfer.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th \
        --vgg16-half vgg/model.safetensors --hybrid hybrid/model.safetensors --dense heldout/dense_0__cifar10

Each row of results/transfer.csv is one searcher with an allowance of evaluations and a seed, on one network and budget:
test accuracy of its plan after full reconstruction, and all that it cost. A script that was stopped goes on where it
was. Seeds are the outer loop, so that every pair has a row soon.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tyro
from base_networks import BaseNetworks
from rows import RESULTS, Table
from tqdm import tqdm

from prunegym.agents.configuration.options import DataOptions, ProblemOptions
from prunegym.agents.searching.search import SearchResult, SearchSettings
from prunegym.agents.searching.searchers import WITHOUT_SEED, own_plan, searcher_named
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.evaluate import plan_row
from prunegym.experiments.setup import build_problem, build_task
from prunegym.pruning.budget import Budget
from prunegym.pruning.scoring import Scorer

KEYS = ("network", "budget", "searcher", "allowed", "seed")
BUDGETS = {
    "cifar_resnet20": ("macs:0.35", "macs:0.2"),
    "cifar_resnet56": ("macs:0.35", "macs:0.25"),
    "cifar_vgg16_half": ("macs:0.2", "macs:0.15"),
    "cifar_hybrid": ("macs:0.35", "macs:0.2"),
    "cifar_mobilenet_v2": ("macs:0.35", "macs:0.2"),
    "dense_0": ("macs:0.35", "macs:0.2"),
}
BY_LOSS = " by loss"
ARMS = (
    ("uniform", 0),
    ("halp", 0),
    ("knapsack", 0),
    ("rounds", 0),
    ("prior", 3),
    ("cmaes_prior", 200),
    ("cmaes_prior by loss", 200),
    ("cmaes_prior", 32),
    ("cmaes", 200),
    ("cmaes", 32),
)


@dataclass(frozen=True)
class Arguments(BaseNetworks):
    """What to run: the networks whose weights are given."""

    dense: str | None = None
    """Run folder of the network dense_0 of families.py, as `training_networks.py --held-out` makes it."""
    seeds: tuple[int, ...] = (0, 1, 2)
    only: tuple[str, ...] = ()
    """Searchers to run, by default all."""
    policy: Path | None = None
    """Policy file of the searchers that are given one; by default the policy that ships."""
    results: Path = RESULTS

    @property
    def networks(self) -> dict[str, tuple[str, str]]:
        """What names a network on the command line, and its weights."""
        found = {name: (name, file) for name, file in self.weights.items() if file is not None}
        if self.dense is not None:
            families = Path(__file__).parent / "families.py"
            found["dense_0"] = (f"{families}:dense_0", f"{self.dense}/model.safetensors")
        return found


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(arguments.results / "transfer.csv", KEYS)
    task = build_task(DataOptions(data=arguments.data))
    problems = {}
    for name, (network, weights) in arguments.networks.items():
        budgets = [Budget.parse(one) for one in BUDGETS[name]]
        options = ProblemOptions(data=arguments.data, reward_examples=1000)
        problems[name] = build_problem(network, weights, options, budgets, task=task, label=name)
    work = [
        (name, problem, budget, searcher, allowed, seed)
        for seed in arguments.seeds
        for searcher, allowed in ARMS
        for name, problem in problems.items()
        for budget in problem.budgets
        if not (seed != arguments.seeds[0] and searcher in {*WITHOUT_SEED, "rounds"})
        and (not arguments.only or searcher in arguments.only)
    ]
    for name, problem, budget, searcher, allowed, seed in tqdm(work, unit="search"):
        key = dict(zip(KEYS, (name, str(budget), searcher, allowed, seed), strict=True))
        if not table.has(**key):
            table.append({**key, **measured(problem.only(budget), budget, searcher, allowed, seed, arguments.policy)})


def in_rounds(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The knapsack in three rounds, with statistics anew in each: what an untrained policy does there."""
    began = time.perf_counter()
    plan = own_plan(None, ChannelPruningEnv(problem, rounds=3), budget)
    return SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - began)


def by_loss(problem: PruningProblem) -> PruningProblem:
    """The same problem with plans scored by their loss while they are searched."""
    scorer = problem.scorer
    settings = replace(scorer.settings, measure="loss")
    return PruningProblem(Scorer(scorer.network, scorer.task, settings, statistics=scorer.statistics), problem.budgets)


def measured(
    problem: PruningProblem, budget: Budget, searcher: str, allowed: int, seed: int, policy: Path | None
) -> dict[str, Any]:
    """One search, which pays for all that it asks, and its plan's scores."""
    problem.scorer.forget()
    searched = by_loss(problem) if searcher.endswith(BY_LOSS) else problem
    searcher = searcher.removesuffix(BY_LOSS)
    settings = SearchSettings(evaluations=allowed, seed=seed, policy=policy)
    began = time.process_time()
    result = (in_rounds if searcher == "rounds" else searcher_named(searcher))(searched, budget, settings)
    row = plan_row(problem, budget, searcher, result, test=True)
    columns = ("cost", "reward_score", "selection_score", "test_score", "evaluations", "seconds")
    return {name: row[name] for name in columns} | {"processor_seconds": round(time.process_time() - began, 2)}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
