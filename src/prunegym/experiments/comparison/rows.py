"""The rows of a comparison: search, measure what was found, and draw its curve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.stored_search import PLAN
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.conditions import SHARED
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.measure import STAGES, Judge
from prunegym.experiments.comparison.search import Found, Searches
from prunegym.pruning.budget import Budget
from prunegym.pruning.files import read_json

Row: TypeAlias = dict[str, Any]
Key: TypeAlias = tuple[str, str, str, int, int | None]
"""Network, budget, searcher, seed of the search, seed of the fine-tuning."""

CURVE = "curve.json"
CURVE_SCORES = "curve_scores.csv"
"""Scores of a curve that is not finished yet."""
KEY = ("network", "budget", "searcher", "seed", "finetune_seed")
_MEASURED = (
    "cost",
    "macs",
    "counted_macs",
    "parameters",
    "reward_score",
    *STAGES,
    *(f"test_{stage}" for stage in STAGES),
    "evaluations",
    "plan",
)
TIMED = ("seconds", "latency_ratio", "latency")
"""Columns that differ from run to run, in a file of their own."""
COLUMNS = (*KEY, "network_fingerprint", "policy_fingerprint", *SHARED, *_MEASURED, *TIMED)
"""Columns of a row; ``rows.csv`` has them up to those that are timed."""


def computed_here(
    work: Sequence[Key],
    problems: Mapping[str, PruningProblem],
    config: CompareConfig,
    run: RunFolder,
    announce: Callable[[Key], None],
    *,
    progress: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> Iterator[tuple[Key, Row]]:
    """Compute rows one after the other in this process; a row is handed over before the time limit is looked at.

    Args:
        work: Keys of the rows.
        problems: By network.
        config: Of the comparison.
        run: Gets the files of searches and fine-tuning.
        announce: Told of the row under way.
        progress: Show bars.
        limit: When to stop.

    Yields:
        Keys with their rows.

    Raises:
        PruningError: A searcher fails.
        TimeUp: The limit is reached.
    """
    searches = Searches(config, run, progress=progress, limit=limit)
    judges = {name: Judge(one, config, run, progress=progress, limit=limit) for name, one in problems.items()}
    for key in work:
        announce(key)
        yield key, compute_row(key, problems[key[0]], searches, judges[key[0]])
        limit.check()


def compute_row(key: Key, problem: PruningProblem, searches: Searches, judge: Judge) -> Row:
    """Search, unless it was done before, and measure what was found."""
    _, budget_text, searcher, seed, finetune_seed = key
    budget = Budget.parse(budget_text)
    found = searches.find(problem, budget, searcher, seed)
    _draw_curve(found, judge)
    plan = found.result.plan
    return {
        **dict(zip(KEY, key, strict=True)),
        **dict.fromkeys((*_MEASURED, *TIMED)),
        **judge.measure(plan, budget),
        **judge.finetuned(plan, finetune_seed),
        "evaluations": found.result.evaluations,
        "seconds": found.result.seconds,
        "plan": str(found.folder.path(PLAN).relative_to(searches.run.folder)),
    }


def _draw_curve(found: Found, judge: Judge) -> None:
    """Score the plans of a search's trail, each once, on images that the search has not seen.

    Raises:
        TimeUp: The limit is reached; the plans scored so far are not scored again.
    """
    folder, trail = found.folder, found.trail
    if not folder.path(CURVE).exists():
        scores = [row["after_recovery_score"] for row in folder.read_rows(CURVE_SCORES)]
        for one in trail[len(scores) :]:
            scores.append(judge.after_recovery(one.plan))
            folder.append_row(CURVE_SCORES, {"evaluations": one.evaluations, "after_recovery_score": scores[-1]})
            judge.limit.check()
        points = [
            {
                "evaluations": one.evaluations,
                "seconds": one.seconds,
                "reward_score": one.score,
                "after_recovery_score": score,
            }
            for one, score in zip(trail, scores, strict=True)
        ]
        folder.write_json(CURVE, points)
    folder.path(CURVE_SCORES).unlink(missing_ok=True)


def curve_rows(rows: Sequence[Mapping[str, Any]], run: RunFolder) -> list[Row]:
    """The curves of all searches in a table.

    Returns:
        For each search and each change of its plan: evaluations, seconds, the score of the search, and the score
        after recovery on the selection split.
    """
    searches = {tuple(row[name] for name in KEY[:4]): row["plan"] for row in rows}
    return [
        {**dict(zip(KEY, key, strict=False)), **point}
        for key, plan in searches.items()
        for point in read_json(run.path(plan).parent / CURVE)
    ]
