"""How many channels each group keeps: projection onto a budget, uniform, one threshold for all, and the knapsack.

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
_LEVEL = 1e-12  # of the full cost
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


def threshold(scores: NDArray[np.float64], group_of: NDArray[np.int64], limit: Limit, widths: Widths) -> Counts:
    """Count the units of each group above one threshold for the whole network, the lowest that keeps the budget.

    Where a group is cut in steps of several units, a step stands or falls by the mean of their scores. Each group
    keeps its smallest count whatever it scores. What is left of the budget is filled in the order of the scores with
    the steps that still fit. Among equal scores earlier groups come first.

    Args:
        scores: of each unit ``(units,)``, comparable across groups.
        group_of: group of each unit ``(units,)``.
        limit: the budget applied to the network.
        widths: counts that each group may keep.
    """
    choices = widths.choices()
    steps = [_step_means(scores[group_of == group], counts) for group, counts in enumerate(choices)]
    group_of_step = np.repeat(np.arange(len(steps)), [len(one) for one in steps])
    # the groups in the order in which they get one step more
    next_in = group_of_step[np.argsort(-np.concatenate(steps), kind="stable")]

    def counts_at(amount: int) -> Counts:
        taken = np.bincount(next_in[:amount], minlength=len(choices)).tolist()
        return np.array([counts[index] for counts, index in zip(choices, taken, strict=True)], dtype=np.int64)

    low, high = 0, len(next_in) + 1  # `low` holds the budget, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if limit.holds(counts_at(middle)) else (low, middle)
    counts = counts_at(low)
    open_ = counts < widths.largest
    for group in next_in[low:].tolist():
        if open_[group]:
            before, counts[group] = counts[group], widths.up(counts)[group]
            if not limit.holds(counts):
                counts[group] = before
                open_[group] = False  # costs only grow: what does not fit now will not fit later
    return counts


def _step_means(scores: NDArray[np.float64], counts: Counts) -> NDArray[np.float64]:
    """Mean score of the units that each step adds ``(choices - 1,)``, the best units first."""
    ranked = np.sort(scores)[::-1][: counts[-1]]
    means: NDArray[np.float64] = np.add.reduceat(ranked, counts[:-1]) / np.diff(counts)
    return means


def knapsack(scores: NDArray[np.float64], group_of: NDArray[np.int64], limit: Limit, widths: Widths) -> Counts:
    """Give up what is worth least per unit of cost, until the budget holds.

    Greedy solution of the knapsack over channels (as in Shen et al., "Structural Pruning via Latency-Saliency
    Knapsack", NeurIPS 2022): at every step the group whose least important channels are worth least per unit
    of cost saved loses them; then what fits is taken back. Where the cost falls in stairs, as latency may, a group on
    a level part offers as many channels at once as it takes to save something. While no group saves anything by one
    step (a latency model that is bounded from above), the step that is worth least is taken.

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
    while limit.value(counts) > limit.most:
        group, count = _cheapest_offer(counts, cumulative, limit, widths)
        counts[group] = count
    return _take_back(counts, cumulative, limit, widths)


def _cheapest_offer(
    counts: Counts, cumulative: list[NDArray[np.float64]], limit: Limit, widths: Widths
) -> tuple[int, int]:
    """Which group goes down to which count next: what it gives up is worth least per unit of cost saved."""
    bite = np.maximum(1, widths.sizes // STEPS_PER_GROUP)
    current = limit.value(counts)
    level = _LEVEL * limit.full  # saving less than that is rounding

    def saved(group: int, count: int) -> float:
        before, counts[group] = counts[group], count
        cost = limit.value(counts)
        counts[group] = before
        return current - cost

    def worth(group: int, count: int) -> float:
        return float(cumulative[group][counts[group]] - cumulative[group][count])

    smaller, waiting = widths.floor(counts - bite), np.flatnonzero(counts > widths.smallest).tolist()
    offers: list[tuple[float, int, int]] = []
    while waiting:
        below = {group: int(smaller[group]) for group in waiting}
        savings = {group: saved(group, count) for group, count in below.items()}
        saving = {group: amount for group, amount in savings.items() if amount > level}
        offers += [(worth(group, below[group]) / amount, group, below[group]) for group, amount in saving.items()]
        if not offers:  # in the first turn: no group saves anything by one bite
            group = min(below, key=lambda one: worth(one, below[one]))
            return group, below[group]
        waiting = [one for one in waiting if one not in saving and below[one] > widths.smallest[one]]
        smaller = widths.floor(smaller - bite)
    _, group, count = min(offers, key=lambda offer: offer[0])
    return group, count


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
