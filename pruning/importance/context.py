"""What importance criteria look at, and the one contract they share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph, ChannelGroup, Units
from prunegym.pruning.importance.statistics import Statistics
from prunegym.pruning.task import Inputs, Task

Scores: TypeAlias = NDArray[np.float64]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """Examples for criteria that run the network themselves."""

    task: Task
    examples: int = 512
    split: str = "calibration"
    device: torch.device | str = "cpu"

    def batches(self, batch_size: int) -> Iterable[tuple[Inputs, Any]]:
        """The examples in batches, always the same and in the same order."""
        return self.task.batches(self.split, batch_size=batch_size, limit=self.examples, device=self.device)


@dataclass
class Context:
    """What criteria may look at. It belongs to one state of one network: make a new one after pruning."""

    model: nn.Module
    """The network as it is now: unpruned, or what ``mask`` leaves of it."""
    graph: ChannelGraph
    """Of the unpruned network."""
    statistics: Statistics | None = None
    """Of ``model``, for the data-aware criteria."""
    rng: np.random.Generator | None = None
    """Source of `random`; by default one made from ``seed``."""
    mask: NDArray[np.bool_] | None = None
    """Units that ``model`` still has ``(units,)``; None for all."""
    calibration: Calibration | None = None
    """Examples for the criteria that ``statistics`` are not enough for."""
    given: Mapping[str, Criterion] = field(default_factory=dict)
    """Criteria that this package cannot make by itself, such as `encoder_attention`, by name."""
    seed: int = 0
    """Of the criteria that draw random numbers."""
    _results: dict[str, Any] = field(default_factory=dict, repr=False)

    def data(self, criterion: str) -> Statistics:
        """The statistics, or an error that names the criterion that needs them."""
        if self.statistics is None:
            raise _needs_data(criterion, "no statistics")
        return self.statistics

    def examples(self, criterion: str) -> Calibration:
        """The calibration examples, or an error that names the criterion that needs them."""
        if self.calibration is None:
            raise _needs_data(criterion, "no calibration examples")
        return self.calibration

    def once(self, key: str, compute: Callable[[], T]) -> T:
        """What ``compute`` returns; it is called the first time only.

        Criteria are asked group by group. Those that work on the whole network at once do it here.
        """
        if key not in self._results:
            self._results[key] = compute()
        return cast(T, self._results[key])

    def remaining(self, units: Units) -> Units:
        """Of the units along a dimension of the unpruned network, those along it in ``model``."""
        # unit -1 is always kept
        return units if self.mask is None else units[np.append(self.mask, True)[units]]

    def left(self, group: ChannelGroup) -> NDArray[np.bool_]:
        """Which units of a group are left ``(group.size,)``."""
        return np.ones(group.size, dtype=np.bool_) if self.mask is None else self.mask[group.units]


Criterion: TypeAlias = Callable[[ChannelGroup, Context], Scores]
"""The contract: a prunable group and what may be looked at; finite scores ``(group.size,)``, higher = keep.

A criterion changes neither the model nor its gradients, and gives the same scores for the same context.
"""


def _needs_data(criterion: str, received: str) -> PruningError:
    return PruningError(
        f"`criterion` {criterion} needs calibration data. Received {received}. "
        "Pass a task with a calibration split, or choose l1, l2, bn_scale, fpgm or cosine."
    )
