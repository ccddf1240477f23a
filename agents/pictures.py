"""Pictures of runs, drawn without a display."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunegym.pruning.files import replacing

#: Colours that stay apart for colour-blind readers and in grey (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
_GREY = "#777777"


def draw_overview(
    path: Path,
    curve: Sequence[Mapping[str, Any]],
    references: Mapping[str, float],
    channels: Mapping[str, Mapping[str, float]],
    *,
    title: str,
) -> None:
    """Draw a learning curve and, beside it, the channels that each searcher keeps.

    Args:
        path: The picture, ``.png``; replaced if it exists.
        curve: Rows with ``evaluations``, ``own`` (score of the policy's own plan) and ``best`` (of the best
            sampled plan).
        references: Name -> score that the curve is compared with: a horizontal line each.
        channels: Searcher -> group -> share of channels kept.
        title: What was pruned.

    Raises:
        PruningError: The file could not be written.
    """
    # not pyplot, which keeps global state and asks for a display
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    _draw_curve(left, curve, references)
    _draw_channels(right, channels)
    figure.suptitle(title)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)


def _draw_curve(axes: Any, curve: Sequence[Mapping[str, Any]], references: Mapping[str, float]) -> None:
    """Score over evaluations."""
    evaluations = [row["evaluations"] for row in curve]
    for name, label, colour in (
        ("best", "best sampled plan", COLOURS[1]),
        ("own", "the policy's own plan", COLOURS[0]),
    ):
        axes.plot(evaluations, [row[name] for row in curve], marker=".", color=colour, label=label)
    for style, (name, score) in zip(("--", ":", "-."), references.items(), strict=False):
        axes.axhline(score, color=_GREY, linestyle=style, label=name)
    axes.set(xlabel="evaluations", ylabel="score on the reward split", title="learning curve")
    axes.legend()


def _draw_channels(axes: Any, channels: Mapping[str, Mapping[str, float]]) -> None:
    """Share of channels kept in each group, one bar per searcher."""
    groups = list(next(iter(channels.values()), {}))
    width = 0.8 / max(len(channels), 1)
    for index, (searcher, kept) in enumerate(channels.items()):
        places = [place + (index - (len(channels) - 1) / 2) * width for place in range(len(groups))]
        shares = [kept[group] for group in groups]
        axes.bar(places, shares, width, label=searcher, color=COLOURS[index % len(COLOURS)])
    axes.set_xticks(range(len(groups)), groups, rotation=40, ha="right")
    # room for the legend above the bars
    axes.set(ylim=(0, 1.2), ylabel="share of channels kept", title="kept channels per group")
    axes.legend(loc="upper center", ncols=max(len(channels), 1))
