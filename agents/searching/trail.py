"""The trail of a search: what it would have returned, had it been stopped earlier.

Searches are compared at equal evaluations and at equal seconds, so each notes its best plan whenever that changes.
Scores of a trail are those of the reward split; :mod:`prunegym.experiments.comparison.grid` scores the plans on other
images.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from prunegym.pruning.plan import PruningPlan


class Improvement(NamedTuple):
    """A plan that a search would return from a moment on, until the next improvement."""

    evaluations: int
    """Plans scored so far, this one included."""
    seconds: float
    """Since the search began."""
    plan: PruningPlan
    score: float | None = None
    """On the reward split; None where the plan was not scored by the search."""

    def to_json(self) -> dict[str, Any]:
        """The same in what JSON holds."""
        return {**self._asdict(), "plan": self.plan.to_json()}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Improvement:
        """Read :meth:`to_json`'s mapping.

        Raises:
            PruningError: The plan is none.
        """
        return cls(**{**content, "plan": PruningPlan.from_json(content["plan"])})


class Trail:
    """Takes every plan that a search scores, and keeps the best.

    A searcher makes one when it begins (:class:`~prunegym.agents.searching.search.Search` does), calls :meth:`add`
    after each score, and ends with ``SearchResult(**trail.result())``.

    Args:
        clock: Gives seconds; tests bring their own.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self._started = clock()
        self.evaluations = 0
        self.history: list[tuple[int, float]] = []
        """Best score after each evaluation, from the first plan on that can be returned."""
        self.improvements: list[Improvement] = []
        self._scores: dict[PruningPlan, float] = {}

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return self._clock() - self._started

    @property
    def best(self) -> PruningPlan | None:
        """The best plan so far."""
        return self.improvements[-1].plan if self.improvements else None

    @property
    def best_score(self) -> float:
        """Its score on the reward split; minus infinity before the first."""
        return self.history[-1][1] if self.history else float("-inf")

    def add(self, plan: PruningPlan, score: float) -> bool:
        """Note a plan that has just been scored: one evaluation.

        Returns:
            Whether it is the best so far; of equals the first stays.
        """
        better = score > self.best_score
        self.evaluations += 1
        self._scores[plan] = score
        if better:
            self.improvements.append(Improvement(self.evaluations, self.seconds, plan, score))
        self.history.append((self.evaluations, score if better else self.best_score))
        return better

    def step(self) -> None:
        """Note a score of what the search cannot return, such as a plan above the budget: one evaluation."""
        self.evaluations += 1
        if self.history:
            self.history.append((self.evaluations, self.best_score))

    def leaders(self, count: int) -> dict[PruningPlan, float]:
        """The best ``count`` plans with their scores, best first; of equals the earlier."""
        ranked = sorted(self._scores.items(), key=lambda one: -one[1])
        return dict(ranked[:count])

    def settle(self, plan: PruningPlan, score: float, evaluations: int) -> None:
        """End with a plan that need not have the best score, after so many more evaluations."""
        for _ in range(evaluations):
            self.step()
        if plan != self.best:
            self.improvements.append(Improvement(self.evaluations, self.seconds, plan, score))

    def result(self) -> dict[str, Any]:
        """The arguments of a :class:`~prunegym.agents.searching.search.SearchResult`.

        Raises:
            RuntimeError: No plan had a finite score.
        """
        if self.best is None:
            raise RuntimeError("a search should score a plan before it ends")
        return {
            "plan": self.best,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "history": self.history,
            "improvements": self.improvements,
        }


def trails_to_json(trails: Mapping[str, Sequence[Improvement]]) -> dict[str, Any]:
    """Several trails, by whatever they are kept under, in what JSON holds."""
    return {key: [one.to_json() for one in kept] for key, kept in trails.items()}


def trails_from_json(content: Mapping[str, Any]) -> dict[str, list[Improvement]]:
    """Read :func:`trails_to_json`'s mapping.

    Raises:
        PruningError: A plan is none.
    """
    return {key: [Improvement.from_json(one) for one in kept] for key, kept in content.items()}


def in_force(improvements: Sequence[Improvement], *, seconds: float) -> Improvement | None:
    """What a search would have returned after so many seconds; None if it had no plan yet."""
    return next((one for one in reversed(improvements) if one.seconds <= seconds), None)
