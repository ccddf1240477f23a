"""What is claimed of two latencies, and what is not."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.pruning.errors import PruningError
from prunegym.pruning.timing.latency import Latency, LatencySettings, take_turns_in_sessions
from prunegym.pruning.timing.speed_up import median_interval, speed_up


def latency(*samples: float, **settings: Any) -> Latency:
    """A measurement with known turns."""
    return Latency.from_samples(list(samples), LatencySettings(threads=1, **settings))


def test_ratio_survives_drift() -> None:
    """Both networks become slower together; the ratio of neighbouring turns does not change."""
    drift = [1.0 + 0.2 * step for step in range(20)]

    found = speed_up(latency(*[2.0 * factor for factor in drift]), latency(*drift))

    assert (found.low, found.ratio, found.high) == pytest.approx((2.0, 2.0, 2.0))
    assert found.sentence.startswith("2 times as fast as before (95% interval 2 to 2, 20 paired turns; ")
    assert "The machine drifted" in found.sentence


@pytest.mark.parametrize(
    ("after", "claim"),
    [
        ((1.0, 1.1, 0.9, 1.0, 1.0), "times as fast as before (95% interval 1.7"),
        ((1.0, 3.0, 1.0, 3.0, 2.0), "No difference beyond the noise (95% interval 0.526 to 3, 5 paired turns"),
        ((2.0, 2.0, 2.0, 2.0, 2.0), "No difference beyond the noise (95% interval 1 to 1"),
        ((4.0, 4.1, 3.9, 4.0, 4.0), "Slower than before: 0.5 times as fast (95% interval 0.48"),
    ],
)
def test_no_difference_is_claimed_within_the_interval(after: tuple[float, ...], claim: str) -> None:
    """A ratio whose interval holds 1 is not told."""
    found = speed_up(latency(2.0, 2.0, 2.0, 2.0, 2.0), latency(*after))

    assert claim in found.sentence
    assert "1 thread, batch 1, float32" in found.sentence
    assert found.is_noise == ("No difference" in claim)


def test_interval_covers_the_ratio_about_as_often_as_it_says() -> None:
    """Two networks whose times have a known ratio, on a noisy machine, over and over."""
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(200):
        noise = rng.lognormal(0, 0.1, (2, 30))
        found = speed_up(latency(*(1.25 * noise[0])), latency(*noise[1]))
        held += found.low <= 1.25 <= found.high

    assert 0.9 <= held / 200 <= 0.99


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=30))
def test_interval_holds_the_ratio_whatever_the_clock_showed(samples: list[float]) -> None:
    """Also where it showed no time at all."""
    found = speed_up(latency(*samples), latency(*samples))

    assert found.low <= found.ratio <= found.high
    assert found.is_noise


@pytest.mark.parametrize("other", [latency(1.0, 1.0), latency(1.0, 1.0, 1.0, batch_size=2)])
def test_speed_up_of_separate_measurements_is_refused(other: Latency) -> None:
    """A ratio between different moments or settings means nothing."""
    with pytest.raises(PruningError, match=r"`after` should be measured side by side with `before`.*compare_latency"):
        speed_up(latency(1.0, 1.0, 1.0), other)


def test_interval_is_that_of_sessions() -> None:
    """Turns of one session resemble each other: many of them are not many measurements."""
    rng = np.random.default_rng(0)
    sessions = rng.normal(1.0, 0.02, size=10)
    turns = np.repeat(sessions, 5) + rng.normal(0.0, 1e-4, size=50)
    apart = rng.permutation(turns)

    of_sessions, of_turns = (speed_up(latency(*[1.0] * 50), latency(*one)) for one in (turns, apart))

    assert of_sessions.ratio == of_turns.ratio
    assert of_sessions.high - of_sessions.low > 1.5 * (of_turns.high - of_turns.low)


def test_interval_covers_what_differs_between_short_sessions() -> None:
    """Slow networks take two or three turns in the time of a session: five turns in a row are not one session."""
    rng, now = np.random.default_rng(0), [0.0]

    def load() -> Callable[[], None]:
        pace = 0.8 * rng.lognormal(0, 0.05)  # where a network lies in memory decides, for as long as it is loaded

        def run() -> None:
            now[0] += pace * rng.lognormal(0, 0.003)

        return run

    held = 0
    for _ in range(200):
        measured = take_turns_in_sessions({"before": load, "after": load}, LatencySettings(), lambda: now[0])
        found = speed_up(measured["before"], measured["after"])
        held += found.low <= 1 <= found.high

    assert set(measured["after"].sessions) <= {1, 2, 3}
    assert 0.92 <= held / 200 <= 0.99


def test_session_of_more_turns_weighs_more() -> None:
    """Whole sessions are drawn, whatever their lengths: their turns come together."""
    short, long = [1.0] * 5, [2.0] * 40

    middle, low, high = median_interval([*short, *long], sessions=[1, 1, 1, 1, 1, 40])
    alone = median_interval([*short, *long], sessions=[1] * 45)

    assert (middle, high) == (2.0, 2.0)
    assert low < 1.5 < alone[1]  # none of six draws is the long session in a third of the cases
