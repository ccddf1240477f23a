"""What an environment prunes: a network with its scorer, budgets and the plans it is measured against."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.allocation import knapsack, project, threshold, uniform
from prunegym.pruning.budget import Budget, LatencyModel, Limit, apply_budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer
from prunegym.pruning.statistics import Statistics

IMPORTANCE = "taylor_squared"
"""Criterion of the knapsack allocator: changes of the loss can be added and compared across groups."""


@dataclass
class PruningProblem:
    """One network, its data and the budgets it is to be pruned to.

    Searchers and environments share it, so that groups, criterion, recovery, projection and splits are the
    same for all that are compared.
    """

    scorer: Scorer
    budgets: tuple[Budget, ...]
    latency: LatencyModel | None = None
    """Needed for latency budgets; where it is given, latency is also known for other budgets."""
    smallest: NDArray[np.int64] | None = None
    """Fewest channels each group may keep ``(groups,)``; 1 by default."""
    limits: dict[Budget, Limit] = field(init=False)

    def __post_init__(self) -> None:
        if not self.budgets:
            raise PruningError("`budget` should be given at least once. Received none. Write for example `macs:0.5`.")
        if self.smallest is None:
            self.smallest = np.ones(len(self.scorer.network.graph.groups), dtype=np.int64)
        costs = self.scorer.network.costs
        self.limits = {budget: apply_budget(budget, costs, self.least, self.latency) for budget in self.budgets}

    def only(self, budget: Budget) -> PruningProblem:
        """The same problem with one of its budgets; the scorer and its memory are shared."""
        return PruningProblem(self.scorer, (budget,), self.latency, self.smallest)

    @property
    def least(self) -> NDArray[np.int64]:
        """Fewest channels each group may keep ``(groups,)``."""
        assert self.smallest is not None
        return self.smallest

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Channels of each group ``(groups,)``."""
        return self.scorer.network.graph.sizes

    def plan(self, counts: NDArray[np.int64], scores: NDArray[np.float64] | None = None) -> PruningPlan:
        """The plan that keeps the best channels of each group by the scorer's criterion (or ``scores``)."""
        graph = self.scorer.network.graph
        return PruningPlan.from_scores(graph, counts, self.scorer.unit_scores if scores is None else scores)

    def project(
        self, keep: NDArray[np.float64], limit: Limit, largest: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Counts for asked keep ratios that hold the limit, see :func:`.allocation.project`."""
        return project(keep, self.sizes, limit, self.least, self.sizes if largest is None else largest)

    def uniform_counts(self, limit: Limit, largest: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The uniform allocation."""
        return uniform(self.sizes, limit, self.least, largest)

    def knapsack_counts(
        self, limit: Limit, statistics: Statistics | None = None, largest: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The knapsack allocation on squared Taylor scores of ``statistics``, or the unpruned network's."""
        scorer = self.scorer
        scores = scorer.statistics.taylor_squared if statistics is None else statistics.taylor_squared
        group_of = scorer.network.graph.group_of
        return knapsack(scores, group_of, self.sizes, limit, self.least, largest)

    def threshold_counts(
        self, scores: NDArray[np.float64], limit: Limit, smallest: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """The allocation of one threshold on scores ``(units,)`` of the whole network.

        Each group keeps at least ``smallest (groups,)``, by default the fewest it may.

        Raises:
            PruningError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise PruningError(
                "`scores` should be finite. Received NaN or infinity. Check the weights of the network, or what makes "
                "the scores."
            )
        group_of = self.scorer.network.graph.group_of
        return threshold(scores, group_of, self.sizes, limit, self.least if smallest is None else smallest)

    def uniform_score(self, budget: Budget) -> Score:
        """Score of the uniform plan: what every reward is compared with."""
        return self.scorer.score(self.plan(self.uniform_counts(self.limits[budget])))
