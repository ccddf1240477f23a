"""What can honestly be said of two latencies that were measured side by side."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import norm as normal
from scipy.stats import t as student
from torch import Tensor, nn

from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.errors import PruningError
from prunegym.pruning.timing.latency import (
    Clock,
    Latency,
    LatencySettings,
    drifted,
    prepare,
    ready_to_measure,
    take_turns_in_sessions,
)
from prunegym.pruning.timing.runtimes import Opener

LEVEL = 0.95
_RESAMPLES = 2000
_FEWEST_SESSIONS = 5
_SHOWN = 3  # significant digits


@dataclass(frozen=True)
class SpeedUp:
    """How many times faster a network is than another, by paired turns."""

    ratio: float
    """Median over the turns; above 1 is faster."""
    low: float
    """The interval of the ratio: a bootstrap over sessions."""
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
    ratio, low, high = median_interval(ratios, sessions=after.sessions)
    return SpeedUp(
        ratio=ratio,
        low=low,
        high=high,
        turns=len(ratios),
        conditions=after.conditions,
        drift=max(before.drift, after.drift, key=abs),
    )


def median_interval(
    samples: Sequence[float] | NDArray[np.float64], *, sessions: Sequence[int] = ()
) -> tuple[float, float, float]:
    """Median of samples, and its interval by a percentile bootstrap.

    Efron and Tibshirani, "An Introduction to the Bootstrap", 1993; blocks: Künsch, "The Jackknife and the Bootstrap
    for General Stationary Observations", 1989; expanded for few draws: Hesterberg, "What Teachers Should Know About the
    Bootstrap", 2015.

    Args:
        samples: positive, in the order in which they were taken.
        sessions: how many samples each session had, in order. They are drawn together because they resemble each
            other; with fewer than five sessions each sample is drawn by itself.

    Returns:
        The median, and the lower and upper end of its interval at :data:`LEVEL`.
    """
    values = np.asarray(samples, dtype=np.float64)
    lengths = np.array(sessions if len(sessions) >= _FEWEST_SESSIONS else [1] * len(values), dtype=np.int64)
    medians = _resampled_medians(values, lengths)
    middle = max(float(np.median(values)), float(np.finfo(np.float64).tiny))
    ends = np.quantile(medians, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    # on the scale of logarithms: times and their ratios are positive
    low, high = (middle * (ends / middle) ** _expansion(len(lengths))).tolist()
    return middle, low, high


def _resampled_medians(values: NDArray[np.float64], lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Medians ``(resamples,)`` of as many sessions as there are, drawn with replacement.

    Args:
        values: samples in order.
        lengths: how many of them each session has.
    """
    pool = np.full((len(lengths), lengths.max()), np.nan)
    pool[np.arange(lengths.max()) < lengths[:, None]] = values
    drawn = np.random.default_rng(0).integers(len(lengths), size=(_RESAMPLES, len(lengths)))
    ordered = np.sort(pool[drawn].reshape(_RESAMPLES, -1), axis=1)  # what fills up short sessions comes last
    amounts, rows = lengths[drawn].sum(axis=1), np.arange(_RESAMPLES)
    medians: NDArray[np.float64] = (ordered[rows, (amounts - 1) // 2] + ordered[rows, amounts // 2]) / 2
    return medians


def _expansion(count: int) -> float:
    """By how much percentile intervals from so few draws are too narrow (Hesterberg 2015)."""
    if count < 2:
        return 1.0
    tail = (1 + LEVEL) / 2
    return float(student.ppf(tail, count - 1) / normal.ppf(tail) * np.sqrt(count / (count - 1)))


class Reference:
    """A network that others are measured beside, made ready for its runtime once.

    Args:
        model: the network; it is not changed.
        example_inputs: as for :func:`.compare_latency`.
        settings: how to measure.
        clock: gives seconds.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        settings: LatencySettings,
        *,
        clock: Clock = time.perf_counter,
    ) -> None:
        self.settings = settings
        self._model, self._example = model, example_inputs
        self._clock = clock
        self._opener: Opener | None = None

    def beside(self, model: nn.Module) -> tuple[Latency, Latency]:
        """Measure the network and another side by side.

        Raises:
            PruningError: one of them does not run, or the runtime is not there.
        """
        with ready_to_measure(self.settings) as settings:
            inputs = with_batch(self._example, settings.batch_size)
            self._opener = self._opener or prepare("the unpruned network", self._model, inputs, settings)
            openers = {"before": self._opener, "after": prepare("the pruned network", model, inputs, settings)}
            measured = take_turns_in_sessions(openers, settings, self._clock)
        return measured["before"], measured["after"]
