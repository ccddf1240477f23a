"""One look for all pictures of runs, drawn without a display; and the overview of a demonstration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from prunegym.pruning.files import replacing

#: Colours that stay apart for colour-blind readers and in grey (Okabe and Ito, 2008).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
INK, MUTED, LINE, SURFACE = "#1f2328", "#59636e", "#d1d9e0", "#ffffff"
"""Text, less important text, grids and frames, and what is behind them."""
FORMATS = (".png", ".svg")
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": LINE,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": SURFACE,
    "figure.facecolor": SURFACE,
    "figure.titlesize": 11,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": LINE,
    "ytick.color": LINE,
    "xtick.labelcolor": MUTED,
    "ytick.labelcolor": MUTED,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "text.parse_math": False,  # names may hold a dollar sign
    "svg.fonttype": "none",  # text stays text: it can be searched, copied, and read in any size
    "svg.hashsalt": "prunegym",  # the same picture is the same file
}


@contextmanager
def one_look() -> Iterator[None]:
    """Draw and save in the look that all pictures share."""
    with mpl.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches; to be drawn and saved within :func:`one_look`."""
    # not pyplot, which keeps global state and asks for a display
    figure = Figure(figsize=(width, height))
    # room at the sides: a label below the last tick reaches beyond the axes
    figure.set_layout_engine("constrained", w_pad=0.12, h_pad=0.05)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path, suffixes: Sequence[str] = FORMATS) -> list[Path]:
    """Save a figure, replacing what is there.

    Args:
        figure: The figure.
        path: The files, without the suffix.
        suffixes: Kinds of files.

    Returns:
        The files.

    Raises:
        PruningError: A file could not be written.
    """
    # appended, not replaced: names hold dots
    paths = [path.parent / f"{path.name}{suffix}" for suffix in suffixes]
    for one in paths:
        with replacing(one) as temporary:
            figure.savefig(temporary, dpi=150, metadata={"Date": None} if one.suffix == ".svg" else None)
    return paths


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
    with one_look():
        figure = new_figure(12, 4.5)
        left, right = figure.subplots(1, 2)
        _draw_curve(left, curve, references)
        _draw_channels(right, channels)
        figure.suptitle(title)
        save_figure(figure, path.with_suffix(""), (path.suffix,))


def _draw_curve(axes: Any, curve: Sequence[Mapping[str, Any]], references: Mapping[str, float]) -> None:
    """Score over evaluations."""
    evaluations = [row["evaluations"] for row in curve]
    for name, label, colour in (
        ("best", "best sampled plan", COLOURS[1]),
        ("own", "the policy's own plan", COLOURS[0]),
    ):
        axes.plot(evaluations, [row[name] for row in curve], marker=".", color=colour, label=label)
    for style, (name, score) in zip(("--", ":", "-."), references.items(), strict=False):
        axes.axhline(score, color=MUTED, linestyle=style, label=name)
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
