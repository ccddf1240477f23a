"""Means with bootstrap intervals, paired differences, and performance profiles of searchers.

What is resampled are *problems*, (network, budget) pairs, each of which counts as the mean of its runs: runs of one
problem differ by their seed only and say nothing about other networks. Where there is one problem, its runs are
resampled instead, and an interval is about that problem alone. The intervals are percentiles, which are too narrow for
few problems: with three, a nominal 95 % covers less.

References:
    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993.
    Dolan and Moré, "Benchmarking optimization software with performance profiles", Mathematical Programming 2002.
    Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS 2021.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]
Runs: TypeAlias = Sequence[Sequence[float]]
"""For each problem the figures of its runs, in the order of their seeds."""

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean with its bootstrap interval, which is None where a single figure leaves nothing to resample."""

    mean: float
    low: float | None = None
    high: float | None = None


def mean_interval(runs: Runs, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """The mean over problems, each counted as the mean of its runs.

    Args:
        runs: At least one problem with at least one run.
        level: Share of the bootstrap means that the interval holds, in (0, 1).
        resamples: Bootstrap samples.
        seed: Of the resampling.
    """
    units = _units(runs)
    mean = float(np.mean(units))
    if len(units) < 2:
        return Interval(mean)
    means = units[_resampled(len(units), resamples, seed)].mean(axis=1)
    low, high = np.quantile(means, ((1 - level) / 2, (1 + level) / 2)).tolist()
    return Interval(mean, low, high)


def difference_interval(
    runs: Runs, others: Runs, *, level: float = LEVEL, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Mean of ``runs - others``, paired run by run: what the problems have in common cancels.

    Raises:
        ValueError: The two do not hold the same problems and runs.
    """
    paired = [[a - b for a, b in zip(one, other, strict=True)] for one, other in zip(runs, others, strict=True)]
    return mean_interval(paired, level=level, resamples=resamples, seed=seed)


@dataclass(frozen=True)
class Profile:
    """Share of runs within so much of the best run of their problem."""

    behind: Array
    """Distances to the best run ``(points,)``, ascending from 0."""
    share: Array
    """Share of runs at most so far behind ``(points,)``; problems count equally."""
    low: Array
    high: Array
    """Pointwise bootstrap band ``(points,)``."""


def performance_profiles(
    scores: Mapping[str, Runs], *, level: float = LEVEL, resamples: int = 2000, points: int = 200, seed: int = 0
) -> dict[str, Profile]:
    r"""How often each searcher comes how close to the best.

    .. math:: \rho_s(\tau) = \mathrm{mean}_p \; \mathrm{mean}_r \; [\max_{s', r'} x_{s'pr'} - x_{spr} \le \tau]

    Differences take the place of Dolan and Moré's ratios, because accuracies have no natural zero. The curve further
    to the left and above is the better one; where curves cross, neither searcher is better throughout.

    Args:
        scores: Searcher -> its runs on the same problems in the same order, higher is better.
        level: Of the bands.
        resamples: Bootstrap samples.
        points: Distances at which the profiles are computed, from 0 to the largest that occurs.
        seed: Of the resampling.
    """
    problems = range(len(next(iter(scores.values()))))
    best = [max(max(runs[problem]) for runs in scores.values()) for problem in problems]
    behind = {name: [best[p] - np.asarray(runs[p], np.float64) for p in problems] for name, runs in scores.items()}
    grid = np.linspace(0, max(float(one.max()) for runs in behind.values() for one in runs), points)
    return {name: _profile(runs, grid, level, resamples, seed) for name, runs in behind.items()}


def _profile(behind: Sequence[Array], grid: Array, level: float, resamples: int, seed: int) -> Profile:
    """One searcher's profile, from its distances to the best run of each problem."""
    # a hair's breadth: distances are differences of floats, and the best run is at 0 exactly
    within = [(one[:, None] <= grid + 1e-12).astype(np.float64) for one in behind]  # (runs, points)
    units = within[0] if len(within) == 1 else np.stack([one.mean(axis=0) for one in within])
    share = units.mean(axis=0)
    if len(units) < 2:
        return Profile(grid, share, share, share)
    sampled = units[_resampled(len(units), resamples, seed)].mean(axis=1)  # (resamples, points)
    low, high = np.quantile(sampled, ((1 - level) / 2, (1 + level) / 2), axis=0)
    return Profile(grid, share, low, high)


def _units(runs: Runs) -> Array:
    """What is resampled: the mean of each problem, or the runs of the only one."""
    if len(runs) == 1:
        return np.asarray(runs[0], np.float64)
    return np.asarray([np.mean(one) for one in runs], np.float64)


def _resampled(count: int, resamples: int, seed: int) -> NDArray[np.int64]:
    """Numbers of the units drawn, with replacement ``(resamples, count)``."""
    return np.random.default_rng(seed).integers(count, size=(resamples, count))
