"""Tables over widths: exact where values are bilinear within a class, and never falling within one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from prunegym.pruning.timing.width_classes import ALIGNMENTS, Side, WidthTables, class_of

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
SIDES = [(1, True), (3, False), (16, True), (17, True), (96, True), (960, True)]


def blocky(number: Counts, inputs: Counts, outputs: Counts) -> Floats:
    """Bilinear within each class, and dearer for widths that are no multiples of 16 and of 4."""
    odd = np.where(inputs % 16 == 0, 1.0, 1.5) * np.where(outputs % 4 == 0, 1.0, 2.0)
    time: Floats = (number + 1) * (inputs * outputs + 5.0) * odd
    return time


def widths_of(sides: list[tuple[int, bool]], rng: np.random.Generator) -> Counts:
    """Any widths that layers may have."""
    return np.array([rng.integers(1, full, endpoint=True) if shrinks else full for full, shrinks in sides])


@pytest.mark.parametrize(("width", "alignment"), [(1, 1), (4, 4), (12, 4), (8, 8), (24, 8), (16, 16), (96, 16)])
def test_width_is_of_the_class_of_the_largest_power_that_divides_it(width: int, alignment: int) -> None:
    """Up to 16: beyond that no kernel cares."""
    assert ALIGNMENTS[class_of(np.array([width]))[0]] == alignment


@pytest.mark.parametrize("full", [1, 7, 16, 100, 1280])
def test_points_of_a_class_end_at_its_first_and_last_width(full: int) -> None:
    """Nothing is extrapolated within a class."""
    side = Side(full, True)
    for number, alignment in enumerate(ALIGNMENTS):
        members = [one for one in range(1, full + 1) if class_of(np.array([one]))[0] == number]
        if members:
            points = side.points[number].tolist()

            assert (points[0], points[-1]) == (members[0], members[-1]), alignment
            assert points == sorted(points)
            assert set(points) <= set(members)


def test_values_that_are_bilinear_within_classes_are_met_everywhere() -> None:
    """Whatever the classes of input and output are, against the function itself."""
    rng = np.random.default_rng(0)
    tables = WidthTables(SIDES, SIDES[::-1], blocky)
    for _ in range(200):
        inputs, outputs = widths_of(SIDES, rng), widths_of(SIDES[::-1], rng)

        assert tables.values(inputs, outputs) == pytest.approx(blocky(np.arange(len(SIDES)), inputs, outputs))


@given(seed=st.integers(0, 2**32 - 1))
def test_values_never_fall_within_a_class_whatever_was_measured(seed: int) -> None:
    """A layer of 32 channels does not take less time than one of 16."""
    rng = np.random.default_rng(seed)
    sides = [(100, True), (64, True)]
    tables = WidthTables(sides, sides, lambda number, i, j: rng.uniform(1, 2, len(number)))
    inputs, outputs = widths_of(sides, rng), widths_of(sides, rng)
    full = np.array([one for one, _ in sides])
    wider = np.minimum(inputs + 16 * rng.integers(0, 6, 2), full - (full - inputs) % 16), outputs

    assert (tables.values(inputs, outputs) <= tables.values(*wider) * (1 + 1e-12)).all()


def test_many_plans_are_looked_up_at_once() -> None:
    """As one after the other."""
    rng = np.random.default_rng(0)
    tables = WidthTables(SIDES, SIDES, blocky)
    inputs, outputs = (np.array([widths_of(SIDES, rng) for _ in range(5)]) for _ in range(2))

    together = tables.values(inputs, outputs)

    assert together == pytest.approx(np.array([tables.values(*one) for one in zip(inputs, outputs, strict=True)]))
