"""Intervals and profiles against scipy and against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from prunegym.experiments.comparison.bootstrap import Interval, difference_interval, mean_interval, performance_profiles

Problems = st.lists(st.lists(st.floats(0, 1), min_size=2, max_size=2), min_size=1, max_size=4)


def test_interval_is_that_of_scipy(rng: np.random.Generator) -> None:
    """Percentile bootstrap over the means of the problems."""
    runs = rng.normal(size=(12, 3))

    found = mean_interval(runs.tolist())

    expected = stats.bootstrap((runs.mean(axis=1),), np.mean, method="percentile").confidence_interval
    assert found.mean == pytest.approx(runs.mean())
    assert found.low == pytest.approx(expected.low, abs=0.02)
    assert found.high == pytest.approx(expected.high, abs=0.02)


def test_interval_covers_the_truth_as_often_as_it_says() -> None:
    """Of 200 samples of 30 problems, about 95 %."""
    rng = np.random.default_rng(5)
    intervals = [mean_interval(rng.normal(1.0, 2.0, (30, 1)).tolist(), resamples=500) for _ in range(200)]

    covered = np.mean([(one.low or 0) <= 1.0 <= (one.high or 0) for one in intervals])

    assert 0.9 <= covered <= 0.99


def test_level_widens_the_interval(rng: np.random.Generator) -> None:
    """A higher level holds more."""
    runs = rng.normal(size=(8, 2)).tolist()
    narrow, wide = mean_interval(runs, level=0.5), mean_interval(runs, level=0.99)

    assert wide.low < narrow.low < narrow.high < wide.high  # type: ignore[operator]


def test_seeds_of_a_problem_are_no_further_problems() -> None:
    """Repeating every run leaves the interval as it is."""
    runs = [[0.1], [0.5], [0.6]]

    assert mean_interval(runs) == pytest.approx(mean_interval([one * 5 for one in runs]))


def test_runs_are_resampled_where_there_is_one_problem() -> None:
    """There is nothing else."""
    found = mean_interval([[0.1, 0.2, 0.6]])

    assert found.mean == pytest.approx(0.3)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.6)


def test_single_figure_has_no_interval() -> None:
    """Nothing is known of its spread."""
    assert mean_interval([[0.4]]) == Interval(0.4)


def test_paired_difference_is_certain_where_every_pair_differs_alike() -> None:
    """However much the problems differ among themselves."""
    found = difference_interval([[0.3, 0.4], [0.8, 0.9]], [[0.2, 0.3], [0.7, 0.8]])

    assert (found.mean, found.low, found.high) == pytest.approx((0.1, 0.1, 0.1))


def test_difference_of_other_problems_is_refused() -> None:
    """Runs that have no partner would be compared with strangers."""
    with pytest.raises(ValueError, match="zip"):
        difference_interval([[0.3], [0.4]], [[0.3]])


@given(Problems, st.integers(0, 9))
def test_profile_is_a_count_of_runs(problems: list[list[float]], index: int) -> None:
    """At each distance, by a plain loop; it ends at 1."""
    scores = {"a": problems, "b": [[one / 2 for one in runs] for runs in problems]}
    profiles = performance_profiles(scores, resamples=5, points=10)

    best = [max(runs + other) for runs, other in zip(*scores.values(), strict=True)]
    for name, searcher in scores.items():
        distance = profiles[name].behind[index]
        close = [np.mean([top - x <= distance + 1e-12 for x in runs]) for top, runs in zip(best, searcher, strict=True)]
        assert profiles[name].share[index] == pytest.approx(np.mean(close))
        assert profiles[name].share[-1] == 1


def test_profile_band_holds_the_profile(rng: np.random.Generator) -> None:
    """And is narrower where there are more problems."""
    few, many = (
        performance_profiles({"a": rng.random((n, 2)).tolist(), "b": rng.random((n, 2)).tolist()})["a"] for n in (4, 64)
    )

    assert (few.low <= few.share).all()
    assert (few.share <= few.high).all()
    assert (many.high - many.low).mean() < (few.high - few.low).mean()
