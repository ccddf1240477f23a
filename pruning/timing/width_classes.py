"""Tables over the widths of a layer, for hardware and kernels that like some widths better than others.

A kernel works on blocks of channels: 8 or 16 of a vector register, 4 of a memory layout. So the time of a layer jumps
between a width and the next, and 96 channels may take less time than 95. Among the widths of one *class* (multiples
of 16, other multiples of 8, other multiples of 4, all others) it changes smoothly. A table has points of every class
and interpolates between points of one class.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Counts = NDArray[np.int64]

ALIGNMENTS = (16, 8, 4, 1)
"""A width belongs to the class of the first that divides it."""
#: Points of each class on one side of a table.
_POINTS = 10


def class_of(widths: Counts) -> Counts:
    """Class of each width, as its number in :data:`ALIGNMENTS`."""
    divisible = np.stack([widths % step == 0 for step in ALIGNMENTS])
    classes: Counts = divisible.argmax(axis=0)
    return classes


class Side:
    """The widths of one side of a layer, from 1 to all channels.

    Args:
        full: all channels.
        shrinks: whether there are any widths but this one.
    """

    def __init__(self, full: int, shrinks: bool) -> None:
        widths = np.arange(1, full + 1) if shrinks else np.array([full])
        classes = class_of(widths)
        self.points = np.full((len(ALIGNMENTS), _POINTS), full)
        """Widths at which a table has values ``(classes, points)``, rising; the last may be repeated."""
        self.own = np.zeros(full + 1, dtype=np.int64)
        """Class of each width that occurs ``(widths,)``."""
        self.lower = np.zeros(full + 1, dtype=np.int64)
        """The point of its class at or below each width ``(widths,)``."""
        self.way = np.zeros(full + 1)
        """The way from there to the next point, 0 to 1 ``(widths,)``."""
        self.own[widths] = classes
        for number in np.unique(classes).tolist():
            self._place(number, widths[classes == number])

    def _place(self, number: int, members: Counts) -> None:
        """Choose the points of a class, and where each of its widths lies between them."""
        points = _spread(members)
        self.points[number] = np.concatenate([points, np.full(_POINTS - len(points), points[-1])])
        lower = np.clip(np.searchsorted(points, members, side="right") - 1, 0, max(0, len(points) - 2))
        self.lower[members] = lower
        if len(points) > 1:
            self.way[members] = (members - points[lower]) / (points[lower + 1] - points[lower])


def _spread(members: Counts) -> Counts:
    """The first, the last and some between, denser where widths are small."""
    if len(members) <= _POINTS:
        return members
    places = np.unique(np.round(np.geomspace(1, len(members), _POINTS)).astype(np.int64) - 1)
    missing = [one for one in range(len(members)) if one not in set(places.tolist())][: _POINTS - len(places)]
    chosen: Counts = members[np.sort(np.concatenate([places, np.array(missing, dtype=np.int64)]))]
    return chosen


@lru_cache(maxsize=256)
def side(full: int, shrinks: bool) -> Side:
    """The widths of one side of a layer; the same for layers of equal width."""
    return Side(full, shrinks)


class WidthTables:
    """One table for each layer of a network, over its input and output widths.

    Within a class of input and output widths no value falls where a width rises: values that did are moved halfway.

    Args:
        inputs: input channels of each layer, and whether they shrink.
        outputs: the same of its output channels.
        values: gives the values of layer ``number`` for widths ``(points,)`` and ``(points,)``.
    """

    def __init__(
        self,
        inputs: Sequence[tuple[int, bool]],
        outputs: Sequence[tuple[int, bool]],
        values: Callable[[Counts, Counts, Counts], Floats],
    ) -> None:
        self._sides = [[side(*one) for one in inputs], [side(*one) for one in outputs]]
        self._starts = [np.cumsum([0, *(len(one.own) for one in sides[:-1])]) for sides in self._sides]
        self._own, self._lower, self._way = (
            [np.concatenate([getattr(one, name) for one in sides]) for sides in self._sides]
            for name in ("own", "lower", "way")
        )
        layers, classes = len(inputs), len(ALIGNMENTS)
        shape = (layers, classes, _POINTS, classes, _POINTS)
        i = np.stack([one.points for one in self._sides[0]])[:, :, :, None, None]
        j = np.stack([one.points for one in self._sides[1]])[:, None, None, :, :]
        number = np.arange(layers)[:, None, None, None, None]
        grid = values(*(np.broadcast_to(one, shape).ravel() for one in (number, i, j))).reshape(shape)
        self._grid = _rising(_rising(grid, 2), 4)

    def values(self, inputs: Counts, outputs: Counts) -> Floats:
        """The value of each layer for its widths, both ``(..., layers)``."""
        places = [start + widths for start, widths in zip(self._starts, (inputs, outputs), strict=True)]
        (i, j), (a, b), (u, v) = (
            (side[place] for side, place in zip(sides, places, strict=True))
            for sides in (self._own, self._lower, self._way)
        )
        rows, grid = np.arange(inputs.shape[-1]), self._grid
        lower = (1 - v) * grid[rows, i, a, j, b] + v * grid[rows, i, a, j, b + 1]
        upper = (1 - v) * grid[rows, i, a + 1, j, b] + v * grid[rows, i, a + 1, j, b + 1]
        values: Floats = (1 - u) * lower + u * upper
        return values


def _rising(grid: Floats, axis: int) -> Floats:
    """The grid with no value that falls along an axis: halfway between the nearest ones above and below."""
    above = np.maximum.accumulate(grid, axis=axis)
    below = np.flip(np.minimum.accumulate(np.flip(grid, axis), axis=axis), axis)
    rising: Floats = (above + below) / 2
    return rising
