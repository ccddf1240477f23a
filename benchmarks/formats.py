"""How figures stand in Markdown tables: in percent, with their range or interval."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from statistics import fmean

from prunegym.experiments.comparison.bootstrap import Interval


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""

    def row(cells: Sequence[object]) -> str:
        return "|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells)

    return "\n".join([row(header), "|" + "---|" * len(header), *map(row, lines)])


def with_range(values: Iterable[float]) -> str:
    """Mean with range over seeds, in percent."""
    scores = [100 * one for one in values]
    spread = f" ({min(scores):.1f} to {max(scores):.1f})" if min(scores) < max(scores) else ""
    return f"{fmean(scores):.1f}{spread}"


def with_interval(found: Interval) -> str:
    """Mean with its interval, in percent."""
    low, high = (found.mean if one is None else one for one in (found.low, found.high))
    return f"{100 * found.mean:.1f}" + (f" ({100 * low:.1f} to {100 * high:.1f})" if low < high else "")
