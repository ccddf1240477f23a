"""NetAdapt: a step of the budgeted resource at a time, taken from the group that misses it least."""

from __future__ import annotations

import numpy as np

from prunegym.agents.searching.search import Counts, LeastEvaluations, Search, SearchResult, SearchSettings
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget, Limit
from prunegym.pruning.widths import Widths


def netadapt(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """Greedy search down to the budget from the unpruned network, or the widest one that bounds on widths allow.

    Yang et al., "NetAdapt: Platform-Aware Neural Network Adaptation for Mobile Applications", ECCV 2018. Each
    iteration lowers the resource (MACs, parameters or the latency of the table) by a step: one proposal for each
    group, which alone gives up as many channels as the step takes; the proposal with the best score after recovery
    wins, of equal ones the cheapest. A group that cannot give the step by itself makes no proposal.

    Ours is how this fits an allowance: every step is the smallest that the rest of the allowance pays for, if as many
    groups make a proposal in the iterations to come and all do in the last. So steps are equal where all groups make
    one throughout. Where no group can give the step by itself, each offers all it has. The proposals of the last
    iteration are projected onto the budget. NetAdapt's short fine-tuning is the scorer's recovery (training steps with
    `distill`), and the channels that stay are those of the scorer's criterion.

    Raises:
        PruningError: the allowance does not hold one evaluation for each group that may be pruned.
    """
    search = Search("netadapt", problem, budget, settings, least=least_evaluations(problem))
    limit, counts = search.limit, problem.widths.largest
    while not limit.holds(counts) and (offers := affordable(search, counts)):
        counts = max(((search.probe(one), -limit.value(one), one) for one in offers), key=lambda one: one[:2])[2]
    last = [counts] if limit.holds(counts) else proposals(counts, limit.most, limit, problem.widths)
    for one in last:
        search.ask(one / problem.sizes)
    return search.result()


def least_evaluations(problem: PruningProblem) -> LeastEvaluations:
    """One iteration, in which every group makes a proposal."""
    groups = _prunable(problem.widths)
    return LeastEvaluations(max(1, groups), f" (one for each of the {groups} groups that may be pruned)")


def _prunable(widths: Widths) -> int:
    """Number of groups that may be pruned."""
    return int((widths.smallest < widths.largest).sum())


def affordable(search: Search, counts: Counts) -> list[Counts]:
    """Proposals for the smallest step that the allowance pays for; none if the next iteration must be the last."""
    limit, widths, cost = search.limit, search.problem.widths, search.limit.value(counts)
    groups = _prunable(widths)
    spare = search.left - groups  # the last iteration may need one for each group

    def offers_at(iterations: int) -> list[Counts]:
        return proposals(counts, cost - (cost - limit.most) / iterations, limit, widths)

    # smaller steps take more iterations, and more groups can give them: bisection over the number of iterations
    low, high = spare // groups + 1, spare + 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (middle - 1) * len(offers_at(middle)) <= spare else (low, middle)
    return offers_at(low) if low > 1 else []


def proposals(counts: Counts, target: float, limit: Limit, widths: Widths) -> list[Counts]:
    """What one iteration tries: for each group that can, as many channels fewer as the target takes.

    Args:
        counts: what the last iteration left ``(groups,)``.
        target: the most that may remain of the resource.
        limit: measures the resource.
        widths: counts that each group may keep.

    Returns:
        Counts ``(groups,)`` that differ from ``counts`` in one group; if no group alone can reach the target, all that
        each one has.
    """
    reaching, offering = [], []
    choices = widths.choices()
    for group in np.flatnonzero(counts > widths.smallest).tolist():
        proposal = counts.copy()
        proposal[group] = widths.smallest[group]
        offering.append(proposal)
        if limit.value(proposal) <= target:
            allowed = choices[group][choices[group] <= counts[group]]
            reaching.append(_widest(counts, group, allowed, target, limit))
    return reaching or offering


def _widest(counts: Counts, group: int, allowed: Counts, target: float, limit: Limit) -> Counts:
    """The counts with one group as wide as the target allows, by bisection; the first allowed is narrow enough."""
    proposal = counts.copy()
    low, high = 0, len(allowed)
    while high - low > 1:
        middle = (low + high) // 2
        proposal[group] = allowed[middle]
        low, high = (middle, high) if limit.value(proposal) <= target else (low, middle)
    proposal[group] = allowed[low]
    return proposal
