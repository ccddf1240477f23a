"""The channel graph as an arc diagram, and the attention between its groups as a matrix.

Groups are rows in the order in which the network makes them, so that graphs of any size can be read: the picture gets
taller, never denser. Each function draws one figure, to be called within :func:`~prunegym.reporting.pictures.one_look`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch, Rectangle
from matplotlib.path import Path as Curve
from numpy.typing import NDArray

from prunegym.reporting.gather import Record
from prunegym.reporting.network_charts import ROW, name_width, short_names
from prunegym.reporting.pictures import COLOURS, INK, LINE, MUTED, new_figure

Floats: TypeAlias = NDArray[np.float64]

#: Inches of the parts of a row, and above the first.
_COLUMN, _GAP, _ARCS, _HEAD, _EDGE = 1.0, 0.12, 1.15, 0.5, 0.08
#: Groups that are drawn as the most attended to by each group.
_LOOKS = 2
_CELL, _LEVELS = 0.17, 8
GLOBAL = "(whole network)"
"""The token that knows budget, round and costs."""


@dataclass(frozen=True)
class Column:
    """A bar and a text for each group."""

    title: str
    shares: Sequence[float | None]
    """Lengths of the bars, 0 to 1; no bar for None."""
    texts: Sequence[str]
    colour: str = COLOURS[0]


def layers_between(groups: Sequence[Record]) -> dict[tuple[int, int], list[str]]:
    """Layers that read one group and make another.

    Args:
        groups: With ``made_by`` and ``read_by``, as ``prunegym inspect`` lists them.

    Returns:
        (Number of the group that is read, number of the one that is made) -> paths of the layers; a layer that keeps
        its channels, such as a depthwise convolution, is none.
    """
    makes: dict[str, list[int]] = {}
    for index, group in enumerate(groups):
        for layer in group["made_by"]:
            makes.setdefault(layer, []).append(index)
    found: dict[tuple[int, int], list[str]] = {}
    for index, group in enumerate(groups):
        for layer in group["read_by"]:
            for made in makes.get(layer, ()):
                if made != index:
                    found.setdefault((index, made), []).append(layer)
    return found


def channel_graph(
    names: Sequence[str],
    layers: Mapping[tuple[int, int], Sequence[str]],
    columns: Sequence[Column],
    *,
    frozen: Collection[int] = (),
    links: Floats | None = None,
    between: Floats | None = None,
) -> Figure:
    """Draw groups as rows, with the layers between them as arcs to the right.

    Args:
        names: Groups.
        layers: As of :func:`layers_between`.
        columns: Beside the names.
        frozen: Numbers of the groups that are not pruned.
        links: ``(G, G)`` attention along the edges of the graph; makes the arcs of layers thicker.
        between: ``(G, G)`` attention between the groups in the transformer, row looks at column; arcs to the left.
    """
    left = _EDGE + (_ARCS if between is not None else 0.0)
    shown = short_names(names)
    bars = left + max(name_width(shown), 0.5) + _GAP
    right = bars + len(columns) * (_COLUMN + _GAP)
    width, height = right + (_ARCS if layers else 0.0) + _EDGE, _HEAD + ROW * len(names) + 0.1
    figure = new_figure(width, height)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.axis("off")
    y: Floats = _HEAD + ROW * (np.arange(len(names), dtype=np.float64) + 0.5)
    for row in range(0, len(names), 2):
        stripe = (left - 0.04, y[row] - ROW / 2)
        axes.add_patch(Rectangle(stripe, right - left + 0.04, ROW, color=LINE, alpha=0.25, linewidth=0))
    _head(axes, left, "group", "left")
    for index, name in enumerate(shown):
        axes.text(left, y[index], name, va="center", ha="left", color=MUTED if index in frozen else INK)
    for index, column in enumerate(columns):
        _draw_column(axes, bars + index * (_COLUMN + _GAP), y, column)
    if layers:
        _head(axes, right, "layers between", "left")
        _draw_layers(axes, right, y, layers, links)
    if between is not None:
        _head(axes, left - 0.12, "looks at", "right")
        _draw_looks(axes, left - 0.08, y, between)
    return figure


def _head(axes: Any, x: float, text: str, side: str) -> None:
    axes.text(x, _HEAD / 2, text, va="center", ha=side, color=MUTED, fontsize=9, fontweight="bold")


def _draw_column(axes: Any, x: float, y: Floats, column: Column) -> None:
    """Bars with their texts behind them."""
    _head(axes, x, column.title, "left")
    for place, share, text in zip(y, column.shares, column.texts, strict=True):
        if share is not None:
            axes.add_patch(Rectangle((x, place - 0.06), 0.4, 0.12, color=LINE, alpha=0.8, linewidth=0))
            length = 0.4 * min(max(share, 0.0), 1.0)
            axes.add_patch(Rectangle((x, place - 0.06), length, 0.12, color=column.colour, linewidth=0))
        axes.text(x + 0.46, place, text, va="center", ha="left", color=MUTED, fontsize=9)


def _draw_layers(
    axes: Any, x: float, y: Floats, layers: Mapping[tuple[int, int], Sequence[str]], links: Floats | None
) -> None:
    """Arcs from the group that is read to the one that is made; those that lead back up are dashed."""
    strongest = 1.0 if links is None else max(float(links.max()), 1e-9)
    longest = max(abs(made - read) for read, made in layers)
    for (read, made), paths in layers.items():
        width = 1.1 + 0.4 * (min(len(paths), 4) - 1)
        if links is not None:
            width = 0.5 + 3.0 * max(links[made, read], links[read, made]) / strongest
        down = made > read
        colour = COLOURS[0] if down else COLOURS[1]
        style = "-" if down else (0, (3, 1.5))
        reach = _reach(abs(made - read), longest)
        _arc(
            axes, x, (y[read] + 0.03, y[made] - 0.03), reach, color=colour, linewidth=width, linestyle=style, alpha=0.85
        )


def _draw_looks(axes: Any, x: float, y: Floats, between: Floats) -> None:
    """Arcs from each group to those that it looks at most, with a dot where it looks."""
    others = between * (1 - np.eye(len(between)))
    strongest = max(float(others.max(initial=0.0)), 1e-9)
    for looking, row in enumerate(others):
        for seen in np.argsort(-row, kind="stable")[: min(_LOOKS, len(row) - 1)]:
            weight = float(row[seen]) / strongest
            if weight > 0:
                reach = -_reach(abs(int(seen) - looking), len(others) - 1)
                style: dict[str, Any] = {"linewidth": 0.4 + 1.8 * weight, "alpha": 0.25 + 0.65 * weight}
                _arc(axes, x, (y[looking], y[seen]), reach, color=COLOURS[3], **style)
                axes.plot(x, y[seen], "o", color=COLOURS[3], markersize=4.5)


def _reach(rows: int, longest: int) -> float:
    """Inches that an arc over so many rows bows out: further the longer it is, so that arcs tell apart."""
    most = min(_ARCS, 0.25 + 0.16 * math.pow(longest, 0.75))
    return 0.2 + (most - 0.2) * math.pow((rows - 1) / max(longest - 1, 1), 0.6)


def _arc(axes: Any, x: float, ends: tuple[float, float], reach: float, *, color: str, **style: Any) -> None:
    """A curve between two heights."""
    # a Bezier curve with both handles at d reaches three quarters of d
    handle = x + reach / 0.75
    points = [(x, ends[0]), (handle, ends[0]), (handle, ends[1]), (x, ends[1])]
    curve = Curve(points, [Curve.MOVETO, Curve.CURVE4, Curve.CURVE4, Curve.CURVE4])
    axes.add_patch(PathPatch(curve, facecolor="none", edgecolor=color, **style))


def attention_matrix(names: Sequence[str], between: Floats) -> Figure:
    """Who looks at whom in the transformer: the darker, the larger the share of a row's attention.

    Args:
        names: Groups.
        between: ``(1 + G, 1 + G)``, the first token being the global one.
    """
    tokens = [GLOBAL, *short_names(names)]
    count, left, top = len(tokens), name_width(tokens, 9) + 0.45, 0.62
    width = left + max(_CELL * count, 1.2) + _EDGE
    figure = new_figure(width, top + _CELL * count + _EDGE)
    figure.set_layout_engine("none")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(top + _CELL * count + _EDGE, 0))
    axes.axis("off")
    axes.add_patch(Rectangle((left, top), _CELL * count, _CELL * count, color=LINE, alpha=0.35, linewidth=0))
    levels = np.ceil(_LEVELS * between / max(float(between.max()), 1e-9)).astype(int)
    for level in range(1, _LEVELS + 1):
        cells = np.argwhere(levels == level).astype(np.float64)
        if len(cells):
            _draw_cells(axes, left + _CELL * cells[:, 1], top + _CELL * cells[:, 0], level / _LEVELS)
    for index, name in enumerate(tokens):
        middle = top + _CELL * (index + 0.5)
        axes.text(left - 0.08, middle, f"{name}  {index}", va="center", ha="right", color=INK, fontsize=9)
        if index % 5 == 0 or count <= 12:
            axes.text(
                left + _CELL * (index + 0.5), top - 0.06, str(index), va="bottom", ha="center", color=MUTED, fontsize=9
            )
    axes.text(left, 0.2, "is looked at", va="center", ha="left", color=MUTED, fontsize=9, fontweight="bold")
    axes.text(left - 0.08, top - 0.12, "looks", va="center", ha="right", color=MUTED, fontsize=9, fontweight="bold")
    return figure


def _draw_cells(axes: Any, x: Floats, y: Floats, alpha: float) -> None:
    """Many equal squares as one shape: a picture of thousands stays small."""
    size = 0.94 * _CELL
    corners = np.stack([x, y, x + size, y, x + size, y + size, x, y + size, x, y], axis=1).reshape(-1, 2)
    codes = [Curve.MOVETO, Curve.LINETO, Curve.LINETO, Curve.LINETO, Curve.CLOSEPOLY] * len(x)
    axes.add_patch(PathPatch(Curve(corners, codes), facecolor=COLOURS[0], edgecolor="none", alpha=alpha))
