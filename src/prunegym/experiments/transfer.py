"""Transfer a policy to networks it has not seen: zero-shot, or after a few evaluations there."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

from tqdm import tqdm

from prunegym.agents.configuration.config import TransferConfig
from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.records import note_plan
from prunegym.agents.run_folders.runs import RunFolder, slug
from prunegym.agents.searching.latency_budget import within_measured_budget
from prunegym.agents.searching.searchers import SearchResult, SearchSettings, searcher_named
from prunegym.agents.training.loop import train
from prunegym.agents.training.result import TrainResult
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.evaluate import KEY, TIMED, plan_row
from prunegym.pruning.budget import Budget

Row = dict[str, Any]

FEW_SHOT = ("few-shot", "few-shot best")
"""Searchers that come out of one training: the adapted policy's own plan, and the best that it sampled."""


def transfer(
    problems: Sequence[PruningProblem],
    config: TransferConfig,
    run: RunFolder,
    *,
    test: bool = False,
    progress: bool = True,
    limit: TimeLimit = NO_LIMIT,
) -> list[Row]:
    """Prune new networks with a policy trained elsewhere.

    Args:
        problems: the new networks with their budgets.
        config: the policy file, which is not changed, and how few-shot training learns. `config.evaluations` plans may
            be scored on each network and budget; 0 is zero-shot: one deterministic pass, once three scores have decided
            what the policy starts from there.
        run: keeps finished rows, and what few-shot training leaves: metrics, checkpoint and the adapted policies.
        test: also score on the test split.
        progress: show progress bars.
        limit: when to stop: after the evaluation or row under way.

    Returns:
        Rows for uniform, knapsack and the frozen policy; with evaluations also for the adapted policy's own plan
        (`few-shot`) and for the best plan it sampled (`few-shot best`).
    """
    pairs = [(problem, budget) for problem in problems for budget in problem.budgets]
    kept = FinishedRows(run, KEY, TIMED)
    rows: list[Row] = []
    frozen = [(*pair, name) for pair in pairs for name in ("uniform", "knapsack", "policy")]
    for problem, budget, name in tqdm(frozen, desc="zero-shot", unit="plan", disable=not progress):
        rows.append(_frozen(problem, budget, name, config, kept, test=test))
        limit.check()
    for problem, budget in pairs if config.evaluations else []:
        rows += _few_shot(problem, budget, config, kept, test=test, progress=progress, limit=limit)
        limit.check()
    return rows


def _frozen(
    problem: PruningProblem, budget: Budget, name: str, config: TransferConfig, kept: FinishedRows, *, test: bool
) -> Row:
    """The row of a searcher that is allowed no evaluation."""
    label = "zero-shot" if name == "policy" else name

    def make() -> Row:
        found = searcher_named(name)(problem, budget, SearchSettings(policy=config.policy))
        result = within_measured_budget(problem, budget, found)
        note_plan(kept.run, label, problem, budget, result.plan)
        return plan_row(problem, budget, label, result, test=test)

    return kept.once(_key(problem, budget, label), make)


def _few_shot(
    problem: PruningProblem,
    budget: Budget,
    config: TransferConfig,
    kept: FinishedRows,
    *,
    test: bool,
    progress: bool,
    limit: TimeLimit,
) -> list[Row]:
    """Adapt the policy to one network and budget, and rate both of its plans."""
    name = "__".join(map(slug, (problem.scorer.network.name, str(budget).replace(":", ""))))

    @cache
    def adapted() -> TrainResult:
        return train([problem.only(budget)], config, kept.run.subfolder(name), progress=progress, limit=limit)

    def make(label: str) -> Row:
        trained = adapted()
        plans = trained.own if label == FEW_SHOT[0] else trained.best
        plan = plans[problem.key(budget)]
        found = SearchResult(plan=plan, evaluations=trained.evaluations, seconds=trained.seconds)
        # nothing holds free plans to budgets
        result = found if config.mode == "free" else within_measured_budget(problem, budget, found)
        note_plan(kept.run, label, problem, budget, result.plan)
        return plan_row(problem, budget, label, result, test=test)

    return [kept.once(_key(problem, budget, label), partial(make, label)) for label in FEW_SHOT]


def _key(problem: PruningProblem, budget: Budget, label: str) -> Row:
    return dict(zip(KEY, (problem.scorer.network.name, str(budget), label), strict=True))
