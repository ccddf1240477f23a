"""What an environment prunes: a network with its scorer, budgets and the plans it is measured against."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from prunegym.envs.prior import KNAPSACK, UNIFORM, between
from prunegym.pruning.allocation import knapsack, project, threshold, uniform
from prunegym.pruning.budget import Budget, LatencyModel, Limit, apply_budget
from prunegym.pruning.cost import CostModel
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Score, Scorer
from prunegym.pruning.widths import WidthRules, Widths

IMPORTANCE = "residual_taylor"
"""Criterion of the knapsack allocator: changes of the outputs can be added and compared across groups."""


def plan_key(network: str, budget: object) -> str:
    """What plans for a network and a budget are kept under, in run folders too."""
    return f"{network} {budget}"


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
    rules: WidthRules | None = None
    """Alignment, fewest channels and bounds; by default groups may keep any count."""
    removed: tuple[str, ...] = ()
    """Paths of residual blocks that every plan leaves out."""
    priors: dict[Budget, float] = field(default_factory=dict)
    """Where policies start from: the share of the way from the uniform allocation to the knapsack's, by budget. By
    default the knapsack; see :func:`.choose_prior`."""
    limits: dict[Budget, Limit] = field(init=False)
    widths: Widths = field(init=False)
    """Counts that each group may keep."""

    def __post_init__(self) -> None:
        if not self.budgets:
            raise PruningError("`budget` should be given at least once. Received none. Write for example `macs:0.5`.")
        network = self.scorer.network
        self.widths = (self.rules or WidthRules()).apply(network.graph, strict=False)
        if self.removed and self.latency is not None:
            raise PruningError(
                "`--leave-out` should be given with a budget of MACs or parameters. Received a latency table, which "
                "knows nothing of blocks that are gone. Use macs: or params:."
            )
        self.limits = {budget: apply_budget(budget, self.costs, self.widths, self.latency) for budget in self.budgets}

    def only(self, budget: Budget) -> PruningProblem:
        """The same problem with one of its budgets; the scorer and its memory are shared."""
        return PruningProblem(self.scorer, (budget,), self.latency, self.rules, self.removed, dict(self.priors))

    def without(self, blocks: Iterable[str]) -> PruningProblem:
        """The same problem for plans that leave some residual blocks out."""
        removed = tuple(sorted({*self.removed, *blocks}))
        return PruningProblem(self.scorer, self.budgets, self.latency, self.rules, removed, dict(self.priors))

    def key(self, budget: Budget) -> str:
        """What plans for a budget are kept under, see :func:`plan_key`."""
        return plan_key(self.scorer.network.name, budget)

    def limit_of(self, plan: PruningPlan, budget: Budget) -> Limit:
        """A budget as it applies to a plan, which may leave out more blocks than all plans do."""
        further = set(plan.removed) - set(self.removed)
        return (self.without(further) if further else self).limits[budget]

    @property
    def costs(self) -> CostModel:
        """Costs of plans, from kept counts."""
        return self.scorer.network.costs_without(self.removed)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Channels of each group ``(groups,)``."""
        return self.scorer.network.graph.sizes

    def plan(self, counts: NDArray[np.int64], scores: NDArray[np.float64] | None = None) -> PruningPlan:
        """The plan that keeps the best channels of each group by the scorer's criterion (or ``scores``)."""
        graph = self.scorer.network.graph
        scores = self.scorer.unit_scores if scores is None else scores
        return PruningPlan.from_scores(graph, counts, scores).without(self.removed)

    def project(
        self, keep: NDArray[np.float64], limit: Limit, largest: NDArray[np.int64] | None = None
    ) -> NDArray[np.int64]:
        """Counts for asked keep ratios that hold the limit, see :func:`.allocation.project`."""
        return project(keep, limit, self._within(largest))

    def uniform_counts(self, limit: Limit, largest: NDArray[np.int64] | None = None) -> NDArray[np.int64]:
        """The uniform allocation."""
        return uniform(limit, self._within(largest))

    def knapsack_counts(
        self,
        limit: Limit,
        scores: NDArray[np.float64] | None = None,
        largest: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """The knapsack allocation on ``scores`` ``(units,)``, or the unpruned network's residual Taylor scores."""
        scores = self.scorer.statistics.residual_taylor if scores is None else scores
        return knapsack(scores, self.scorer.network.graph.group_of, limit, self._within(largest))

    def prior_counts(
        self,
        limit: Limit,
        share: float,
        scores: NDArray[np.float64] | None = None,
        largest: NDArray[np.int64] | None = None,
    ) -> NDArray[np.int64]:
        """The allocation that is so far from the uniform one (0) to the knapsack's (1)."""
        if share == UNIFORM:
            return self.uniform_counts(limit, largest)
        knapsack = self.knapsack_counts(limit, scores, largest)
        if share == KNAPSACK:
            return knapsack
        keep = between(self.uniform_counts(limit, largest), knapsack, self.sizes, share)
        return self.project(keep, limit, largest)

    def threshold_counts(
        self, scores: NDArray[np.float64], limit: Limit, widths: Widths | None = None
    ) -> NDArray[np.int64]:
        """The allocation of one threshold on scores ``(units,)`` of the whole network.

        Groups keep counts of ``widths``, by default any that they may.

        Raises:
            PruningError: a score is not finite.
        """
        if not np.isfinite(scores).all():
            raise PruningError(
                "`scores` should be finite. Received NaN or infinity. Check the weights of the network, or what makes "
                "the scores."
            )
        group_of = self.scorer.network.graph.group_of
        return threshold(scores, group_of, limit, self.widths if widths is None else widths)

    def uniform_score(self, budget: Budget, examples: int | None = None) -> Score:
        """Score of the uniform plan, on so many examples: what every reward is compared with."""
        return self.scorer.score(self.plan(self.uniform_counts(self.limits[budget])), examples=examples)

    def _within(self, largest: NDArray[np.int64] | None) -> Widths:
        return self.widths if largest is None else self.widths.within(largest)
