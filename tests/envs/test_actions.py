"""Actions and keep ratios are each other's inverse, exactly where it counts."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.envs.actions import action_for, keep_ratios, pruning_ratios

RATIOS = st.lists(st.floats(0, 1), min_size=1, max_size=20).map(np.array)
ACTIONS = st.lists(st.floats(-1, 1, width=32), min_size=1, max_size=20).map(
    lambda values: np.array(values, dtype=np.float32)
)


@given(RATIOS)
def test_action_asks_for_the_ratio_it_was_made_for(keep: np.ndarray) -> None:
    """To the precision of single-precision actions."""
    np.testing.assert_allclose(keep_ratios(action_for(keep)), keep, atol=2e-7)


@given(ACTIONS)
def test_ratio_gives_back_its_action(action: np.ndarray) -> None:
    """The other way round."""
    np.testing.assert_allclose(action_for(keep_ratios(action)), action, atol=2e-6)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 16, 64, 100, 1000, 1536, 2048, 4096])
def test_every_count_can_be_asked_for_exactly(size: int) -> None:
    """From count to action and back, through single precision."""
    counts = np.arange(size + 1)

    asked = np.floor(keep_ratios(action_for(counts / size)) * size + 0.5)

    assert (asked == counts).all()


@pytest.mark.slow
def test_every_count_up_to_4096_can_be_asked_for_exactly() -> None:
    """All widths that networks have."""
    for size in range(1, 4097):
        counts = np.arange(size + 1)
        asked = np.floor(keep_ratios(action_for(counts / size)) * size + 0.5)

        assert (asked == counts).all(), size


def test_ends_of_the_action_keep_nothing_and_everything() -> None:
    """Exactly 0 and 1; the middle keeps half."""
    np.testing.assert_array_equal(keep_ratios(np.array([-1.0, 0.0, 1.0])), [0.0, 0.5, 1.0])


@given(st.floats(-3, 3), st.floats(-3, 3))
def test_larger_action_keeps_more(low: float, high: float) -> None:
    """Monotone, also outside [-1, 1], where it is clipped."""
    low, high = sorted((low, high))

    less, more = keep_ratios(np.array([low, high]))

    assert 0 <= less <= more <= 1


@given(ACTIONS)
def test_pruning_ratio_is_the_rest(action: np.ndarray) -> None:
    """Kept and removed add up to all."""
    np.testing.assert_array_equal(pruning_ratios(action), 1 - keep_ratios(action))


def test_actions_are_single_precision() -> None:
    """As the action space says."""
    assert action_for(np.array([0.25, 0.75])).dtype == np.float32
