"""The configuration of ``prunegym report``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prunegym.agents.configuration.option_rules import Options, require


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Options):
    """Write one self-contained HTML page about runs: what was asked and reached, and what can honestly be said of it.

    It is made from the run folders alone, opens without a network connection, and shows accuracy against cost with all
    rivals, learning curves, kept channels, the channel graph with the policy's attention, and where the time goes.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Run folders, of any command, finished or not; a demonstration counts as all of its steps."""
    out: Path | None = None
    """The page. By default report.html in the folder of the only run, or in the working directory for several."""
    pictures: Path | None = None
    """Folder that gets every picture as PNG and SVG too."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        page = self.out is None or not self.out.expanduser().is_dir()
        require(page, "out", "a file", f"the folder '{self.out}'", "Name the page, such as report.html.")
