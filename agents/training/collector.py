"""What a rollout leaves behind."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from prunegym.agents.policies.ppo import PruningPPO


class Collector:
    """Keeps the infos of finished episodes and the returns of the rollout."""

    def __init__(self, model: PruningPPO, tick: Callable[[int], object]) -> None:
        self.model = model
        self.tick = tick
        self.infos: list[dict[str, Any]] = []

    def __call__(self, variables: dict[str, Any], _globals: dict[str, Any]) -> bool:
        """SB3 calls this after every step of the environments."""
        for info, done in zip(variables["infos"], variables["dones"], strict=True):
            if done:
                self.infos.append(info)
                self.tick(1)
        return True

    @property
    def returns(self) -> list[float]:
        """Return of each episode of the last rollout."""
        return [episode.value for episode in self.model.last_episodes]
