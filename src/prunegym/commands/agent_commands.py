"""The commands about policies: train, evaluate, transfer. They return results and print nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

from prunegym.agents.configuration.config import EvaluateConfig, TrainConfig, TransferConfig
from prunegym.agents.configuration.time_limit import TimeLimit
from prunegym.agents.policies.policy_file import load_policy
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.records import save_attention, save_networks
from prunegym.agents.run_folders.running import RESULT, Launch, Reporter, Result, joined, save_splits
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.latency_budget import within_measured_budget
from prunegym.agents.searching.searchers import SearchResult, SearchSettings, searcher_named
from prunegym.agents.tables import format_table
from prunegym.agents.training.loop import train
from prunegym.agents.training.result import TrainResult
from prunegym.envs.prior import NAMES, PRIORS
from prunegym.envs.rewards import PROFILES
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.evaluate import KEY, TIMED, EvaluationSettings, evaluate, measure_unpruned, plan_row
from prunegym.experiments.setup import build_model, build_problems, build_prunable, build_task, seed_everything
from prunegym.experiments.transfer import transfer
from prunegym.pruning.budget import Budget
from prunegym.pruning.files import plain
from prunegym.pruning.plan import PruningPlan

#: Columns of a table of plans, in order.
PLAN_COLUMNS = (
    "network",
    "budget",
    "searcher",
    "cost",
    "latency_share",
    "macs",
    "parameters",
    "reward_score",
    "selection_score",
    "test_score",
    "evaluations",
    "seconds",
)


def run_train(config: TrainConfig, reporter: Reporter) -> Result:
    """Train a pruning policy."""
    config = replace(config, rounds=config.episode_rounds)  # a run goes on with the rounds that it began with
    seed_everything(config.seed)
    launch = Launch(config, reporter, config.network, "ppo", joined(config.budgets))
    content = launch.finished()
    if content is None:
        if config.policy is not None:
            load_policy(config.policy)  # refused before anything is computed
        problems = _problems(config, reporter)
        run = launch.open()
        save_splits(problems, run)
        save_networks(problems, run)
        trained = train(problems, config, run, progress=reporter.progress, limit=reporter.limit)
        rows = _rows_beside_baselines(problems, trained, run, free=config.mode == "free", limit=reporter.limit)
        content = {
            "folder": str(run.folder),
            "policy": str(trained.policy),
            "evaluations": trained.evaluations,
            "seconds": trained.seconds,
            PRIORS: {problem.key(one): NAMES[problem.priors[one]] for problem in problems for one in problem.budgets},
            "rows": plain(rows),
        }
        run.write_json(RESULT, content)
    table = format_table(content["rows"], PLAN_COLUMNS)
    starts = "".join(f"{key}: started from {name}\n" for key, name in content.get(PRIORS, {}).items())
    return Result(content, f"{table}\n{starts}use it with --policy {content['policy']}")


def run_evaluate(config: EvaluateConfig, reporter: Reporter) -> Result:
    """Compare searchers, or measure the unpruned networks."""
    seed_everything(config.seed)
    budget, searcher = joined(config.budgets), "+".join(config.searchers)
    if config.measures_unpruned:
        budget, searcher = "none", "unpruned"
    launch = Launch(config, reporter, config.network, searcher, budget)
    content = launch.finished()
    if content is None:
        if config.policy is not None:
            load_policy(config.policy)
        problems = [] if config.measures_unpruned else _problems(config, reporter)
        unpruned = _unpruned_rows(config, reporter.limit) if config.measures_unpruned else []
        run = launch.open()
        if problems:
            save_splits(problems, run)
            save_networks(problems, run, ("selection", "test") if config.test else ("selection",))
        settings = EvaluationSettings(
            searchers=config.searchers,
            policy=config.policy,
            evaluations=config.evaluations,
            seed=config.seed,
            test=config.test,
            progress=reporter.progress,
        )
        rows = evaluate(problems, settings, run, limit=reporter.limit) if problems else unpruned
        if config.policy is not None:
            policy, metadata = load_policy(config.policy, device=config.torch_device)
            save_attention(policy, metadata, problems, run)
        content = {"folder": str(run.folder), "rows": plain(rows)}
        run.write_json(RESULT, content)
    return Result(content, format_table(content["rows"], PLAN_COLUMNS))


def run_transfer(config: TransferConfig, reporter: Reporter) -> Result:
    """Use a policy on other networks."""
    seed_everything(config.seed)
    launch = Launch(config, reporter, config.network, "transfer", joined(config.budgets))
    content = launch.finished()
    if content is None:
        policy, metadata = load_policy(config.policy, device=config.torch_device)
        problems = _problems(config, reporter)
        run = launch.open()
        save_splits(problems, run)
        save_networks(problems, run, ("selection", "test") if config.test else ("selection",))
        rows = transfer(problems, config, run, test=config.test, progress=reporter.progress, limit=reporter.limit)
        save_attention(policy, metadata, problems, run, config.episode_rounds)
        content = {"folder": str(run.folder), "rows": plain(rows)}
        run.write_json(RESULT, content)
    return Result(content, format_table(content["rows"], PLAN_COLUMNS))


def _problems(config: TrainConfig | EvaluateConfig | TransferConfig, reporter: Reporter) -> list[PruningProblem]:
    """All networks with all budgets, on the same data."""
    rewarded = not isinstance(config, EvaluateConfig) and PROFILES[config.reward_profile].latency != 0
    return build_problems(
        config.pairs,
        config,
        config.budgets,
        keep=config.keep,
        latency=rewarded,
        progress=reporter.progress,
    )


def _unpruned_rows(config: EvaluateConfig, limit: TimeLimit) -> list[dict[str, Any]]:
    """Scores of the networks as they are."""
    task, device = build_task(config), str(config.torch_device)
    rows = []
    for name, weights in config.pairs:
        model = build_model(name, weights, task.data, config.seed)
        network = build_prunable(model, task, name=name, keep=config.keep, strict=len(config.pairs) == 1)
        rows.append(measure_unpruned(network, task, device=device))
        limit.check()
    return rows


def _rows_beside_baselines(
    problems: list[PruningProblem], trained: TrainResult, run: RunFolder, *, free: bool, limit: TimeLimit
) -> list[dict[str, Any]]:
    """What training reached on each network and budget: the policy's own plan, and the best it sampled."""
    kept = FinishedRows(run, KEY, TIMED)
    rows = []
    for problem in problems:
        for budget in problem.budgets:
            network = problem.scorer.network.name
            key = problem.key(budget)
            reached = {"policy": trained.own[key], "best sampled": trained.best[key]}
            found = {
                name: SearchResult(plan=plan, evaluations=trained.evaluations, seconds=trained.seconds)
                for name, plan in reached.items()
            }
            for name in ("uniform", "knapsack"):
                found[name] = searcher_named(name)(problem, budget, SearchSettings())
            bring = cache(partial(_brought, problem, budget, free=free))
            for name in ("uniform", "knapsack", *reached):
                identity = dict(zip(KEY, (network, str(budget), name), strict=True))
                rows.append(kept.once(identity, partial(_reached, run, problem, budget, name, found[name], bring)))
                limit.check()
    return rows


def _brought(problem: PruningProblem, budget: Budget, plan: PruningPlan, *, free: bool) -> SearchResult:
    """A plan as it is deployed: brought to its latency budget by measuring, unless nothing holds it to budgets."""
    result = SearchResult(plan=plan, evaluations=0, seconds=0)
    return result if free else within_measured_budget(problem, budget, result)


def _reached(
    run: RunFolder,
    problem: PruningProblem,
    budget: Budget,
    name: str,
    found: SearchResult,
    bring: Callable[[PruningPlan], SearchResult],
) -> dict[str, Any]:
    """The row of a plan, and the file that `prunegym prune --plan` reads."""
    brought = bring(found.plan)  # measured once for all that came to the same plan
    if name not in ("uniform", "knapsack"):
        run.write_json(plan_file(name, problem.key(budget)), brought.plan.to_json())
    result = replace(found, plan=brought.plan, latency=brought.latency)
    return plan_row(problem, budget, name, result)


def plan_file(kind: str, key: str) -> str:
    """Name of the file that keeps one of a training's plans, for ``prunegym prune --plan``.

    Args:
        kind: ``policy`` or ``best sampled``.
        key: Network and budget.
    """
    words = re.sub(r"[^\w.]+", "-", f"{kind.split()[0]} {key}", flags=re.ASCII)
    return f"plan_{words}.json"
