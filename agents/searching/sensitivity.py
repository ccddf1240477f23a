"""Sensitivity curves: how much score each group loses by itself, and one tolerated loss for all groups.

What practitioners' tools do: AIMET's greedy compression-ratio selection and ModelOpt's FastNAS measure one group at a
time and then search for the loss at which the whole network meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.searching.search import Counts, LeastEvaluations, Search, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

Curve = NDArray[np.float64]


def sensitivity(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Prune each group as far as one common loss of score allows; the loss is found by bisection.

    The curve of a group is measured on the reward split with all other groups as wide as they may be, after the same
    recovery as every plan, at as many evenly spaced widths as the allowance gives each group, the narrowest always
    among them. Between the widths it is interpolated, and it is made to rise with the width. Every measurement is an
    evaluation; so is that of the network with all groups as wide as they may be (the unpruned one, where no bound
    forbids it), and the final plan's. The rest of the budget is filled by the projection.

    Raises:
        PruningError: the allowance is less than two evaluations and one for each group that may be pruned.
    """
    choices = problem.widths.choices()
    search = Search("sensitivity", problem, budget, settings, least=least_evaluations(problem), choosing=False)
    points = (search.left - 2) // max(1, _prunable(problem))
    widest = search.probe(problem.widths.largest)
    curves = [_measure(search, group, allowed, points, widest) for group, allowed in enumerate(choices)]
    counts = counts_within_loss(curves, choices, search.limit.holds)
    search.ask(counts / problem.sizes)
    return search.result()


def least_evaluations(problem: PruningProblem) -> LeastEvaluations:
    """One point for each curve, the network that all of them end at, and the plan."""
    groups = _prunable(problem)
    reason = f" (one for each of the {groups} groups that may be pruned, one for the network without pruning and one "
    return LeastEvaluations(groups + 2, f"{reason}for the plan)")


def _prunable(problem: PruningProblem) -> int:
    """Number of groups that may be pruned."""
    return int((problem.widths.smallest < problem.widths.largest).sum())


def _measure(search: Search, group: int, allowed: Counts, points: int, widest: float) -> Curve:
    """Score of the network with each allowed count of one group, the others as wide as they may be ``(allowed,)``."""
    widths = allowed[np.unique(np.linspace(0, len(allowed) - 1, points + 1).round().astype(np.int64))[:-1]]
    scores = []
    for width in widths.tolist():
        counts = search.problem.widths.largest.copy()
        counts[group] = width
        scores.append(search.probe(counts))
    return rising_curve(widths, np.array(scores), allowed, widest)


def rising_curve(widths: Counts, scores: Curve, wanted: Counts, widest: float) -> Curve:
    """Interpolate measured scores, made to rise with the width and to end at that of the widest network.

    Args:
        widths: channels kept where the score was measured ``(points,)``, rising, without the greatest width.
        scores: what was measured ``(points,)``.
        wanted: channels kept where the score is wanted ``(widths,)``; the last is the greatest width.
        widest: score of the network whose groups are all as wide as they may be.
    """
    rising = np.minimum(np.maximum.accumulate(scores), widest)
    curve: Curve = np.interp(wanted, [*widths, wanted[-1]], [*rising, widest])
    return curve


def counts_within_loss(curves: Sequence[Curve], choices: Sequence[Counts], holds: Callable[[Counts], bool]) -> Counts:
    """The fewest channels that lose no more than a common loss, the smallest one that the budget allows.

    Args:
        curves: for each group the score with each of its ``choices``; rising, ending alike.
        choices: for each group the counts it may keep, rising.
        holds: whether counts ``(groups,)`` keep the budget; the first choices do.
    """

    def counts_at(loss: float) -> Counts:
        pairs = zip(curves, choices, strict=True)
        return np.array([allowed[np.argmax(curve >= curve[-1] - loss)] for curve, allowed in pairs], dtype=np.int64)

    # counts only change at losses that a curve takes
    losses = np.unique(np.concatenate([[0.0], *(curve[-1] - curve for curve in curves)]))
    low, high = -1, len(losses) - 1  # `high` holds the budget: there every group is at its least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(counts_at(losses[middle])) else (middle, high)
    return counts_at(losses[high])
