"""What searchers share: the protocol, the count of evaluations, and what none of them may do.

A searcher is ``(problem, budget, settings) -> result``. It decides how many channels each group keeps: recovery,
projection onto the budget and scoring are those of the :class:`~prunegym.envs.setting.PruningProblem` that all share,
and so is the criterion by which channels of a group stay. Some methods of the literature decide more, which is what
they are about: `dcpa` leaves out residual blocks, `laasp` and `attention` choose channels by criteria of their own.

An evaluation is one plan that a searcher asks to be scored. It counts whether or not the scorer remembers the plan:
else the price of a search would depend on what ran before it, and a searcher that repeats itself would look cheap.
Work that is no scoring of a plan, such as training steps, is paid for in evaluations too (:meth:`Search.pay`), at
:func:`evaluations_per_step`. What policies and `attention` see of a network between rounds is not: their seconds tell.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from prunegym.agents.searching.second_look import CONFIRMING, best_on_twice, confirmed_plans, has_further_images
from prunegym.agents.searching.trail import Improvement, Trail
from prunegym.envs.prior import TRIALS
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.errors import PruningError
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import RECOVERY_BATCH
from prunegym.pruning.scoring import QUICK_EXAMPLES, QUICK_STEPS, ScorerSettings

Counts: TypeAlias = NDArray[np.int64]

_RUNS_PER_STEP = 3  # forwards, and backwards for as much as two

LOWEST = 0.05
"""Least keep ratio that random search, TPE and evolution ask for; the projection may still go below."""


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What a searcher may spend."""

    evaluations: int = 0
    """Plans it may score; allocators need none."""
    seed: int = 0
    """Of the one random generator that each searcher has."""
    policy: Path | None = None
    """Policy file of the searcher `policy`."""
    rounds: int | None = None
    """Rounds of pruning; by default those the policy was trained with, and 3 for `attention`."""
    progress: bool = False
    clock: Callable[[], float] = time.perf_counter
    """Gives seconds; that of a store of evaluations counts those before an interruption too."""


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a searcher found and what it paid."""

    plan: PruningPlan
    evaluations: int
    """Plans that were asked to be scored, each time it was asked."""
    seconds: float
    history: list[tuple[int, float]] = field(default_factory=list)
    """Best score on the reward split after so many evaluations, for each evaluation from the first plan within the
    budget on (searchers that also score plans above the budget, as steps on their way, begin later)."""
    improvements: list[Improvement] = field(default_factory=list)
    """The plans that were best for a while, the last of them the result; see
    :class:`~prunegym.agents.searching.trail.Trail`."""
    latency: dict[str, Any] | None = None
    """For a latency budget: what was measured of the plan, see :mod:`prunegym.agents.searching.latency_budget`."""


Searcher: TypeAlias = Callable[[PruningProblem, Budget, SearchSettings], SearchResult]


@dataclass(frozen=True)
class LeastEvaluations:
    """The fewest evaluations that a searcher can do with."""

    number: int
    reason: str = ""
    """Why so many, to follow "at least N for searcher NAME"."""

    def check(self, searcher: str, evaluations: int) -> None:
        """Refuse fewer.

        Raises:
            PruningError: fewer are allowed.
        """
        if evaluations < self.number:
            raise PruningError(
                f"`--evaluations` should be at least {self.number} for searcher {searcher}{self.reason}. "
                f"Received {evaluations}. Allow more plans, or leave the searcher out."
            )


ONE_PLAN = LeastEvaluations(1)


class Search:
    """A search under way: scores what is asked within the allowance, and notes it in a trail.

    Args:
        name: of the searcher, for messages.
        problem: what is pruned.
        budget: what may remain.
        settings: allowance and seed.
        least: evaluations that the searcher cannot do without.
        choosing: the result is the best of many plans, so the best few deserve a second look. False for a searcher that
            comes to one plan.

    Raises:
        PruningError: fewer evaluations are allowed than are needed.
    """

    def __init__(
        self,
        name: str,
        problem: PruningProblem,
        budget: Budget,
        settings: SearchSettings,
        *,
        least: LeastEvaluations = ONE_PLAN,
        choosing: bool = True,
    ) -> None:
        least.check(name, settings.evaluations)
        self.name = name
        self.problem = problem
        self.budget = budget
        self.limit = problem.limits[budget]
        looks = confirmed_plans(settings.evaluations, least.number) if choosing else 0
        self.looks = looks if looks and has_further_images(problem.scorer) else 0
        self.allowed = settings.evaluations - CONFIRMING * self.looks
        self.rng = np.random.default_rng(settings.seed)
        self.trail = Trail(settings.clock)
        self._bar = tqdm(total=settings.evaluations, desc=name, unit="plan", disable=not settings.progress)

    @property
    def evaluations(self) -> int:
        """Evaluations that are spent."""
        return self.trail.evaluations

    @property
    def left(self) -> int:
        """Evaluations that are left until the second look."""
        return self.allowed - self.evaluations

    def project(self, keep: NDArray[np.floating]) -> Counts:
        """Counts ``(groups,)`` that hold the budget, for asked keep ratios ``(groups,)`` in [0, 1].

        Raises:
            PruningError: they are not that.
        """
        ratios: NDArray[np.float64] = np.asarray(keep, dtype=np.float64)
        groups = len(self.problem.sizes)
        if ratios.shape != (groups,) or not ((ratios >= 0) & (ratios <= 1)).all():  # NaN is neither
            raise PruningError(
                f"Searcher {self.name} should ask for {groups} keep ratios in [0, 1], one per group. Received "
                f"{np.array2string(ratios, precision=3, threshold=8)}. This is an error of the searcher."
            )
        return self.problem.project(ratios, self.limit)

    def ask(self, keep: NDArray[np.floating]) -> float:
        """Score of the plan that asked keep ratios ``(groups,)`` are projected to."""
        return self.score(self.project(keep))

    def leave_out(self, blocks: Iterable[str]) -> None:
        """From now on plans leave these residual blocks out, and the widths of the rest follow the budget."""
        self.problem = self.problem.without(blocks)
        self.limit = self.problem.limits[self.budget]

    def pay(self, evaluations: int = 1) -> None:
        """Count work that is worth so many evaluations and gives no plan that could be the result.

        Raises:
            PruningError: the allowance does not hold them.
        """
        self._check_allowance(evaluations)
        for _ in range(evaluations):
            self.trail.step()
        self._bar.update(evaluations)

    def score(self, counts: Counts, scores: NDArray[np.float64] | None = None) -> float:
        """Score of counts ``(groups,)`` within the budget: a plan that may be the result.

        Args:
            counts: channels to keep in each group.
            scores: decide which ``(units,)``, higher = keep; by default those of the scorer's criterion.

        Raises:
            PruningError: the allowance is spent, the counts are not a plan, or they break the budget.
        """
        self._check(counts)
        if not self.limit.holds(counts):
            raise PruningError(
                f"Searcher {self.name} should propose plans within {self.limit.budget}. Received one that keeps "
                f"{self.limit.fraction(counts):.2%} of the cost. This is an error of the searcher."
            )
        plan = self.problem.plan(counts, scores)
        score = self._run(plan)
        if self.trail.add(plan, score):
            self._bar.set_postfix(best=f"{score:.3f}")
        return score

    def probe(self, counts: Counts) -> float:
        """Score of any counts ``(groups,)``, also above the budget: a step on the way, never the result."""
        self._check(counts)
        score = self._run(self.problem.plan(counts))
        self.trail.step()
        return score

    def result(self) -> SearchResult:
        """The best plan after a second look, and what was paid."""
        plans = self.trail.leaders(self.looks)
        if len(plans) > 1:
            best = best_on_twice(self.problem.scorer, plans)
            self.trail.settle(best, plans[best], CONFIRMING * len(plans))
            self._bar.update(CONFIRMING * len(plans))
        self._bar.close()
        return SearchResult(**self.trail.result())

    def _check(self, counts: Counts) -> None:
        widths = self.problem.widths
        whole = counts.shape == widths.sizes.shape and np.issubdtype(counts.dtype, np.integer)
        if not whole or not widths.allow(counts).all():
            raise PruningError(
                f"Searcher {self.name} should keep whole numbers of channels, those that each of the "
                f"{len(widths.sizes)} groups may keep{_rules(self.problem)}. Received "
                f"{np.array2string(counts, threshold=8)}. This is an error of the searcher."
            )
        self._check_allowance(1)

    def _check_allowance(self, evaluations: int) -> None:
        if self.left < evaluations:
            more = "one more" if evaluations == 1 else f"{evaluations} when {self.left} were left"
            raise PruningError(
                f"Searcher {self.name} should score at most {self.allowed} plans. It asked for {more}. This is an "
                "error of the searcher."
            )

    def _run(self, plan: PruningPlan) -> float:
        score = self.problem.scorer.score(plan).score
        self._bar.update()
        if not np.isfinite(score):
            raise PruningError(
                f"`task` should give finite scores. Received {score} for a plan of searcher {self.name}. Check the "
                "score of the task on a network whose outputs are not finite."
            )
        return score


def evaluations_per_step(settings: ScorerSettings, batch_size: int) -> float:
    """What one training step costs, in evaluations: by the images that run through the network.

    Running backwards counts as two runs forwards, as it is commonly reckoned. An evaluation runs the images of
    recalibration and score once, and those of its recovery steps forwards and backwards. That an unpruned network,
    which is what searchers train, takes longer for an image than a pruned one is not counted.
    """
    return _RUNS_PER_STEP * batch_size / _images(settings)


def evaluations_on(settings: ScorerSettings, examples: int) -> int:
    """What scoring a plan on so many examples counts for, in evaluations: by the images that run, rounded up."""
    return max(1, math.ceil((_images(settings) + examples - settings.examples) / _images(settings)))


def _images(settings: ScorerSettings) -> int:
    """Images that an evaluation runs, those of its recovery steps forwards and backwards."""
    examples, steps = settings.recovery_examples, 0
    if settings.scoring == "reconstruct":
        examples = min(examples, QUICK_EXAMPLES)
    elif settings.scoring == "distill":
        steps = _RUNS_PER_STEP * RECOVERY_BATCH * min(settings.recovery_steps, QUICK_STEPS)
    return examples * (settings.scoring != "none") + settings.examples + steps


def checked(name: str, searcher: Searcher) -> Searcher:
    """The searcher, with a look at what it returns.

    Raises:
        PruningError: when it is called and returns a plan of another network or beyond the budget, spends more than
            it may, or reports scores that are not finite.
    """

    def search(problem: PruningProblem, budget: Budget, settings: SearchSettings) -> SearchResult:
        result = searcher(problem, budget, settings)
        check_result(name, result, problem, budget, settings)
        return result

    return search


def check_result(
    name: str, result: SearchResult, problem: PruningProblem, budget: Budget, settings: SearchSettings
) -> None:
    """Refuse a result that breaks the rules of the comparison.

    Raises:
        PruningError: it does; the message says how.
    """
    network = problem.scorer.network
    counts = network.counts(result.plan)  # refuses the plan of another network
    removed = set(result.plan.removed)
    further = removed - set(problem.removed)
    known = not further or (problem.latency is None and further <= set(network.blocks))
    limit = problem.limit_of(result.plan, budget) if known else problem.limits[budget]
    # what a policy starts from on a network that is new to it is tried even where nothing is searched
    most = max(settings.evaluations, TRIALS) if name == "policy" else settings.evaluations
    scores = [score for _, score in result.history]
    spent = [count for count, _ in result.history]
    fault = ""
    if not problem.widths.allow(counts).all():
        fault = f"keep numbers of channels that the groups may keep{_rules(problem)}. Received {counts.tolist()}"
    elif not known or not removed >= set(problem.removed):
        others = "no others" if problem.latency is not None else "of others only residual blocks"
        fault = f"leave out the blocks {list(problem.removed)}, and {others}. Received {sorted(removed)}"
    elif not limit.holds(counts):
        fault = f"return a plan within {budget}. Received one that keeps {limit.fraction(counts):.2%} of the cost"
    elif result.evaluations > most:
        fault = f"score at most {most} plans. Received a result that took {result.evaluations}"
    elif not np.isfinite(scores).all() or sorted(scores) != scores:
        fault = f"report finite best scores that never fall. Received {scores[:8]}"
    elif sorted(set(spent)) != spent or max(spent, default=0) > result.evaluations:
        fault = f"report one best score per evaluation. Received them after {spent[:8]} of {result.evaluations}"
    elif result.improvements and result.improvements[-1].plan != result.plan:
        fault = "return the plan it improved to last. Received another"
    if fault:
        raise PruningError(f"Searcher {name} should {fault}. This is an error of the searcher.")


def _rules(problem: PruningProblem) -> str:
    """The user's rules of widths in brackets, if there are any."""
    return f" ({problem.widths.rules})" if problem.widths.rules else ""


def missing_library(searcher: str, library: str, fault: ImportError | None = None) -> PruningError:
    """Describe a searcher whose library is not installed; the error is returned, not raised."""
    return PruningError(
        f"`--searcher` {searcher} needs the package {library}. Received an environment without it"
        f"{f' ({fault})' if fault else ''}. Run: pip install 'prunegym[search]'"
    )
