"""From run folders to the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from prunegym.pruning.files import replacing, write_failure
from prunegym.reporting.charts import Marks
from prunegym.reporting.gather import Run, gather
from prunegym.reporting.headlines import headlines
from prunegym.reporting.network_sections import channels, graph, kept_by, time
from prunegym.reporting.outcomes import reached
from prunegym.reporting.page import Page
from prunegym.reporting.scores import collect
from prunegym.reporting.sections import asked, front, learning
from prunegym.reporting.svg import Gallery
from prunegym.reporting.verdict import verdicts
from prunegym.reporting.words import joined

FILE = "report.html"


@dataclass(frozen=True)
class Written:
    """A page that was written."""

    path: Path
    runs: Sequence[Run]
    page: Page


def report(folders: Sequence[Path], out: Path | None = None, *, pictures: Path | None = None) -> Written:
    """Write one self-contained HTML page about run folders.

    Args:
        folders: Of any command.
        out: The page; by default ``report.html`` in the folder of the only run, or in the working directory if there
            are several.
        pictures: Where to save the pictures as PNG and SVG too.

    Raises:
        PruningError: A folder is absent, damaged or of something else, or a file could not be written.
    """
    runs = gather(folders)
    if out is None:
        out = Path(folders[0]).expanduser() / FILE if len(folders) == 1 else Path(FILE)
    page = build_page(runs, Gallery(pictures))
    write_page(out, page.render())
    return Written(out, runs, page)


def build_page(runs: Sequence[Run], gallery: Gallery) -> Page:
    """The page about runs.

    Args:
        runs: As of :func:`.gather.gather`; at least one.
        gallery: Makes the pictures.
    """
    scores = collect(runs)
    plans = [name for some in kept_by(runs).values() for name in some]
    marks = Marks([*(row.searcher for row in scores.rows), *plans])
    networks = list(dict.fromkeys(name for run in runs for name in run.network_names))
    started = sorted(str(run.environment.get("started", ""))[:10] for run in runs if run.environment.get("started"))
    when = f", {started[0]}{f' to {started[-1]}' if started[-1] != started[0] else ''}" if started else ""
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    return Page(
        title=f"Pruning {joined(networks)}" if networks else "Pruning",
        subtitle=f"What {what} came to{when}: {joined([run.label for run in runs], 6)}.",
        headlines=headlines(runs, scores),
        sentences=verdicts(runs, scores),
        sections=[
            asked(runs),
            reached(runs),
            front(runs, scores, marks, gallery),
            learning(runs, marks, gallery),
            channels(runs, marks, gallery),
            graph(runs, gallery),
            time(runs, gallery),
        ],
        footer=f"Made by prunegym {metadata.version('prunegym')} from run folders alone; it loads nothing.",
    )


def write_page(path: Path, html: str, *, argument: str = "--out") -> None:
    """Write a page, replacing what is there in one step; its folder is made.

    Args:
        path: The file.
        html: The page.
        argument: What chose the place, for the error message.

    Raises:
        PruningError: It could not be written.
    """
    path = path.expanduser()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_failure(path, error, argument) from error
    with replacing(path, argument=argument) as temporary:
        temporary.write_text(html, encoding="utf-8")
