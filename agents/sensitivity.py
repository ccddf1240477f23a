"""Sensitivity curves: how much score each group loses by itself, and one tolerated loss for all groups.

What practitioners' tools do: AIMET's greedy compression-ratio selection and ModelOpt's FastNAS measure one group at a
time and then search for the loss at which the whole network meets the budget.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.search import Counts, Search, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

Curve = NDArray[np.float64]


def sensitivity(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Prune each group as far as one common loss of score allows; the loss is found by bisection.

    The curve of a group is measured on the reward split with all other groups whole, after the same recovery as every
    plan, at as many evenly spaced widths as the allowance gives each group, the narrowest always among them. Between
    the widths it is interpolated, and it is made to rise with the width. Every measurement is an evaluation; so is the
    unpruned network's, and the final plan's. The rest of the budget is filled by the projection.

    Raises:
        PruningError: the allowance is less than two evaluations and one for each group.
    """
    groups = len(problem.sizes)
    reason = f" (one for each of the {groups} groups, one for the unpruned network and one for the plan)"
    search = Search("sensitivity", problem, budget, settings, least=groups + 2, reason=reason)
    points = (search.left - 2) // groups
    unpruned = search.probe(problem.sizes)
    curves = [_measure(search, group, points, unpruned) for group in range(groups)]
    counts = counts_within_loss(curves, problem.least, search.limit.holds)
    search.ask(counts / problem.sizes)
    return search.result()


def _measure(search: Search, group: int, points: int, unpruned: float) -> Curve:
    """Score of the network with ``least`` to all channels of one group, the others whole ``(widths,)``."""
    least, size = int(search.problem.least[group]), int(search.problem.sizes[group])
    widths = np.unique(np.linspace(least, size, points + 1).round().astype(np.int64))[:-1]
    scores = []
    for width in widths.tolist():
        counts = search.problem.sizes.copy()
        counts[group] = width
        scores.append(search.probe(counts))
    return rising_curve(widths, np.array(scores), np.arange(least, size + 1), unpruned)


def rising_curve(widths: Counts, scores: Curve, wanted: Counts, unpruned: float) -> Curve:
    """Interpolate measured scores, made to rise with the width and to end at the unpruned network's.

    Args:
        widths: channels kept where the score was measured ``(points,)``, rising, without the full width.
        scores: what was measured ``(points,)``.
        wanted: channels kept where the score is wanted ``(widths,)``; the last is the full width.
        unpruned: score of the unpruned network.
    """
    rising = np.minimum(np.maximum.accumulate(scores), unpruned)
    curve: Curve = np.interp(wanted, [*widths, wanted[-1]], [*rising, unpruned])
    return curve


def counts_within_loss(curves: Sequence[Curve], least: Counts, holds: Callable[[Counts], bool]) -> Counts:
    """The fewest channels that lose no more than a common loss, the smallest one that the budget allows.

    Args:
        curves: for each group the score with ``least`` to all of its channels; rising, ending alike.
        least: fewest channels each group may keep ``(groups,)``.
        holds: whether counts ``(groups,)`` keep the budget; ``least`` does.
    """

    def counts_at(loss: float) -> Counts:
        kept = [int(np.argmax(curve >= curve[-1] - loss)) for curve in curves]
        return least + np.array(kept, dtype=np.int64)

    # counts only change at losses that a curve takes
    losses = np.unique(np.concatenate([[0.0], *(curve[-1] - curve for curve in curves)]))
    low, high = -1, len(losses) - 1  # `high` holds the budget: there every group is at its least
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(counts_at(losses[middle])) else (middle, high)
    return counts_at(losses[high])
