"""From the rows of a comparison to its figures: means, intervals, differences, and what stood at equal seconds.

A *run* is one search seed on one (network, budget) pair; its score is the mean over the fine-tuning seeds. Everything
is paired: of a searcher, the runs are in the order of ``pairs`` and seeds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from prunegym.agents.searching.searchers import NOT_SEARCHING
from prunegym.experiments.comparison.bootstrap import Interval, Runs, difference_interval, mean_interval
from prunegym.experiments.comparison.measure import STAGES

Row: TypeAlias = Mapping[str, Any]
Pair: TypeAlias = tuple[str, str]
"""Network and budget."""


@dataclass(frozen=True)
class Table:
    """The rows of a whole grid, by searcher, pair and seed.

    Args:
        rows: Rows of ``rows.csv``.
        curves: Rows of ``curves.csv``.
        searchers: In the order in which they are shown.
    """

    rows: Sequence[Row]
    curves: Sequence[Row]
    searchers: tuple[str, ...]

    @property
    def pairs(self) -> list[Pair]:
        """All (network, budget) pairs."""
        return list(dict.fromkeys((row["network"], row["budget"]) for row in self.rows))

    @property
    def seeds(self) -> list[int]:
        """All seeds of searches."""
        return list(dict.fromkeys(row["seed"] for row in self.rows))

    def seeds_of(self, pair: Pair) -> list[int]:
        """Seeds of the searches on one pair: all of them, unless rows of several grids stand together."""
        return list(dict.fromkeys(row["seed"] for row in self.rows if (row["network"], row["budget"]) == pair))

    @property
    def stage(self) -> str:
        """The score that decides: the last stage that was measured."""
        return next(one for one in reversed(STAGES) if all(row[one] is not None for row in self.rows))

    @property
    def reference(self) -> str:
        """Whom the others are compared with: the agent, or a policy, or else the first."""
        return next((one for one in ("agent", "policy") if one in self.searchers), self.searchers[0])

    def runs(self, searcher: str, column: str) -> list[list[float]]:
        """A column of a searcher: for each pair, for each seed, the mean over fine-tuning seeds."""
        found: dict[tuple[Pair, int], list[float]] = {}
        for row in self.rows:
            if row["searcher"] == searcher:
                key = ((row["network"], row["budget"]), row["seed"])
                found.setdefault(key, []).append(float(row[column]))
        return [[float(np.mean(found[pair, seed])) for seed in self.seeds_of(pair)] for pair in self.pairs]

    def repeats_itself(self, *searchers: str) -> bool:
        """Whether all runs of these searchers are copies of one: an allocator's on the only pair."""
        plans = {name: {row["plan"] for row in self.rows if row["searcher"] == name} for name in searchers}
        return len(self.pairs) == 1 and all(len(found) == 1 for found in plans.values())

    def score(self, searcher: str, runs: Runs, seed: int) -> Interval:
        """Mean of a searcher's runs, with an interval unless they are copies of one."""
        found = mean_interval(runs, seed=seed)
        return Interval(found.mean) if self.repeats_itself(searcher) else found

    def difference(self, searcher: str, runs: Runs, others: Runs, seed: int) -> Interval | None:
        """Mean difference to the reference; None for the reference itself."""
        if searcher == self.reference:
            return None
        found = difference_interval(runs, others, seed=seed)
        return Interval(found.mean) if self.repeats_itself(searcher, self.reference) else found

    def in_force(self, searcher: str, marks: Mapping[Pair, float]) -> list[list[float | None]]:
        """Score after recovery of the plan that each run would have returned after so many seconds.

        Args:
            searcher: Who searched.
            marks: Seconds for each pair.

        Returns:
            For each pair, for each seed; None where there was no plan yet.
        """
        points: dict[tuple[Pair, int], list[Row]] = {}
        for row in self.curves:
            if row["searcher"] == searcher:
                points.setdefault(((row["network"], row["budget"]), row["seed"]), []).append(row)
        result: list[list[float | None]] = []
        for pair in self.pairs:
            by_then = [
                [one for one in points[pair, seed] if one["seconds"] <= marks[pair]] for seed in self.seeds_of(pair)
            ]
            result.append([float(one[-1]["after_recovery_score"]) if one else None for one in by_then])
        return result


def summarise(table: Table, *, seed: int = 0) -> list[dict[str, Any]]:
    """Scores, differences and prices of every searcher, averaged over pairs.

    Args:
        table: A whole grid.
        seed: Of the bootstrap.

    Returns:
        For each searcher: its three scores, ``score`` and ``difference`` (to the reference; None for itself) of the
        deciding stage with intervals, ``gap`` between reward and selection split, share of the cost kept, and the
        evaluations and seconds spent.
    """
    others = table.runs(table.reference, table.stage)
    return [_summary(table, name, others, seed) for name in table.searchers]


def _summary(table: Table, name: str, others: Runs, seed: int) -> dict[str, Any]:
    def mean(column: str) -> float | None:
        if any(row[column] is None for row in table.rows if row["searcher"] == name):
            return None
        return mean_interval(table.runs(name, column), resamples=1).mean

    runs = table.runs(name, table.stage)
    test = f"test_{table.stage}"
    reward, after_recovery = mean("reward_score"), mean("after_recovery_score")
    assert reward is not None
    assert after_recovery is not None
    return {
        "searcher": name,
        **{stage: mean(stage) for stage in STAGES},
        "score": table.score(name, runs, seed),
        "difference": table.difference(name, runs, others, seed),
        test: mean(test),
        "gap": reward - after_recovery,
        "cost": mean("cost"),
        "latency_ratio": mean("latency_ratio"),
        "evaluations": mean("evaluations"),
        "seconds": mean("seconds"),
        "most_evaluations": max(int(row["evaluations"]) for row in table.rows if row["searcher"] == name),
    }


def fastest_seconds(table: Table) -> dict[Pair, float] | None:
    """Seconds of the fastest search of each pair, the mean over its seeds; None if nothing was searched."""
    spent = {
        name: table.runs(name, "seconds")
        for name in table.searchers
        if name not in NOT_SEARCHING and any(row["evaluations"] for row in table.rows if row["searcher"] == name)
    }
    if not spent:
        return None
    return {
        pair: min(float(np.mean(seconds[index])) for seconds in spent.values())
        for index, pair in enumerate(table.pairs)
    }


def at_seconds(table: Table, marks: Mapping[Pair, float], *, seed: int = 0) -> list[dict[str, Any]]:
    """Every searcher at equal seconds, by the score after recovery.

    Args:
        table: A whole grid.
        marks: Seconds for each pair.
        seed: Of the bootstrap.

    Returns:
        For each searcher ``score`` and ``difference`` with intervals, or None where some of its runs had no plan by
        then; ``without`` counts these runs.
    """
    found = {name: table.in_force(name, marks) for name in table.searchers}
    without = {name: sum(score is None for runs in found[name] for score in runs) for name in found}
    whole: dict[str, Runs] = {
        name: [[score for score in one if score is not None] for one in runs]
        for name, runs in found.items()
        if not without[name]
    }
    return [
        {
            "searcher": name,
            "score": table.score(name, whole[name], seed) if name in whole else None,
            "difference": table.difference(name, whole[name], whole[table.reference], seed)
            if {name, table.reference} <= whole.keys()
            else None,
            "without": without[name],
        }
        for name in table.searchers
    ]
