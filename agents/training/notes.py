"""What a training notes on its way: what it spent, the best plans, and the plans it would have returned earlier."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

from prunegym.agents.searching.trail import Improvement, trails_from_json, trails_to_json
from prunegym.envs.setting import plan_key
from prunegym.pruning.plan import PruningPlan


class Best(NamedTuple):
    """A plan and what it is worth."""

    score: float
    plan: PruningPlan
    reward: float | None
    """By which plans are ranked; None in checkpoints of earlier versions, which ranked by scores."""

    def exceeded_by(self, info: Mapping[str, Any]) -> bool:
        """Whether the plan of an ``info`` is worth more."""
        return bool(info["score"] > self.score if self.reward is None else info["reward"] > self.reward)


class Notes:
    """Plans of a training by :func:`.plan_key`, and its evaluations.

    Args:
        clock: Gives seconds of training so far, those before an interruption included.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.evaluations = 0
        self.best: dict[str, Best] = {}
        """The plans with the highest rewards that were sampled."""
        self.looked: dict[str, dict[PruningPlan, float]] = {}
        """What plans were worth at a second look."""
        self.own_trail: dict[str, list[Improvement]] = {}
        self.best_trail: dict[str, list[Improvement]] = {}

    def note_best(self, infos: Iterable[Mapping[str, Any]]) -> None:
        """Look for better plans among the next evaluations, each given by the ``info`` of its episode's end."""
        for evaluations, info in enumerate(infos, start=self.evaluations + 1):
            key = plan_key(info["network"], info["budget"])
            if key not in self.best or self.best[key].exceeded_by(info):
                self.best[key] = Best(float(info["score"]), info["plan"], float(info["reward"]))
                found = Improvement(evaluations, self.clock(), info["plan"], float(info["score"]))
                self.best_trail.setdefault(key, []).append(found)

    def settle(self, key: str, best: Best) -> None:
        """Take this plan as the best one from now on."""
        self.best[key] = best
        append_changed(
            self.best_trail.setdefault(key, []), Improvement(self.evaluations, self.clock(), best.plan, best.score)
        )

    def note_own(self, key: str, plan: PruningPlan, score: float | None = None, evaluations: int | None = None) -> None:
        """Note the plan that the policy makes now, if it is another than before."""
        spent = self.evaluations if evaluations is None else evaluations
        append_changed(self.own_trail.setdefault(key, []), Improvement(spent, self.clock(), plan, score))

    def to_json(self) -> dict[str, Any]:
        """The same in what JSON holds."""
        return {
            "evaluations": self.evaluations,
            "best": {key: [one.score, one.plan.to_json(), one.reward] for key, one in self.best.items()},
            "looked": {
                key: [[value, plan.to_json()] for plan, value in found.items()] for key, found in self.looked.items()
            },
            "own_trail": trails_to_json(self.own_trail),
            "best_trail": trails_to_json(self.best_trail),
        }

    def restore(self, content: Mapping[str, Any]) -> None:
        """Take up what :meth:`to_json` gave."""
        self.evaluations = int(content["evaluations"])
        self.best = {
            key: Best(float(score), PruningPlan.from_json(plan), reward[0] if reward else None)
            for key, (score, plan, *reward) in content["best"].items()
        }
        self.looked = {
            key: {PruningPlan.from_json(plan): float(value) for value, plan in found}
            for key, found in content.get("looked", {}).items()  # checkpoints of earlier versions have none
        }
        self.own_trail = trails_from_json(content["own_trail"])
        self.best_trail = trails_from_json(content["best_trail"])


def append_changed(trail: list[Improvement], found: Improvement) -> None:
    """Note the plan in force, if it is another than before."""
    if not trail or trail[-1].plan != found.plan:
        trail.append(found)
