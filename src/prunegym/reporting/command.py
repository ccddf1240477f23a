"""The command ``prunegym report``. It returns its result and prints nothing."""

from __future__ import annotations

from prunegym.agents.run_folders.running import Reporter, Result
from prunegym.pruning.files import plain
from prunegym.reporting.config import ReportConfig
from prunegym.reporting.report import report


def run_report(config: ReportConfig, reporter: Reporter) -> Result:
    """Write the page; the sentences of its verdict are the result."""
    written = report(config.runs, config.out, pictures=config.pictures)
    sentences = written.page.sentences
    content = {
        "page": str(written.path),
        "pictures": None if config.pictures is None else str(config.pictures),
        "runs": [str(run.folder) for run in written.runs],
        "verdict": plain(sentences),
    }
    lines = [f"{one.about}: {one.text}" for one in sentences]
    return Result(content, "\n".join([*lines, f"page: {written.path}"]))
