"""How many channels each group keeps: projection onto a budget, the uniform allocation and the knapsack.

All allocations returned here are *maximal*: they keep the budget and no group can take one more step (a channel,
or as many as the alignment asks for, see ``widths.py``) without breaking it. So searchers are compared at equal
realised cost, to within the cost of one step.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.budget import Limit
from prunegym.pruning.widths import Counts, Widths

_EDGE = 1e-4  # keep ratios are moved inside (0, 1) by this much before their logit is taken
_REACH = 40.0  # a shift of the logits by this much moves any ratio to the other end
STEPS_PER_GROUP = 64
"""Wide groups lose channels in steps of 1/64 of their width in the knapsack: finer steps change nothing."""


def project(keep: NDArray[np.float64], limit: Limit, widths: Widths) -> Counts:
    """Kept counts nearest in spirit to the asked ratios that keep the budget.

    All logits of the keep ratios are shifted by one number, found by bisection on the exact cost of the
    rounded plan; what is left of the budget is filled step by step in the order in which the shift
    would have reached them. An asked plan that keeps the budget and is maximal is returned unchanged.

    Args:
        keep: asked keep ratio of each group ``(groups,)``, in [0, 1].
        limit: the budget applied to the network.
        widths: counts that each group may keep.
    """
    asked = widths.nearest(keep)
    if limit.holds(asked) and not _can_grow(asked, limit, widths).any():
        return asked
    logits = _logit(np.clip(keep, _EDGE, 1 - _EDGE))

    def counts_at(shift: float) -> Counts:
        return widths.nearest(1 / (1 + np.exp(-(logits + shift))))

    low, high = -_REACH, _REACH
    if limit.holds(counts_at(high)):
        return counts_at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if limit.holds(counts_at(middle)) else (low, middle)
    return fill(counts_at(low), logits, limit, widths)


def fill(counts: Counts, logits: NDArray[np.float64], limit: Limit, widths: Widths) -> Counts:
    """Add steps one by one, those first whose group is nearest to its next one, until none fits."""
    counts = counts.copy()
    open_ = counts < widths.largest
    while open_.any():
        larger = widths.up(counts)
        middle = (counts + larger) / 2 / widths.sizes
        threshold = _logit(np.clip(middle, _EDGE, 1 - _EDGE)) - logits
        group = int(np.argmin(np.where(open_, threshold, np.inf)))
        before, counts[group] = counts[group], larger[group]
        if not limit.holds(counts):
            counts[group] = before
            open_[group] = False  # costs only grow: what does not fit now will not fit later
        elif counts[group] >= widths.largest[group]:
            open_[group] = False
    return counts


def uniform(limit: Limit, widths: Widths) -> Counts:
    """The same keep ratio in every group, as large as the budget allows."""
    return project(np.full(len(widths.sizes), 0.5), limit, widths)


def knapsack(scores: NDArray[np.float64], group_of: NDArray[np.int64], limit: Limit, widths: Widths) -> Counts:
    """Give up what is worth least per unit of cost, until the budget holds.

    Greedy solution of the knapsack over channels (as in Shen et al., "Structural Pruning via Latency-Saliency
    Knapsack", NeurIPS 2022): at every step the group whose least important channels are worth least per unit
    of cost saved loses them; then what fits is taken back.

    Args:
        scores: importance of each unit ``(units,)``, additive and comparable across groups, such as squared
            Taylor.
        group_of: group of each unit ``(units,)``.
        limit: the budget applied to the network.
        widths: counts that each group may keep; of the units above the largest count the lowest scores are
            taken to be gone already.
    """
    counts, groups = widths.largest.copy(), range(len(widths.sizes))
    cumulative = [np.concatenate([[0.0], np.cumsum(np.sort(scores[group_of == g])[::-1])]) for g in groups]
    least_step = np.maximum(1, widths.sizes // STEPS_PER_GROUP)
    current = limit.value(counts)
    while current > limit.most:
        smaller = widths.floor(counts - least_step)
        best, best_price, best_cost = -1, np.inf, current
        for group in np.flatnonzero(smaller < counts).tolist():
            before, counts[group] = counts[group], smaller[group]
            cost = limit.value(counts)
            counts[group] = before
            worth = cumulative[group][before] - cumulative[group][smaller[group]]
            saved = current - cost
            price = worth / saved if saved > 0 else np.inf
            if price < best_price or best < 0:
                best, best_price, best_cost = group, price, cost
        counts[best] = smaller[best]
        current = best_cost
    return _take_back(counts, cumulative, limit, widths)


def _take_back(counts: Counts, cumulative: list[NDArray[np.float64]], limit: Limit, widths: Widths) -> Counts:
    """Return to the plan, dearest first, every step that still fits."""
    open_ = counts < widths.largest
    while open_.any():
        current = limit.value(counts)
        larger = widths.up(counts)
        worth = np.full(len(counts), -np.inf)
        for group in np.flatnonzero(open_).tolist():
            before, counts[group] = counts[group], larger[group]
            cost = limit.value(counts)
            counts[group] = before
            gain = cumulative[group][larger[group]] - cumulative[group][before]
            if cost > limit.most:
                open_[group] = False
            else:
                worth[group] = gain / max(cost - current, 1e-12)
        if open_.any():
            group = int(np.argmax(worth))
            counts[group] = larger[group]
            open_[group] = counts[group] < widths.largest[group]
    return counts


def _can_grow(counts: Counts, limit: Limit, widths: Widths) -> NDArray[np.bool_]:
    result = np.zeros(len(counts), dtype=np.bool_)
    larger = widths.up(counts)
    for group in np.flatnonzero(counts < widths.largest):
        grown = counts.copy()
        grown[group] = larger[group]
        result[group] = limit.holds(grown)
    return result


def _logit(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(ratio / (1 - ratio))
    return result
