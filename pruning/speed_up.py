"""What can honestly be said of two latencies that were measured side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from prunegym.pruning.errors import PruningError
from prunegym.pruning.latency import Latency, drifted

LEVEL = 0.95
_RESAMPLES = 2000
_SHOWN = 3  # significant digits


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster a network is than another, by paired turns."""

    ratio: float
    """Median over the turns; above 1 is faster."""
    low: float
    """The interval of the ratio: a bootstrap over the turns."""
    high: float
    turns: int
    conditions: str
    drift: float
    """Of the machine while it measured, see :attr:`.Latency.drift`."""

    @property
    def is_noise(self) -> bool:
        """True if the interval holds 1: no difference was shown."""
        return self.low <= 1 <= self.high

    @property
    def sentence(self) -> str:
        """The claim that the interval allows."""
        interval = f"{LEVEL:.0%} interval {self.low:.{_SHOWN}g} to {self.high:.{_SHOWN}g}"
        measured = f"({interval}, {self.turns} paired turns; {self.conditions})"
        if self.is_noise:
            claim = f"No difference beyond the noise {measured}."
        elif self.ratio > 1:
            claim = f"{self.ratio:.{_SHOWN}g} times as fast as before {measured}."
        else:
            claim = f"Slower than before: {self.ratio:.{_SHOWN}g} times as fast {measured}."
        return claim + (f" The machine drifted: {drifted(self.drift)}." if self.drift else "")

    def to_json(self) -> dict[str, Any]:
        """The figures and the sentence, in what JSON holds."""
        return {
            "speed_up": self.ratio,
            "interval": [self.low, self.high],
            "drift": self.drift,
            "sentence": self.sentence,
        }


def speed_up(before: Latency, after: Latency) -> SpeedUp:
    """Compare two networks that were measured side by side.

    The interval is that of the median of the turns' ratios, by a percentile bootstrap (Efron and Tibshirani, "An
    Introduction to the Bootstrap", 1993).

    Args:
        before: latency of the unpruned network.
        after: latency of the pruned network, from the same :func:`.compare_latency`.

    Raises:
        PruningError: the two were not measured side by side.
    """
    if not before.samples or len(before.samples) != len(after.samples) or before.settings != after.settings:
        raise PruningError(
            "`after` should be measured side by side with `before`. Received measurements of "
            f"{len(before.samples)} and {len(after.samples)} turns, made under "
            f"{'the same' if before.settings == after.settings else 'different'} settings. Use one "
            "compare_latency for both."
        )
    # a clock too coarse for a tiny network may show no time at all
    floor = np.finfo(np.float64).tiny
    ratios = np.maximum(before.samples, floor) / np.maximum(after.samples, floor)
    drawn = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    medians = np.median(ratios[drawn], axis=1)
    low, high = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return SpeedUp(
        ratio=float(np.median(ratios)),
        low=low,
        high=high,
        turns=len(ratios),
        conditions=after.conditions,
        drift=max(before.drift, after.drift, key=abs),
    )
