"""Latency budgets that hold on the measured network.

A latency table predicts; a budget is about what a clock shows. So the plan of a search is measured beside the unpruned
network, in the budget's runtime, and where it is slower than the budget, or faster than need be, the plan is projected
again onto a limit of the table that is tighter or looser by what was measured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.searching.searchers import SearchResult
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import Latency
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.timing.speed_up import LEVEL, median_interval, speed_up

Counts: TypeAlias = NDArray[np.int64]
Measure: TypeAlias = Callable[[PruningPlan], tuple[Latency, Latency]]
"""Latency of the unpruned network and of a plan's, side by side."""

SLACK = 0.015
"""A plan is widened if it is faster than the budget by more than this share: what is exported is measured again, with
noise of its own, and should not be far from the budget then either."""
_AIM = 0.995
#: Limits that are nearer to one another than this lead to the same plan.
_NEAR = 1e-4
#: Plans that are measured at most, and limits that are tried: several may lead to one plan.
_MOST_PLANS, _MOST_LIMITS = 8, 24


@dataclass(frozen=True, kw_only=True)
class LatencyReport:
    """What became of a latency budget. Times are seconds per run, the others shares of the unpruned network's."""

    budget: str
    asked: float
    """The budget, as a share of the unpruned network's measured latency."""
    table: float
    """What the table says of the plan."""
    measured: float
    interval: tuple[float, float]
    """95 % interval of the measured share."""
    seconds: float
    """Median of the plan's network."""
    unpruned_seconds: float
    plans: int
    """Plans that were measured until the budget held."""
    conditions: str
    """Device, runtime, threads, batch size and data type."""

    @property
    def holds(self) -> bool:
        """True unless the network is slower than the budget beyond the noise."""
        return self.interval[0] <= self.asked

    @property
    def sentence(self) -> str:
        """All of it in words."""
        low, high = self.interval
        verdict = "" if self.holds else " The budget is not held: no plan that was tried is fast enough."
        return (
            f"{self.budget}: {self.measured:.1%} of the unpruned network's latency measured ({LEVEL:.0%} interval "
            f"{low:.1%} to {high:.1%}; {1e3 * self.seconds:.3g} of {1e3 * self.unpruned_seconds:.3g} ms; "
            f"{self.conditions}), {self.asked:.1%} asked, {self.table:.1%} by the table.{verdict}"
        )

    def to_json(self) -> dict[str, Any]:
        """The report in what JSON holds."""
        return {**vars(self), "interval": list(self.interval), "holds": self.holds, "sentence": self.sentence}


def within_measured_budget(problem: PruningProblem, budget: Budget, result: SearchResult) -> SearchResult:
    """The result of a search with its plan brought to its latency budget by the clock.

    Results for other budgets, and for latency models that cannot measure, are returned as they are.
    """
    table = problem.latency
    if budget.kind != "latency" or not isinstance(table, LatencyTable):
        return result
    plan, report = bring_to_budget(problem, budget, result.plan, table.beside)
    return replace(result, plan=plan, latency=report.to_json())


def bring_to_budget(
    problem: PruningProblem, budget: Budget, plan: PruningPlan, measure: Measure
) -> tuple[PruningPlan, LatencyReport]:
    """Measure a plan, and project it again until it is as slow as its budget allows.

    The limit that the plan is projected onto is found as the root of a function that is measured: by proportion at
    first, then between the nearest limits that turned out too tight and too loose. Where no limit between leads to
    another plan, some groups are as wide as in the one plan, and the others as in the other.

    Args:
        problem: what is pruned.
        budget: a latency budget of it.
        plan: of a search. New plans keep its channels before others, and its proportions between groups as far as the
            limit lets them.
        measure: runs a plan's network beside the unpruned one.

    Returns:
        The plan whose measurement fits the budget; if none does, of those that hold it the one nearest to what was
        aimed at, else the fastest; and what was measured.
    """
    search = _LimitSearch(problem, budget, plan)
    limit = problem.limits[budget]
    tried: list[_Trial] = []
    share, counts = limit.fraction(search.counts), search.counts
    plans = 0
    for _ in range(_MOST_LIMITS):
        known = next((one for one in tried if np.array_equal(one.counts, counts)), None)
        if known is None:
            if plans == _MOST_PLANS:
                break
            plans += 1
        trial = replace(known or search.measured(counts, measure), share=share)
        tried.append(trial)
        following = search.following(tried)
        if trial.fits or following is None:
            break
        share, counts = following
    # the last one if it fits. Not the slowest of those that hold, which is the one whose measurement erred the most
    best = tried[-1] if tried[-1].fits else min(tried, key=lambda one: (not one.holds, abs(one.excess - _AIM)))
    return search.plan(best.counts), search.report(best, plans)


@dataclass(frozen=True)
class _Trial:
    """A plan that was measured."""

    counts: Counts
    before: Latency
    after: Latency
    excess: float
    """Measured latency over the budget."""
    low: float
    """Lower end of its interval."""
    share: float = 0.0
    """Limit that the plan was projected onto, as a share of the table's latency of the unpruned network."""

    @property
    def holds(self) -> bool:
        """Not above the budget beyond the noise."""
        return self.low <= 1

    @property
    def fits(self) -> bool:
        """Neither above the budget nor far below it."""
        return 1 - SLACK <= self.excess <= 1


class _LimitSearch:
    """The limits that a plan is projected onto, and what comes of it."""

    def __init__(self, problem: PruningProblem, budget: Budget, plan: PruningPlan) -> None:
        self.problem = problem
        self.budget = budget
        self.counts: Counts = problem.scorer.network.counts(plan)
        self._original = plan
        self._limit = problem.limits[budget]
        self._least = self._limit.value(problem.widths.smallest) / self._limit.full

    def plan(self, counts: Counts) -> PruningPlan:
        """The plan with these counts: channels of the original one first, then the most important others."""
        if np.array_equal(counts, self.counts):
            return self._original
        kept = self._original.mask(self.problem.scorer.network.graph)
        scores = self.problem.scorer.unit_scores
        above = 1.0 + float(scores.max() - scores.min())
        return self.problem.plan(counts, scores + above * kept)

    def project(self, share: float) -> Counts:
        """The original plan's proportions on a limit of the table."""
        keep = self.counts / self.problem.sizes
        return self.problem.project(keep, self._limit.tightened(share))

    def measured(self, counts: Counts, measure: Measure) -> _Trial:
        """Measure the plan with these counts against the budget."""
        before, after = measure(self.plan(counts))
        if self.budget.absolute:
            found = median_interval(after.samples, sessions=after.sessions)
            excess, low, _ = (one / self.budget.value for one in found)
        else:
            faster = speed_up(before, after)
            excess, low = (1 / one / self.budget.value for one in (faster.ratio, faster.high))
        return _Trial(counts, before, after, excess, low)

    def following(self, tried: list[_Trial]) -> tuple[float, Counts] | None:
        """The limit to try next, and a plan for it; None if there is nothing left between those that were tried."""
        tight = max((one for one in tried if one.excess <= _AIM), key=lambda one: one.share, default=None)
        above = [one for one in tried if one.excess > _AIM and (tight is None or one.share > tight.share)]
        loose = min(above, key=lambda one: one.share, default=None)
        if tight is None or loose is None:
            last = tight or min(tried, key=lambda one: one.share)
            share = float(np.clip(last.share * _AIM / last.excess, self._least, 1.0))
            return (share, self.project(share)) if abs(share - last.share) > _NEAR else None
        if loose.share - tight.share < _NEAR:
            return None
        # not too near an end: latency comes in steps, and the next one may lie anywhere between
        way = float(np.clip((_AIM - tight.excess) / (loose.excess - tight.excess), 0.1, 0.9))
        share = tight.share + way * (loose.share - tight.share)
        counts = self.project(share)
        if any(np.array_equal(counts, one.counts) for one in (tight, loose)):
            counts = self.between(tight.counts, loose.counts, way)
        return share, counts

    def between(self, tight: Counts, loose: Counts, way: float) -> Counts:
        """Groups of the one plan as wide as in the other, one after another, until the table is that part of the way.

        Returns:
            The first plan if the two differ in one group only.
        """
        steps = [tight]
        for group in np.flatnonzero(tight != loose):
            steps.append(steps[-1].copy())
            steps[-1][group] = loose[group]
        seconds = np.array([self._limit.value(one) for one in steps])
        distances = np.abs(seconds - (seconds[0] + way * (seconds[-1] - seconds[0])))
        return steps[1 + int(distances[1:-1].argmin())] if len(steps) > 2 else tight

    def report(self, trial: _Trial, plans: int) -> LatencyReport:
        """What was asked, predicted and measured."""
        found = speed_up(trial.before, trial.after)
        table = self.problem.latency
        predicted = self._limit.value(trial.counts) / self._limit.full
        if isinstance(table, LatencyTable):
            predicted = table.prediction(trial.counts) / table.full
        absolute = self.budget.value / trial.before.median
        return LatencyReport(
            budget=str(self.budget),
            asked=absolute if self.budget.absolute else self.budget.value,
            table=predicted,
            measured=1 / found.ratio,
            interval=(1 / found.high, 1 / found.low),
            seconds=trial.after.median,
            unpruned_seconds=trial.before.median,
            plans=plans,
            conditions=trial.after.conditions,
        )
