"""How many channels each group keeps: projection onto a budget, uniform, one threshold for all, and the knapsack.

All allocations returned here are *maximal*: they keep the budget and no group can take one more channel
without breaking it. So searchers are compared at equal realised cost, to within the cost of one channel.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.budget import Limit

Counts = NDArray[np.int64]
_EDGE = 1e-4  # keep ratios are moved inside (0, 1) by this much before their logit is taken
_REACH = 40.0  # a shift of the logits by this much moves any ratio to the other end
_LEVEL = 1e-12  # of the full cost
STEPS_PER_GROUP = 64
"""Wide groups lose channels in steps of 1/64 of their width in the knapsack: finer steps change nothing."""


def project(keep: NDArray[np.float64], sizes: Counts, limit: Limit, smallest: Counts, largest: Counts) -> Counts:
    """Kept counts nearest in spirit to the asked ratios that keep the budget.

    All logits of the keep ratios are shifted by one number, found by bisection on the exact cost of the
    rounded plan; what is left of the budget is filled channel by channel in the order in which the shift
    would have reached them. An asked plan that keeps the budget and is maximal is returned unchanged.

    Args:
        keep: asked keep ratio of each group ``(groups,)``, in [0, 1].
        sizes: channels of each group ``(groups,)``.
        limit: the budget applied to the network.
        smallest: fewest channels each group may keep ``(groups,)``.
        largest: most channels each group may keep (what earlier rounds left) ``(groups,)``.
    """
    asked = _rounded(keep, sizes, smallest, largest)
    if limit.holds(asked) and not _can_grow(asked, limit, largest).any():
        return asked
    logits = _logit(np.clip(keep, _EDGE, 1 - _EDGE))

    def counts_at(shift: float) -> Counts:
        return _rounded(1 / (1 + np.exp(-(logits + shift))), sizes, smallest, largest)

    low, high = -_REACH, _REACH
    if limit.holds(counts_at(high)):
        return counts_at(high)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if limit.holds(counts_at(middle)) else (low, middle)
    return fill(counts_at(low), logits, sizes, limit, largest)


def fill(counts: Counts, logits: NDArray[np.float64], sizes: Counts, limit: Limit, largest: Counts) -> Counts:
    """Add channels one by one, those first whose group is nearest to its next one, until none fits."""
    counts = counts.copy()
    open_ = counts < largest
    while open_.any():
        threshold = _logit(np.clip((counts + 0.5) / sizes, _EDGE, 1 - _EDGE)) - logits
        group = int(np.argmin(np.where(open_, threshold, np.inf)))
        counts[group] += 1
        if not limit.holds(counts):
            counts[group] -= 1
            open_[group] = False  # costs only grow: what does not fit now will not fit later
        elif counts[group] >= largest[group]:
            open_[group] = False
    return counts


def uniform(sizes: Counts, limit: Limit, smallest: Counts, largest: Counts | None = None) -> Counts:
    """The same keep ratio in every group, as large as the budget allows."""
    largest = sizes if largest is None else largest
    return project(np.full(len(sizes), 0.5), sizes, limit, smallest, largest)


def threshold(
    scores: NDArray[np.float64],
    group_of: NDArray[np.int64],
    sizes: Counts,
    limit: Limit,
    smallest: Counts,
) -> Counts:
    """Count the units of each group above one threshold for the whole network, the lowest that keeps the budget.

    The best ``smallest`` units of each group are kept whatever they score. What is left of the budget is filled in the
    order of the scores with the units that still fit. Among equal scores earlier units come first.

    Args:
        scores: of each unit ``(units,)``, comparable across groups.
        group_of: group of each unit ``(units,)``.
        sizes: channels of each group ``(groups,)``.
        limit: the budget applied to the network.
        smallest: fewest channels each group may keep ``(groups,)``.
    """
    ranked = group_of[np.argsort(-scores, kind="stable")]
    rank = np.empty(len(ranked), dtype=np.int64)
    for group, size in enumerate(sizes.tolist()):
        rank[ranked == group] = np.arange(size)
    next_in = ranked[rank >= smallest[ranked]]  # the groups in the order in which they get one channel more

    def counts_at(amount: int) -> Counts:
        return smallest + np.bincount(next_in[:amount], minlength=len(sizes))

    low, high = 0, len(next_in) + 1  # `low` holds the budget, `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if limit.holds(counts_at(middle)) else (low, middle)
    counts, closed = counts_at(low), set()
    for group in next_in[low:].tolist():
        if group not in closed:
            counts[group] += 1
            if not limit.holds(counts):
                counts[group] -= 1
                closed.add(group)  # costs only grow: what does not fit now will not fit later
    return counts


def knapsack(
    scores: NDArray[np.float64],
    group_of: NDArray[np.int64],
    sizes: Counts,
    limit: Limit,
    smallest: Counts,
    largest: Counts | None = None,
) -> Counts:
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
        sizes: channels of each group ``(groups,)``.
        limit: the budget applied to the network.
        smallest: fewest channels each group may keep ``(groups,)``.
        largest: channels each group has left; the lowest scores are taken to be gone already.
    """
    counts = (sizes if largest is None else largest).copy()
    most = counts.copy()
    cumulative = [np.concatenate([[0.0], np.cumsum(np.sort(scores[group_of == g])[::-1])]) for g in range(len(sizes))]
    steps = np.maximum(1, sizes // STEPS_PER_GROUP)
    while limit.value(counts) > limit.most:
        group, amount = _cheapest_offer(counts, cumulative, steps, limit, smallest)
        counts[group] -= amount
    return _take_back(counts, cumulative, limit, most)


def _cheapest_offer(
    counts: Counts, cumulative: list[NDArray[np.float64]], steps: Counts, limit: Limit, smallest: Counts
) -> tuple[int, int]:
    """Which group gives up how many channels next: those worth least per unit of cost saved."""
    current = limit.value(counts)
    level = _LEVEL * limit.full  # saving less than that is rounding

    def saved(group: int, amount: int) -> float:
        counts[group] -= amount
        cost = limit.value(counts)
        counts[group] += amount
        return current - cost

    def worth(group: int, amount: int) -> float:
        return float(cumulative[group][counts[group]] - cumulative[group][counts[group] - amount])

    spare = counts - smallest
    single = {g: min(int(steps[g]), int(spare[g])) for g in np.flatnonzero(spare > 0).tolist()}
    savings = {g: saved(g, amount) for g, amount in single.items()}
    if max(savings.values()) <= level:
        cheapest = min(single, key=lambda g: worth(g, single[g]))
        return cheapest, single[cheapest]
    offers: list[tuple[float, int, int]] = []
    for group, amount in single.items():
        saving = savings[group]
        while saving <= level and amount < spare[group]:
            amount = min(amount + int(steps[group]), int(spare[group]))
            saving = saved(group, amount)
        if saving > level:
            offers.append((worth(group, amount) / saving, group, amount))
    _, group, amount = min(offers, key=lambda offer: offer[0])
    return group, amount


def _take_back(counts: Counts, cumulative: list[NDArray[np.float64]], limit: Limit, most: Counts) -> Counts:
    """Return to the plan, dearest first, every channel that still fits."""
    open_ = counts < most
    while open_.any():
        current = limit.value(counts)
        worth = np.full(len(counts), -np.inf)
        for group in np.flatnonzero(open_).tolist():
            counts[group] += 1
            cost = limit.value(counts)
            gain = cumulative[group][counts[group]] - cumulative[group][counts[group] - 1]
            counts[group] -= 1
            if cost > limit.most:
                open_[group] = False
            else:
                worth[group] = gain / max(cost - current, 1e-12)
        if open_.any():
            group = int(np.argmax(worth))
            counts[group] += 1
            open_[group] = counts[group] < most[group]
    return counts


def _rounded(keep: NDArray[np.float64], sizes: Counts, smallest: Counts, largest: Counts) -> Counts:
    return np.clip(np.floor(keep * sizes + 0.5).astype(np.int64), smallest, largest)


def _can_grow(counts: Counts, limit: Limit, largest: Counts) -> NDArray[np.bool_]:
    result = np.zeros(len(counts), dtype=np.bool_)
    for group in np.flatnonzero(counts < largest):
        grown = counts.copy()
        grown[group] += 1
        result[group] = limit.holds(grown)
    return result


def _logit(ratio: NDArray[np.float64]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.log(ratio / (1 - ratio))
    return result
