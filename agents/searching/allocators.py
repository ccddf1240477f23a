"""Allocators: searchers that score no plan. Each is one rule for how many channels every group keeps.

Three of them hold one threshold against the channels of the whole network and differ in what makes scores of different
layers comparable. They decide how many channels a group keeps; which ones is up to the scorer's criterion, as for all
searchers. In groups that several layers make (shortcuts), squared norms are added over those layers.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.searching.search import Counts, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget, Limit

Scores = NDArray[np.float64]


def uniform(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """The same keep ratio in every group."""
    return _allocated(problem, budget, problem.uniform_counts)


def knapsack(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Residual Taylor importance per unit of cost, in one pass; see :mod:`prunegym.pruning.importance.residuals`.

    The cost is that of the budget: MACs, parameters, or the latency of the table.
    """
    return _allocated(problem, budget, problem.knapsack_counts)


def halp(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Squared Taylor importance per unit of cost, in one pass.

    As in Shen et al., "Structural Pruning via Latency-Saliency Knapsack" (HALP), NeurIPS 2022. HALP solves its knapsack
    by dynamic programming over groups of channels as wide as the table's steps, with the cost of a channel fixed
    beforehand; here the greedy rule always sees the exact cost of the whole plan, and gives up as many channels at once
    as latency needs to fall.
    """
    scores = problem.scorer.statistics.taylor_squared
    return _allocated(problem, budget, lambda limit: problem.knapsack_counts(limit, scores))


def global_magnitude(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """One threshold on filter norms, each divided by the Euclidean norm of all norms of its group.

    That is the layer-wise normalisation that Molchanov et al., "Pruning Convolutional Neural Networks for Resource
    Efficient Inference", ICLR 2017, need to compare layers. Norms are L1 where the scorer's criterion is `l1`, so that
    ranks within and across groups come from the same numbers, else L2.
    """
    norm = "l1" if problem.scorer.settings.criterion == "l1" else "l2"

    def allocate(limit: Limit) -> Counts:
        norms = problem.scorer.criterion_scores(norm)
        return problem.threshold_counts(normalised(norms, _group_of(problem)), limit)

    return _allocated(problem, budget, allocate)


def lamp(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """One threshold on LAMP scores of channels, see :func:`lamp_scores`."""

    def allocate(limit: Limit) -> Counts:
        energies = np.square(problem.scorer.criterion_scores("l2"))
        return problem.threshold_counts(lamp_scores(energies, _group_of(problem)), limit)

    return _allocated(problem, budget, allocate)


def global_taylor(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """One threshold on squared Taylor importance, summed over all readers of a channel, without normalisation.

    As in Molchanov et al., "Importance Estimation for Neural Network Pruning", CVPR 2019. It is the knapsack without
    the price: what a channel costs is not looked at.
    """
    scores = problem.scorer.statistics.taylor_squared
    return _allocated(problem, budget, lambda limit: problem.threshold_counts(scores, limit))


def normalised(norms: Scores, group_of: NDArray[np.int64]) -> Scores:
    """Scores ``(units,)`` divided by the Euclidean norm of those of their group."""
    length = np.sqrt(np.bincount(group_of, weights=np.square(norms)))
    length[length == 0] = 1.0
    result: Scores = norms / length[group_of]
    return result


def lamp_scores(energies: Scores, group_of: NDArray[np.int64]) -> Scores:
    r"""LAMP scores of channels ``(units,)`` from their energies, the squared norms of their filters ``(units,)``.

    Lee et al., "Layer-adaptive Sparsity for the Magnitude-based Pruning", ICLR 2021, score single weights of a layer.
    With the energy of a channel in place of the square of a weight, the same reads

    .. math:: s_u = \frac{e_u}{\sum_{v: e_v \ge e_u} e_v}

    over the channels of a group: what the channel carries as a share of what would be left with it. The largest
    channel of every group scores 1, so no group is ever emptied. Among equal energies the earlier channel counts as
    the larger one.
    """
    scores = np.zeros(len(energies))
    for group in range(int(group_of.max(initial=-1)) + 1):
        mine = np.flatnonzero(group_of == group)
        order = mine[np.argsort(-energies[mine], kind="stable")]
        left = np.cumsum(energies[order])
        scores[order] = np.where(left > 0, energies[order] / np.where(left > 0, left, 1.0), 0.0)
        scores[order[0]] = 1.0  # also in a group of zeros
    return scores


def _group_of(problem: PruningProblem) -> NDArray[np.int64]:
    return problem.scorer.network.graph.group_of


def _allocated(problem: PruningProblem, budget: Budget, allocate: Callable[[Limit], Counts]) -> SearchResult:
    started = time.perf_counter()
    plan = problem.plan(allocate(problem.limits[budget]))
    return SearchResult(plan=plan, evaluations=0, seconds=time.perf_counter() - started)
