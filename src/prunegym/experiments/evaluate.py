"""Evaluate policies: networks x budgets, beside uniform and the knapsack allocator.

Plans are compared at equal realised cost, on images that neither training nor the search has seen: the selection
split, and the test split where asked, in float32 on the physically rebuilt network after recovery.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.evaluations.store import STORE, stored
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.records import note_plan
from prunegym.agents.run_folders.runs import RunFolder, slug
from prunegym.agents.searching.latency_budget import within_measured_budget
from prunegym.agents.searching.searchers import SearchResult, SearchSettings, check_evaluations, searcher_named
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import Task
from prunegym.pruning.training import evaluate_network

Row = dict[str, Any]

KEY = ("network", "budget", "searcher")
"""Columns that identify a row."""
TIMED = ("seconds", "latency_share")
"""Columns that are measured in time."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured of every plan."""

    searchers: tuple[str, ...] = ("uniform", "knapsack", "policy")
    policy: Path | None = None
    evaluations: int = 0
    seed: int = 0
    test: bool = False
    """Also score on the test split, which is read once, at the end."""
    progress: bool = True


def evaluate(
    problems: Sequence[PruningProblem],
    settings: EvaluationSettings,
    run: RunFolder,
    *,
    limit: TimeLimit = NO_LIMIT,
) -> list[Row]:
    """Score the searchers' plans on every network and budget.

    Args:
        problems: networks with their budgets.
        settings: searchers, policy file and splits. Searcher `policy` is left out where there is no policy file.
        run: keeps finished rows, and the scores of the search under way.
        limit: when to stop: after the evaluation under way.

    Returns:
        One row per network, budget and searcher, see :func:`plan_row`.

    Raises:
        PruningError: The allowance is too small for a searcher.
        TimeUp: The limit is reached.
    """
    names = [name for name in settings.searchers if name != "policy" or settings.policy is not None]
    work = [(problem, budget, name) for problem in problems for budget in problem.budgets for name in names]
    for problem, _, name in work:  # before anything is computed
        check_evaluations(name, problem, settings.evaluations)
    kept = FinishedRows(run, KEY, TIMED)
    rows: list[Row] = []
    with tqdm(work, desc="evaluate", unit="plan", disable=not settings.progress) as bar:
        for problem, budget, name in bar:
            key = dict(zip(KEY, (problem.scorer.network.name, str(budget), name), strict=True))
            bar.set_postfix_str(" ".join([*key.values(), _best(rows, key)]))
            rows.append(kept.once(key, lambda: _searched(problem, budget, name, settings, run, limit)))  # noqa: B023
            limit.check()
    return rows


def _searched(
    problem: PruningProblem, budget: Budget, name: str, settings: EvaluationSettings, run: RunFolder, limit: TimeLimit
) -> Row:
    """Let one searcher search, or repeat what it had searched before, and measure its plan."""
    called = "__".join(map(slug, (problem.scorer.network.name, str(budget), name)))
    with stored([problem.scorer], run.path(STORE), called, limit) as store:
        search = SearchSettings(
            evaluations=settings.evaluations,
            seed=settings.seed,
            policy=settings.policy,
            progress=settings.progress,
            clock=store.clock,
        )
        result = within_measured_budget(problem, budget, searcher_named(name)(problem, budget, search))
    note_plan(run, name, problem, budget, result.plan)
    return plan_row(problem, budget, name, result, test=settings.test)


def _best(rows: Sequence[Row], key: Mapping[str, str]) -> str:
    """What a bar shows as the best so far of the network and budget under way."""
    same = [row for row in rows if all(str(row[name]) == key[name] for name in KEY[:2])]
    best = max(same, key=lambda row: float(row["selection_score"]), default=None)
    return "" if best is None else f"(best {best['searcher']} {best['selection_score']:.3f})"


def plan_row(
    problem: PruningProblem, budget: Budget, searcher: str, result: SearchResult, *, test: bool = False
) -> Row:
    """What a plan costs and what its recovered network scores.

    Args:
        problem: The network.
        budget: One of its budgets.
        searcher: Who made the plan.
        result: The plan as it will be deployed: for a latency budget, already brought to it by measuring.
        test: Score on the test split too.

    Returns:
        network, budget, searcher; `cost`, the share of the budgeted cost kept; MACs and parameters; `reward_score` on
        the images of the search and `selection_score` on others; `test_score` if asked; evaluations and seconds; where
        there is a latency model `latency_share`, the measured one, which rows of other budgets lack.
    """
    network = problem.scorer.network
    counts = network.counts(result.plan)
    cost = network.cost(result.plan)
    settings = problem.scorer.settings
    return {
        "network": network.name,
        "budget": str(budget),
        "searcher": searcher,
        "recovery": settings.recovery,
        "cost": problem.limit_of(result.plan, budget).fraction(counts),
        "macs": cost.macs,
        "parameters": cost.parameters,
        "reward_score": problem.scorer.score(result.plan).score,
        **recovered_scores(problem, result.plan, ("selection", "test") if test else ("selection",)),
        "evaluations": result.evaluations,
        "seconds": round(result.seconds, 3),
        # in every row if in one: the rows of a run are one table
        **({} if problem.latency is None else {"latency_share": result.latency and result.latency["measured"]}),
    }


def recovered_scores(problem: PruningProblem, plan: PruningPlan, splits: Sequence[str]) -> dict[str, float]:
    """Scores of the recovered float32 network on whole splits, as ``{split}_score``."""
    scorer = problem.scorer
    model = scorer.recovered(plan)
    return {
        f"{split}_score": evaluate_network(model, scorer.task, split, device=scorer.device).score for split in splits
    }


def measure_unpruned(
    network: PrunableNetwork,
    task: Task,
    *,
    splits: Sequence[str] = ("reward", "selection", "test"),
    device: str = "cpu",
) -> Row:
    """Cost and scores of the unpruned network: what `evaluate` prints without a policy and a budget."""
    scores = {f"{split}_score": evaluate_network(network.model, task, split, device=device).score for split in splits}
    cost = network.full_cost
    return {
        "network": network.name,
        "budget": "none",
        "searcher": "unpruned",
        "cost": 1.0,
        "macs": cost.macs,
        "parameters": cost.parameters,
        **scores,
    }
