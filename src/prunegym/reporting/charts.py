"""Charts of scores: accuracy against cost, rivals side by side, learning curves, searches over time.

Each function draws one figure, to be called within :func:`~prunegym.reporting.pictures.one_look`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from prunegym.experiments.comparison.pictures import draw_searches
from prunegym.experiments.comparison.summary import Pair, Table
from prunegym.reporting.gather import Record, Training
from prunegym.reporting.pictures import COLOURS, INK, MUTED, SURFACE, new_figure
from prunegym.reporting.scores import LEARNED, SIMPLE, Scored

#: Inches: two beside each other on a wide screen, one below the other on a telephone.
NARROW = 4.3
_MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
_BLUE, _ORANGE, _GREEN, _PINK, _SKY, _RED = COLOURS


class Marks:
    """Colour and marker of each searcher, the same in all charts of a page.

    Args:
        searchers: All that occur on the page.
    """

    def __init__(self, searchers: Sequence[str]) -> None:
        fixed = {"uniform": (MUTED, "s"), "knapsack": (_GREEN, "D")}
        learned = [(_BLUE, "o"), (_ORANGE, "o"), (_SKY, "o")]
        others = [(colour, marker) for marker in _MARKERS[3:] for colour in (_RED, _PINK, _GREEN, _SKY, _ORANGE)]
        self._of: dict[str, tuple[str, str]] = {}
        for name in sorted(set(searchers), key=lambda one: (one not in LEARNED, _rank(one), one)):
            if name in fixed:
                self._of[name] = fixed[name]
            elif name in LEARNED and learned:
                self._of[name] = learned.pop(0)
            else:
                self._of[name] = others.pop(0) if others else (INK, "o")

    def colour(self, searcher: str) -> str:
        """Its colour."""
        return self._of.get(searcher, (INK, "o"))[0]

    def marker(self, searcher: str) -> str:
        """Its marker."""
        return self._of.get(searcher, (INK, "o"))[1]


def _rank(searcher: str) -> int:
    return LEARNED.index(searcher) if searcher in LEARNED else len(LEARNED)


def pareto(
    priced: Sequence[tuple[Scored, float]], unpruned: tuple[float, float] | None, marks: Marks, label: str
) -> Figure:
    """Accuracy against what is left of a cost: a mark per searcher and budget, and the front.

    Args:
        priced: Rows of one field, with what is left of the unpruned network's cost.
        unpruned: Cost and score of the network as it was.
        marks: Colours and markers.
        label: What the cost is.
    """
    groups: dict[tuple[str, str], list[tuple[Scored, float]]] = {}
    for row, cost in priced:
        groups.setdefault((row.searcher, row.budget), []).append((row, cost))
    points = {key: (fmean(cost for _, cost in some), [row.score for row, _ in some]) for key, some in groups.items()}
    searchers = list(dict.fromkeys(name for name, _ in groups))
    figure = new_figure(NARROW, 3.3 + 0.2 * -(-(len(searchers) + 1) // 3))
    axes = figure.subplots()
    front = pareto_front([(cost, fmean(scores)) for cost, scores in points.values()] + ([unpruned] if unpruned else []))
    axes.plot(
        [100 * cost for cost, _ in front],
        [100 * score for _, score in front],
        color=MUTED,
        linewidth=1,
        linestyle="--",
        label="Pareto front",
        zorder=1,
    )
    for (name, _), (cost, scores) in points.items():
        colour = marks.colour(name)
        if len(scores) > 1:
            axes.plot([100 * cost] * 2, [100 * min(scores), 100 * max(scores)], color=colour, linewidth=1.2, zorder=2)
        _point(axes, 100 * cost, 100 * fmean(scores), marks, name)
    if unpruned is not None:
        axes.plot(100 * unpruned[0], 100 * unpruned[1], "*", color=INK, markersize=11, label="unpruned", zorder=3)
    axes.set(xlabel=label, ylabel="accuracy, %")
    axes.margins(0.08, 0.1)
    handles, labels = axes.get_legend_handles_labels()
    known = dict(zip(labels, handles, strict=True))
    figure.legend(known.values(), known.keys(), loc="outside lower center", ncols=min(3, len(known)))
    return figure


def _point(axes: Any, x: float, y: float, marks: Marks, name: str) -> None:
    axes.plot(
        x,
        y,
        marks.marker(name),
        color=marks.colour(name),
        markeredgecolor=SURFACE,
        markeredgewidth=0.7,
        markersize=7.5,
        label=name,
        linestyle="none",
        zorder=4 if name in LEARNED else 3,
    )


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points that no other beats in both cost (lower is better) and score (higher is better), by cost."""
    front: list[tuple[float, float]] = []
    for cost, score in sorted(set(points), key=lambda point: (point[0], -point[1])):
        if not front or score > front[-1][1]:
            front.append((cost, score))
    return front


def rivals(found: Mapping[str, Sequence[Scored]], unpruned: float | None, marks: Marks) -> Figure:
    """All searchers at one budget, best first: a mark at the mean, a small one for each run."""
    names = sorted(found, key=lambda name: -fmean(row.score for row in found[name]))
    figure = new_figure(NARROW, 0.75 + 0.27 * len(names))
    axes = figure.subplots()
    for place, name in enumerate(names):
        scores = [100 * row.score for row in found[name]]
        if len(scores) > 1:
            axes.plot(scores, [place] * len(scores), "|", color=marks.colour(name), markersize=9, zorder=2)
            axes.plot([min(scores), max(scores)], [place] * 2, color=marks.colour(name), linewidth=1, zorder=2)
        _point(axes, fmean(scores), place, marks, name)
    if "uniform" in found:
        axes.axvline(100 * fmean(row.score for row in found["uniform"]), color=MUTED, linewidth=1, linestyle=":")
    low, high = axes.get_xlim()
    if unpruned is not None and 100 * unpruned - high < high - low:  # otherwise it would press the others together
        axes.axvline(100 * unpruned, color=INK, linewidth=1, linestyle="--")
    axes.set_yticks(range(len(names)), [_tell(name) for name in names])
    axes.set(ylim=(len(names) - 0.5, -0.5), xlabel="accuracy, %")
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.tick_params(axis="y", labelcolor=INK, length=0)
    axes.grid(axis="y", visible=False)
    return figure


def _tell(searcher: str) -> str:
    return f"{searcher} *" if searcher in SIMPLE else searcher


def learning_curve(trainings: Sequence[Training], references: Mapping[str, float]) -> Figure:
    """Score on the reward split over evaluations: the policy's own plan and the best sampled, one line per seed.

    Args:
        trainings: Of one network and budget, or of one command; several seeds lie over each other.
        references: Name -> score that the curves are compared with.
    """
    figure = new_figure(NARROW, 3.4)
    axes = figure.subplots()
    for index, one in enumerate(trainings):
        evaluations = [row["evaluations"] for row in one.metrics]
        for column, label, colour, width in (
            ("score_mean", "mean of the sampled plans", MUTED, 0.9),
            ("best", "best sampled plan", _ORANGE, 1.6),
            ("own", "the policy's own plan", _BLUE, 1.6),
        ):
            axes.plot(
                evaluations,
                [math.nan if row.get(column) is None else 100 * row[column] for row in one.metrics],
                color=colour,
                linewidth=width,
                marker="." if len(evaluations) < 3 else None,
                alpha=0.6 if column == "score_mean" else 0.9,
                label=label if index == 0 else None,
            )
    for (name, score), style in zip(references.items(), ("--", ":", "-."), strict=False):
        axes.axhline(100 * score, color=MUTED, linestyle=style, linewidth=1.2, label=name)
    axes.set(xlabel="evaluations", ylabel="reward accuracy, %", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def anytime(
    rows: Sequence[Record], curves: Sequence[Record], searchers: Sequence[str], pair: Pair, marks: Marks
) -> Figure:
    """What each search of a comparison would have returned, had it been stopped: over evaluations."""
    figure = new_figure(NARROW, 3.3 + 0.2 * -(-len(searchers) // 3))
    axes = figure.subplots()
    styles = {name: {"color": marks.colour(name), "marker": marks.marker(name)} for name in searchers}
    draw_searches(axes, Table(rows, curves, tuple(searchers)), pair, "evaluations", styles)
    axes.set(xlabel="evaluations", ylabel="accuracy after recovery, %", xlim=(0, None))
    figure.legend(loc="outside lower center", ncols=min(3, len(searchers)))
    return figure
