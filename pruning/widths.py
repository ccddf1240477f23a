"""How many channels a group may keep: alignment, fewest channels and bounds, as one object.

:class:`WidthRules` is what a user asks for, :class:`Widths` what follows for the groups of one network. A group
counts in units; in most layers a unit is one channel, in a grouped convolution it can be several.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph, ChannelGroup

Counts = NDArray[np.int64]
_EXAMPLES = "Write for example 'layer1.*=0.5..1', 'stem=16ch..' or 'blocks.*=0.75'."
_SLACK = 1e-9  # 0.7 of 10 channels is 7, whatever floating-point numbers make of it
_SHOWN = 6


@dataclass(frozen=True, eq=False)
class Widths:
    """The counts that each group may keep ``(groups,)``.

    They are the multiples of the group's step from ``smallest`` to ``largest``, and ``largest`` itself, which is
    the full size if that is allowed, multiple or not.
    """

    sizes: Counts
    """Units of each group of the unpruned network."""
    smallest: Counts
    largest: Counts
    step: Counts
    rules: str = ""
    """The rules that restrict the counts, for error messages; empty where any count is allowed."""

    @classmethod
    def free(cls, sizes: Counts) -> Widths:
        """Any count from 1 to all."""
        ones = np.ones(len(sizes), dtype=np.int64)
        return cls(sizes, ones, sizes, ones)

    def within(self, counts: Counts) -> Widths:
        """The same, with no more than ``counts`` (what earlier rounds of pruning left)."""
        return replace(self, largest=self.floor(np.minimum(self.largest, counts)))

    def at_least(self, counts: Counts) -> Widths:
        """The same, with no fewer than ``counts``, rounded up; where that is too many, with the largest only."""
        multiples = -(-counts // self.step) * self.step
        return replace(self, smallest=np.clip(multiples, self.smallest, self.largest))

    def choices(self) -> list[Counts]:
        """For each group the counts it may keep ``(choices,)``, rising; a group with one choice cannot be pruned."""
        ranges = zip(self.smallest.tolist(), self.largest.tolist(), self.step.tolist(), strict=True)
        return [
            np.array([low, *range((low // step + 1) * step, high, step), *([high] if high > low else [])], np.int64)
            for low, high, step in ranges
        ]

    def allow(self, counts: Counts) -> NDArray[np.bool_]:
        """Whether each group may keep its count ``(groups,)``."""
        allowed: NDArray[np.bool_] = self.floor(counts) == counts
        return allowed

    def floor(self, counts: Counts) -> Counts:
        """The largest allowed count of each group that is at most ``counts``, or its smallest."""
        multiples = np.maximum(counts // self.step * self.step, self.smallest)
        return np.where(counts >= self.largest, self.largest, multiples)

    def nearest(self, keep: NDArray[np.float64]) -> Counts:
        """The allowed counts nearest to keep ratios ``(groups,)`` in [0, 1]; halves are rounded up."""
        asked = keep * self.sizes
        multiples = np.floor(asked / self.step + 0.5).astype(np.int64) * self.step
        below = self.largest // self.step * self.step  # differs from `largest` where that is no multiple
        top = asked >= (below + self.largest) / 2
        multiples = np.where((below < self.largest) & top, self.largest, np.minimum(multiples, below))
        counts: Counts = np.clip(multiples, self.smallest, self.largest)
        return counts

    def up(self, counts: Counts) -> Counts:
        """The next larger allowed count of each group, from allowed counts; at the largest it stays."""
        larger: Counts = np.minimum((counts // self.step + 1) * self.step, self.largest)
        return larger


@dataclass(frozen=True)
class Bound:
    """Least and most that some groups keep. A whole number counts channels, any other is a share of the group."""

    pattern: str
    """Regular expression; matches in full the path of a layer that makes the channels, or of a module around it."""
    low: float | int | None
    high: float | int | None

    @classmethod
    def parse(cls, text: str) -> Bound:
        """Read ``PATTERN=LOW..HIGH``; either end may be left out, and ``PATTERN=VALUE`` leaves no choice.

        Ends are shares of the channels in [0, 1], or channels when they end in ``ch``.

        Raises:
            PruningError: it reads otherwise, or the pattern is no regular expression.
        """
        pattern, _, span = text.rpartition("=")
        low, dots, high = span.partition("..")
        try:
            ends = _end(low), _end(high if dots else low)
            if not pattern or ends == (None, None):
                raise ValueError
            re.compile(pattern)
        except re.error as fault:
            raise PruningError(
                f"`bound` should begin with a regular expression. Received {text!r} ({fault}). "
                "Put a backslash before characters that are meant as they are."
            ) from fault
        except ValueError:
            raise PruningError(
                "`bound` should be PATTERN=LOW..HIGH, whose ends are shares of the channels in [0, 1] or channels "
                f"such as 16ch. Received {text!r}. {_EXAMPLES}"
            ) from None
        least, most = ends
        # a share and a number of channels can only be compared where a group is given
        if least is not None and most is not None and type(least) is type(most) and least > most:
            raise PruningError(f"`bound` should have its lower end first. Received {text!r}. {_EXAMPLES}")
        return cls(pattern, least, most)

    def matches(self, group: ChannelGroup) -> bool:
        """True if it is about this group."""
        return group.matches(self.pattern)

    def units(self, size: int, channels: int) -> tuple[int, int]:
        """Fewest and most units of a group of ``size`` units, where one is ``channels`` wide at its narrowest."""

        def in_units(end: float | int) -> float:
            return end / channels if isinstance(end, int) else end * size

        least = 1 if self.low is None else max(1, math.ceil(in_units(self.low) - _SLACK))
        most = size if self.high is None else math.floor(in_units(self.high) + _SLACK)
        return min(least, size), min(most, size)

    def __str__(self) -> str:
        low, high = ("" if end is None else f"{end}ch" if isinstance(end, int) else f"{end:g}" for end in self._ends)
        return f"{self.pattern}={low}" if low == high else f"{self.pattern}={low}..{high}"

    @property
    def _ends(self) -> tuple[float | int | None, float | int | None]:
        return self.low, self.high


@dataclass(frozen=True)
class WidthRules:
    """What a user asks of the widths of pruned layers."""

    align: int = 1
    """Widths are multiples of it where possible; see :meth:`apply`."""
    min_channels: int = 1
    """Fewest channels that each group keeps; a group that has fewer keeps all."""
    bounds: tuple[Bound, ...] = ()
    """All that match a group hold together."""

    def __post_init__(self) -> None:
        for name in ("align", "min_channels"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name}` should be at least 1. Received {getattr(self, name)}. Leave it out.")

    def __str__(self) -> str:
        numbers = [(self.align, f"align {self.align}"), (self.min_channels, f"min-channels {self.min_channels}")]
        return ", ".join([text for value, text in numbers if value > 1] + [f"bound '{one}'" for one in self.bounds])

    def apply(self, graph: ChannelGraph, *, strict: bool = True) -> Widths:
        """The counts that each group of a network may keep.

        Alignment is of layer widths: a group's step is the fewest units that change the width of every layer they
        are part of by a multiple of ``align``. That is ``align`` itself where a unit is one channel, and fewer where
        it is several in all of its layers (grouped convolutions, attention heads). A group keeps a multiple of its
        step, or everything; so a group smaller than its step is not pruned. A layer that joins several groups is
        aligned when each of them is.

        Args:
            graph: the network's channel graph.
            strict: refuse bounds that match no group that can be pruned.

        Raises:
            PruningError: the rules leave a group no width, or a bound matches no group.
        """
        if strict:
            self.check_matches([graph])
        ranges = [
            self._range(group, channels) for group, channels in zip(graph.groups, unit_widths(graph), strict=True)
        ]
        smallest, largest, step = np.array(ranges, dtype=np.int64).reshape(-1, 3).T
        return Widths(graph.sizes, smallest, largest, step, str(self))

    def check_matches(self, graphs: Sequence[ChannelGraph]) -> None:
        """Make sure that each bound is about a group that can be pruned, of at least one of the networks.

        Raises:
            PruningError: one is not.
        """
        for bound in self.bounds:
            if not any(bound.matches(group) for graph in graphs for group in graph.groups):
                raise _unmatched(bound, graphs)

    def _range(self, group: ChannelGroup, channels: tuple[int, ...]) -> tuple[int, int, int]:
        """Smallest and largest count and step of a group whose units are so many channels wide in its layers."""
        step = math.lcm(*(self.align // math.gcd(self.align, width) for width in channels))
        bounds = [bound for bound in self.bounds if bound.matches(group)]
        low, high = min(-(-self.min_channels // min(channels)), group.size), group.size
        for bound in bounds:
            least, most = bound.units(group.size, min(channels))
            low, high = max(low, least), min(high, most)
        smallest = -(-low // step) * step
        largest = high // step * step
        if high == group.size:
            smallest, largest = min(smallest, group.size), group.size
        if not smallest <= largest:
            raise _no_width(self, group, bounds, step)
        return smallest, largest, step


def unit_widths(graph: ChannelGraph) -> list[tuple[int, ...]]:
    """For each group the channels that one of its units stands for, over all sides of all layers it is part of."""
    widths: list[set[int]] = [set() for _ in graph.groups]
    for one in graph.operations:
        for units in (one.inputs, one.outputs):
            counts = np.bincount(graph.group_of[units[units >= 0]], minlength=len(graph.groups))
            for group in np.flatnonzero(counts).tolist():
                widths[group].add(int(counts[group]) // graph.groups[group].size)
    return [tuple(sorted(one)) or (1,) for one in widths]


def bound_texts(bounds: Mapping[str, str | float | tuple[float, float]] | None) -> tuple[str, ...]:
    """Bounds as the command line takes them.

    Args:
        bounds: patterns with ``LOW..HIGH``, a pair of shares of the channels, or one share that leaves no choice.
    """
    pairs = (bounds or {}).items()
    return tuple(f"{name}={'..'.join(map(str, one)) if isinstance(one, tuple) else one}" for name, one in pairs)


def _end(text: str) -> float | int | None:
    """One end of a bound.

    Raises:
        ValueError: it is none.
    """
    if not text:
        return None
    end = int(text.removesuffix("ch")) if text.endswith("ch") else float(text)
    if not (end >= 1 if isinstance(end, int) else 0 <= end <= 1):
        raise ValueError
    return end


def _unmatched(bound: Bound, graphs: Sequence[ChannelGraph]) -> PruningError:
    groups = sum(len(graph.groups) for graph in graphs)
    frozen = [f"{one.name}: {one.frozen}" for graph in graphs for one in graph.frozen if bound.matches(one)]
    found = f"only what is frozen ({'; '.join(frozen[:2])})" if frozen else f"none of {groups} groups"
    return PruningError(
        "`bound` should match the path of a layer that makes channels that can be pruned, or of a module around it. "
        f"Received '{bound}', which matches {found}. `prunegym inspect` lists the names."
    )


def _no_width(rules: WidthRules, group: ChannelGroup, bounds: list[Bound], step: int) -> PruningError:
    allowed = sorted({*range(step, group.size + 1, step), group.size})
    counts = ", ".join(map(str, allowed[:_SHOWN])) + (", ..." if len(allowed) > _SHOWN else "")
    of_group = WidthRules(rules.align, rules.min_channels, tuple(bounds))
    return PruningError(
        f"`bound` should leave group {group.name} a width. Received {of_group}, where {counts} of {group.size} "
        "channels can be kept. Widen the bound, or lower align or min-channels."
    )
