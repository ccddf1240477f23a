"""Pictures of a comparison: anytime curves and performance profiles, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunegym.experiments.comparison.bootstrap import LEVEL, Profile
from prunegym.experiments.comparison.summary import Pair, Table
from prunegym.reporting.pictures import COLOURS, FORMATS, new_figure, one_look, save_figure

__all__ = ["FORMATS", "draw_anytime", "draw_profiles", "draw_searches"]

_LINES, _MARKS = ("-", "--", ":"), ("o", "s", "^")
_POINTS = 400
_POINTS_SHOWN = 30
"""Per cent below the best search that anytime curves show."""
_MOST_PAIRS = 12
"""Pairs drawn at most: a picture of more would be too tall to look at."""


def draw_anytime(path: Path, table: Table) -> None:
    """Draw what each search would have returned, had it been stopped: one line per (network, budget) pair.

    Scores are those after recovery on the selection split, of the plan that was best on the reward split by then (for
    the agent, of its own plan): means over seeds, with their range. What spent no evaluation is a level line.

    Args:
        path: The pictures, without the suffix.
        table: A whole grid.

    Raises:
        PruningError: A file could not be written.
    """
    pairs = table.pairs[:_MOST_PAIRS]
    with one_look():
        figure = new_figure(12, 3.6 * len(pairs) + 0.4)
        panels = figure.subplots(len(pairs), 2, squeeze=False, sharey="row")
        for (left, right), pair in zip(panels, pairs, strict=True):
            for axes, price in ((left, "evaluations"), (right, "seconds")):
                draw_searches(axes, table, pair, price)
                axes.set(xlabel=f"{price} of the search", title=" ".join(pair), xlim=(0, None))
            left.set_ylabel("score after recovery (selection), %")
            left.set_ylim(*_shown_scores(left))
        handles, labels = panels[0][0].get_legend_handles_labels()
        if len(pairs) == 1:
            handles, labels = _ranked(panels[0][0])
        figure.legend(handles, labels, loc="outside upper center", ncols=min(len(labels), 6))
        save_figure(figure, path)


def _finals(axes: Any) -> list[float]:
    """Score in per cent that each line ends with."""
    return [float(line.get_ydata()[-1]) for line in axes.get_lines()]


def _shown_scores(axes: Any) -> tuple[float | None, float | None]:
    """Limits that leave the best apart from each other: what ends far below them is only named."""
    finals = _finals(axes)
    best, worst = np.nanmax(finals), np.nanmin(finals)
    return (float(best) - _POINTS_SHOWN, None) if best - worst > _POINTS_SHOWN else (None, None)


def _ranked(axes: Any) -> tuple[list[Any], list[str]]:
    """Lines and names for the legend, best first; what lies below the panel is marked."""
    lines = sorted(zip(axes.get_lines(), _finals(axes), strict=True), key=lambda one: -np.nan_to_num(one[1], nan=-1))
    lowest = axes.get_ylim()[0]
    names = [f"{line.get_label()}{' (below)' if end < lowest else ''}" for line, end in lines]
    return [line for line, _ in lines], names


def draw_profiles(path: Path, profiles: Mapping[str, Profile], *, title: str) -> None:
    """Draw performance profiles with their bootstrap bands.

    Args:
        path: The pictures, without the suffix.
        profiles: By searcher.
        title: What the scores are.

    Raises:
        PruningError: A file could not be written.
    """
    with one_look():
        figure = new_figure(7, 4.5)
        _draw_profiles(figure.subplots(), profiles, title)
        save_figure(figure, path)


def _draw_profiles(axes: Any, profiles: Mapping[str, Profile], title: str) -> None:
    for index, (name, profile) in enumerate(profiles.items()):
        style = _style(index) | {"marker": None}
        axes.step(100 * profile.behind, profile.share, where="post", label=name, **style)
        axes.fill_between(
            100 * profile.behind, profile.low, profile.high, step="post", color=style["color"], alpha=0.12, linewidth=0
        )
    axes.set(
        xlabel="points behind the best run of the same network and budget",
        ylabel=f"share of runs (bands: {LEVEL:.0%} bootstrap)",
        ylim=(0, 1.02),
        xlim=(0, None),
        title=title,
    )
    axes.legend(fontsize="small", loc="lower right")


def draw_searches(
    axes: Any, table: Table, pair: Pair, price: str, styles: Mapping[str, Mapping[str, Any]] | None = None
) -> None:
    """Draw all searchers of one pair against one price.

    Args:
        axes: Where.
        table: A whole grid with its curves.
        pair: Network and budget.
        price: ``evaluations`` or ``seconds``.
        styles: Colour, dashes and marker of each searcher; by default in the order of the table.
    """
    ends = {name: _end(table, pair, name, price) for name in table.searchers}
    horizon = max(ends.values()) or 1.0
    for index, name in enumerate(table.searchers):
        runs = _points(table.curves, pair, name)
        searched = any(one["evaluations"] for points in runs for one in points)
        end = ends[name] if searched else horizon
        grid = np.linspace(0, end, _POINTS) if searched else np.array([0, horizon])
        values = 100 * np.array([_steps(points, price if searched else None, grid) for points in runs])
        style = _style(index) if styles is None else styles[name]
        # the marker says where the search ended, and in the legend tells those of one colour apart
        axes.plot(grid, values.mean(axis=0), label=name, markevery=[-1], markersize=5, **style)
        if len(runs) > 1 and searched:
            low, high = values.min(axis=0), values.max(axis=0)
            axes.fill_between(grid, low, high, color=style["color"], alpha=0.12, linewidth=0)


def _points(curves: Sequence[Mapping[str, Any]], pair: Pair, searcher: str) -> list[list[Mapping[str, Any]]]:
    """Points of each run of a searcher on a pair."""
    runs: dict[int, list[Mapping[str, Any]]] = {}
    for row in curves:
        if (row["network"], row["budget"]) == pair and row["searcher"] == searcher:
            runs.setdefault(row["seed"], []).append(row)
    return list(runs.values())


def _end(table: Table, pair: Pair, searcher: str, price: str) -> float:
    """What the longest search of a pair cost: by then all have their last plan."""
    return max(table.runs(searcher, price)[table.pairs.index(pair)])


def _steps(points: Sequence[Mapping[str, Any]], price: str | None, grid: NDArray[np.float64]) -> NDArray[np.float64]:
    """Score in force along the grid; NaN before the first plan. Without price, the plan is there from the start."""
    scores = np.array([np.nan, *(one["after_recovery_score"] for one in points)])
    if price is None:
        return np.full(len(grid), scores[-1])
    values: NDArray[np.float64] = scores[np.searchsorted([one[price] for one in points], grid, side="right")]
    return values


def _style(index: int) -> dict[str, Any]:
    """Colour, dashes and marker: more searchers than colours stay apart."""
    return {
        "marker": _MARKS[index // len(COLOURS) % len(_MARKS)],
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _LINES[index // len(COLOURS) % len(_LINES)],
    }
