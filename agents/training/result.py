"""What a training leaves behind."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prunegym.agents.searching.trail import Improvement, trails_from_json, trails_to_json
from prunegym.pruning.plan import PruningPlan


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """What training left behind; plans and trails by :func:`~prunegym.envs.setting.plan_key`."""

    policy: Path
    evaluations: int
    seconds: float
    own: dict[str, PruningPlan] = field(default_factory=dict)
    """The policy's own plan."""
    best: dict[str, PruningPlan] = field(default_factory=dict)
    """The best plan that was sampled: a different result, reported apart."""
    own_trail: dict[str, list[Improvement]] = field(default_factory=dict)
    """The policy's own plan before the first update, and after each update that changed it."""
    best_trail: dict[str, list[Improvement]] = field(default_factory=dict)
    """The best sampled plan whenever that changed; those of one update all carry the seconds of its end."""

    def to_json(self) -> dict[str, Any]:
        """The same in what JSON holds, without the policy."""
        return {
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "own": {key: plan.to_json() for key, plan in self.own.items()},
            "best": {key: plan.to_json() for key, plan in self.best.items()},
            "own_trail": trails_to_json(self.own_trail),
            "best_trail": trails_to_json(self.best_trail),
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any], policy: Path) -> TrainResult:
        """Read :meth:`to_json`'s mapping.

        Args:
            content: The mapping.
            policy: The policy file.

        Raises:
            PruningError: A plan is none.
        """
        own, best = (
            {key: PruningPlan.from_json(plan) for key, plan in content[name].items()} for name in ("own", "best")
        )
        return cls(
            policy=policy,
            evaluations=content["evaluations"],
            seconds=content["seconds"],
            own=own,
            best=best,
            own_trail=trails_from_json(content["own_trail"]),
            best_trail=trails_from_json(content["best_trail"]),
        )
