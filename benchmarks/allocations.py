"""Allocations from uniform to extreme, all of the same cost: what a reward has to tell apart.

The list depends on the network, the budget and the seed alone; a longer one begins like a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

_EDGE = 1e-3
#: Logits from the first to the last group.
_SLOPES = (1.5, 4.0)
#: Of the random allocations: standard deviation of the logits, and concentration; used in turn, spread growing.
_SPREADS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0, 2.5, 3.0)
_CONCENTRATIONS = (50.0, 20.0, 10.0, 5.0, 3.0, 2.0, 1.5, 1.0, 0.7, 0.5)


@dataclass(frozen=True)
class Allocation:
    """How many channels each group keeps, and how that was chosen."""

    name: str
    counts: NDArray[np.int64]
    """``(groups,)``; no group can take one more channel without breaking the budget."""

    @property
    def text(self) -> str:
        """The counts as they stand in a table."""
        return " ".join(map(str, self.counts.tolist()))


def allocations(problem: PruningProblem, budget: Budget, count: int, seed: int = 0) -> list[Allocation]:
    """Distinct allocations of one budget.

    Args:
        problem: The network.
        budget: What may remain.
        count: How many.
        seed: Of the random ones.
    """
    limit = problem.limits[budget]
    found: dict[bytes, Allocation] = {}
    for name, keep in _asked(problem, budget, seed):
        counts = problem.knapsack_counts(limit) if name == "knapsack" else problem.project(keep, limit)
        found.setdefault(counts.tobytes(), Allocation(name, counts))
        if len(found) == count:
            break
    return list(found.values())


def _asked(problem: PruningProblem, budget: Budget, seed: int) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """Names and keep ratios ``(groups,)``, without end."""
    groups = len(problem.sizes)
    depth = np.linspace(-0.5, 0.5, groups)
    knapsack = problem.knapsack_counts(problem.limits[budget]) / problem.sizes
    yield "uniform", np.full(groups, 0.5)
    yield "knapsack", knapsack
    yield "knapsack upside down", _sigmoid(-_logit(knapsack))
    yield "halfway to the knapsack", _sigmoid(_logit(knapsack) / 2)
    for slope in _SLOPES:
        yield f"ramp, early groups lose {slope:g}", _sigmoid(slope * depth)
        yield f"ramp, late groups lose {slope:g}", _sigmoid(-slope * depth)
    yield "hump, the ends lose", _sigmoid(2 - 16 * depth**2)
    yield "hollow, the middle loses", _sigmoid(16 * depth**2 - 2)
    rng = np.random.default_rng(seed)
    # single groups last among the named ones: of a network with few groups they repeat others
    for group in rng.permutation(groups)[:2].tolist():
        for name, logit in (("keeps all", 8.0), ("loses most", -8.0)):
            yield f"group {group} {name}", _sigmoid(np.where(np.arange(groups) == group, logit, 0.0))
    while True:
        for spread, concentration in zip(_SPREADS, _CONCENTRATIONS, strict=True):
            yield f"logit-normal {spread:g}", _sigmoid(rng.normal(0.0, spread, groups))
            shares = rng.dirichlet(np.full(groups, concentration)) * groups / 2
            yield f"Dirichlet {concentration:g}", np.clip(shares, _EDGE, 1 - _EDGE)


def _sigmoid(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    ratios: NDArray[np.float64] = 1 / (1 + np.exp(-logits))
    return ratios


def _logit(ratios: NDArray[np.float64]) -> NDArray[np.float64]:
    inner = np.clip(ratios, _EDGE, 1 - _EDGE)
    logits: NDArray[np.float64] = np.log(inner / (1 - inner))
    return logits
