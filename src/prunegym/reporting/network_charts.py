"""Charts of one network: the channels that plans keep, and where its time goes.

Each function draws one figure, to be called within :func:`~prunegym.reporting.pictures.one_look`. Groups and layers are
rows, so that a chart of many is tall and not crowded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from prunegym.reporting.charts import NARROW, Marks
from prunegym.reporting.gather import Record
from prunegym.reporting.pictures import COLOURS, INK, LINE, MUTED, SURFACE, new_figure

#: Characters of a name that fit beside a chart.
LONGEST_NAME = 32
ROW = 0.235
"""Inches of a row."""
#: Layers that are shown of the slowest.
_SLOWEST = 10
#: Kinds of modules that get a colour; the rest is one.
_KINDS = 5


def shorten(name: str, longest: int = LONGEST_NAME) -> str:
    """A name with its middle left out if it is too long; beginning and end tell module paths apart."""
    if len(name) <= longest:
        return name
    head = (longest - 1) // 3
    return f"{name[:head]}…{name[len(name) - (longest - 1 - head) :]}"


def short_names(names: Sequence[str], longest: int = LONGEST_NAME) -> list[str]:
    """Names that are short enough; those that are not lose the path that they have in common first."""
    long = [name.split(".") for name in names if len(name) > longest]
    common = 0
    while len(long) > 1 and all(len(one) > common + 1 and one[common] == long[0][common] for one in long):
        common += 1
    prefix = "".join(f"{part}." for part in long[0][:common]) if long else ""
    return [
        shorten(f"…{name[len(prefix) :]}" if prefix and name.startswith(prefix) else name, longest) for name in names
    ]


def name_width(names: Sequence[str], size: float = 9.5) -> float:
    """Inches that the longest of some (short) names takes, as wide as letters get on average."""
    return 0.0086 * size * max((len(name) for name in names), default=1)


def kept_channels(sizes: Mapping[str, int], plans: Mapping[str, Mapping[str, int]], marks: Marks) -> Figure:
    """Share of channels that plans keep in each group: bars for the first plan, marks for the others.

    Args:
        sizes: Channels before, by group.
        plans: Searcher -> group -> channels after.
        marks: Colours and markers.
    """
    names = list(sizes)
    figure = new_figure(NARROW, 0.85 + ROW * len(names) + 0.2 * -(-len(plans) // 3))
    axes = figure.subplots()
    places = np.arange(len(names))
    first, *others = plans
    shares = [100 * plans[first].get(name, sizes[name]) / max(sizes[name], 1) for name in names]
    axes.barh(places, [100] * len(names), height=0.62, color=LINE, alpha=0.45)
    axes.barh(places, shares, height=0.62, color=marks.colour(first), label=first)
    for name in others:
        values = [100 * plans[name].get(group, sizes[group]) / max(sizes[group], 1) for group in names]
        axes.plot(
            values,
            places,
            marks.marker(name),
            color=marks.colour(name),
            markeredgecolor=SURFACE,
            markeredgewidth=0.7,
            markersize=6,
            linestyle="none",
            label=name,
        )
    for place, name in enumerate(names):
        text = f"{plans[first].get(name, sizes[name])} of {sizes[name]}"
        axes.text(102, place, text, va="center", ha="left", fontsize=9, color=MUTED)
    _rows(axes, short_names(names))
    axes.set(xlim=(0, 128), xlabel="channels kept, %")
    axes.set_xticks([0, 25, 50, 75, 100])
    handles, labels = axes.get_legend_handles_labels()
    order = [labels.index(name) for name in plans]  # bars would come last
    figure.legend(
        [handles[index] for index in order], list(plans), loc="outside lower center", ncols=min(3, len(plans))
    )
    return figure


def time_by_kind(before: Record, after: Record) -> Figure:
    """Seconds of a run by kind of module, before and after, one bar each."""
    kinds = sorted({*before["kinds"], *after["kinds"]}, key=lambda kind: -before["kinds"].get(kind, 0.0))
    shown, rest = kinds[:_KINDS], kinds[_KINDS:]
    figure = new_figure(NARROW, 1.75 + 0.2 * -(-(len(shown) + 1) // 2))
    axes = figure.subplots()
    left = np.zeros(2)
    for index, kind in enumerate([*shown, *(["other"] if rest else [])]):
        parts = [kind] if kind != "other" or not rest else rest
        widths = np.array([1e3 * sum(one["kinds"].get(part, 0.0) for part in parts) for one in (before, after)])
        colour = COLOURS[index] if index < _KINDS else LINE
        axes.barh([0, 1], widths, left=left, height=0.6, color=colour, edgecolor=SURFACE, linewidth=0.8, label=kind)
        left += widths
    for place, total in enumerate(left):
        axes.text(total, place, f"  {total:.3g} ms", va="center", ha="left", color=INK)
    _rows(axes, ["before", "after"])
    axes.set(xlim=(0, 1.2 * max(left.max(), 1e-9)), xlabel="milliseconds per run")
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def slowest_layers(before: Record, after: Record) -> Figure:
    """The modules that took longest before, with what they take now."""
    later = {one["module"]: one["seconds"] for one in after["modules"]}
    slowest = sorted(before["modules"], key=lambda one: -one["seconds"])[:_SLOWEST]
    figure = new_figure(NARROW, 1.1 + 1.15 * ROW * len(slowest))
    axes = figure.subplots()
    places = np.arange(len(slowest))
    for offset, values, colour, label in (
        (-0.19, [1e3 * one["seconds"] for one in slowest], MUTED, "before"),
        (0.19, [1e3 * later.get(one["module"], 0.0) for one in slowest], COLOURS[0], "after"),
    ):
        axes.barh(places + offset, values, height=0.36, color=colour, label=label)
    _rows(axes, short_names([one["module"] or "the network itself" for one in slowest]))
    axes.set(xlabel="milliseconds per run", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def _rows(axes: Any, names: Sequence[str]) -> None:
    """One row per name, the first on top."""
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(axis="y", visible=False)
