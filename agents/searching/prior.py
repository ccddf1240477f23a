"""What policies start from, as a searcher of its own and as a start for others."""

from __future__ import annotations

import numpy as np

from prunegym.agents.searching.search import Counts, LeastEvaluations, Search, SearchResult, SearchSettings
from prunegym.envs.prior import SHARES
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

LEAST_OF_PRIOR = LeastEvaluations(len(SHARES), " (one for each allocation that is tried)")


def prior(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
    """What policies start from: the best of the knapsack, the uniform allocation and halfway between them.

    Importances that are summed do not see a bottleneck, so on plain networks the knapsack may be far below uniform;
    on residual ones it is mostly above (:mod:`prunegym.envs.prior`). Three evaluations tell.
    """
    search = Search("prior", problem, budget, settings, least=LEAST_OF_PRIOR, choosing=False)
    best_prior(search)
    return search.result()


def best_prior(search: Search) -> Counts:
    """Score what policies may start from, and say which is best ``(groups,)``; of equal ones the first."""
    tried = [search.problem.prior_counts(search.limit, share) for share in SHARES]
    scores = [search.score(counts) for counts in tried]
    return tried[int(np.argmax(scores))]
