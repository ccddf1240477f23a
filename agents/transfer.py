"""Transfer a policy to networks it has not seen: zero-shot, or after a few evaluations there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from prunegym.agents.config import TransferConfig
from prunegym.agents.evaluate import plan_row
from prunegym.agents.records import note_plan
from prunegym.agents.runs import RunFolder
from prunegym.agents.searchers import SearchResult, SearchSettings, searcher_named
from prunegym.agents.train import train
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

Row = dict[str, Any]


def transfer(
    problems: Sequence[PruningProblem],
    config: TransferConfig,
    run: RunFolder,
    *,
    test: bool = False,
    progress: bool = True,
) -> list[Row]:
    """Prune new networks with a policy trained elsewhere.

    Args:
        problems: the new networks with their budgets.
        config: the policy file, which is not changed, and how few-shot training learns. `config.evaluations` plans may
            be scored on each network and budget; 0 is zero-shot, one deterministic pass.
        run: where few-shot training leaves its metrics, checkpoint and the adapted policies.
        test: also score on the test split.
        progress: show a progress bar.

    Returns:
        Rows for uniform, knapsack and the frozen policy; with evaluations also for the adapted policy's own plan
        (`few-shot`) and for the best plan it sampled (`few-shot best`).
    """
    rows = []
    for problem in problems:
        for budget in problem.budgets:
            for name in ("uniform", "knapsack", "policy"):
                result = searcher_named(name)(problem, budget, SearchSettings(policy=config.policy))
                label = "zero-shot" if name == "policy" else name
                note_plan(run, label, problem, budget, result.plan)
                rows.append(plan_row(problem, budget, label, result, test=test))
    if config.evaluations:
        for problem in problems:
            for budget in problem.budgets:
                rows += _few_shot(problem, budget, config, run, test=test, progress=progress)
    return rows


def _few_shot(
    problem: PruningProblem, budget: Budget, config: TransferConfig, run: RunFolder, *, test: bool, progress: bool
) -> list[Row]:
    """Adapt the policy to one network and budget, and rate both of its plans."""
    name = f"{problem.scorer.network.name}__{budget}".replace(":", "").replace("/", "-")
    adapted = train([problem.only(budget)], config, run.subfolder(name), progress=progress)
    key = f"{problem.scorer.network.name} {budget}"
    rows = []
    for label, plans in (("few-shot", adapted.own), ("few-shot best", adapted.best)):
        found = SearchResult(plan=plans[key], evaluations=adapted.evaluations, seconds=adapted.seconds)
        note_plan(run, label, problem, budget, found.plan)
        rows.append(plan_row(problem, budget, label, found, test=test))
    return rows
