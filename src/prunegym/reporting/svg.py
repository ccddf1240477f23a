"""From a figure to SVG within a page: text as text, colours of the page's theme, identifiers of its own.

The same figure is saved as PNG and SVG where the pictures are wanted apart.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from matplotlib.figure import Figure

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import write_failure
from prunegym.reporting.pictures import COLOURS, INK, LINE, MUTED, SURFACE, one_look, save_figure

#: Colours of figures -> names of colours of the page, which has others on a dark background.
THEME = {
    INK: "ink",
    MUTED: "muted",
    LINE: "line",
    SURFACE: "surface",
    **{colour: f"series-{index}" for index, colour in enumerate(COLOURS)},
}
#: CSS pixels per point: smaller a picture scrolls in its box rather than shrink, larger it does not grow.
_LEAST_SCALE, _MOST_SCALE = 1.12, 1.6
_DECIMALS = re.compile(r"(\d+\.\d{2})\d+")


@dataclass(frozen=True, kw_only=True)
class Picture:
    """A figure on the page."""

    name: str
    """Unique on the page, and the name of its files."""
    caption: str
    svg: str
    least_width: int
    """CSS pixels."""
    most_width: int
    files: tuple[str, ...] = ()
    """Names of the files it was saved as."""


@dataclass
class Gallery:
    """Makes pictures.

    Args:
        folder: Where to save each as PNG and SVG too; None saves none.
    """

    folder: Path | None = None
    pictures: list[Picture] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.folder is not None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise write_failure(self.folder, error, "--pictures") from error

    def add(self, name: str, draw: Callable[[], Figure], caption: str) -> Picture:
        """Draw a figure and make a picture of it.

        Args:
            name: What it shows, in letters, digits, dots and hyphens.
            draw: Draws the figure.
            caption: What there is to see.

        Raises:
            PruningError: A file could not be written.
        """
        name = self._unique(re.sub(r"[^\w.]+", "-", name, flags=re.ASCII).strip("-."))
        with one_look():
            figure = draw()
            svg = inline_svg(figure, f"p{len(self.pictures)}", caption)
            files = save_figure(figure, self.folder / name) if self.folder is not None else []
        points = 72 * figure.get_figwidth()
        picture = Picture(
            name=name,
            caption=caption,
            svg=svg,
            least_width=round(_LEAST_SCALE * points),
            most_width=round(_MOST_SCALE * points),
            files=tuple(path.name for path in files),
        )
        self.pictures.append(picture)
        return picture

    def _unique(self, name: str) -> str:
        taken = {one.name for one in self.pictures}
        numbered = name
        count = 1
        while numbered in taken:
            count += 1
            numbered = f"{name}-{count}"
        return numbered


def inline_svg(figure: Figure, prefix: str, label: str) -> str:
    """SVG to be put into HTML.

    Args:
        figure: The figure, drawn within :func:`~prunegym.reporting.pictures.one_look`.
        prefix: Set before every identifier, so that pictures of one page do not take each other's.
        label: What the picture shows, for those who cannot see it.

    Raises:
        PruningError: The prefix is no name.
    """
    if not re.fullmatch(r"[A-Za-z][\w-]*", prefix):
        raise PruningError(f"`prefix` should be letters, digits and hyphens. Received {prefix!r}.")
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r"<style.*?</style>\s*", "", text, flags=re.DOTALL)  # would hold for the whole page
    text = re.sub(r'(<[^>]*?\s)id="', rf'\1id="{prefix}-', text)
    text = text.replace('xlink:href="#', f'href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    text = re.sub(r' font-family: [^;"]*;', "", text)  # the page has its own
    for colour, name in THEME.items():
        text = re.sub(rf": {colour}\b", f": var(--{name})", text, flags=re.IGNORECASE)
    text = re.sub(r' (?:d|x|y|transform|width|height)="[^"]*"', lambda one: _DECIMALS.sub(r"\1", one[0]), text)
    head, _, rest = text.partition(">")
    view = re.search(r'viewBox="[^"]*"', head)
    assert view is not None
    escaped = label.replace("&", "&amp;").replace('"', "&quot;").replace("<", "&lt;")
    return f'<svg {view[0]} role="img" aria-label="{escaped}">{rest.rstrip()}'
