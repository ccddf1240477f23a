"""The configuration of ``prunegym evaluations``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from prunegym.agents.configuration.option_rules import Options, require


@dataclass(frozen=True, kw_only=True)
class EvaluationsConfig(Options):
    """List the plans that runs scored, or export them with their scores.

    Every score that prune, train, evaluate, transfer and compare measure is in the file evaluations.sqlite of the run
    folder, or of a folder in it.
    """

    runs: tyro.conf.Positional[Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]]
    """Run folders, of any command, finished or not."""
    csv: Path | None = None
    """File that gets one row for each evaluation: network, digests of weights and data, recovery, settings, version,
    search, split, examples, plan (JSON), score, loss and seconds."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        allowed = self.csv is None or not self.csv.expanduser().is_dir()
        require(allowed, "csv", "a file", f"the folder '{self.csv}'", "Name the file, such as evaluations.csv.")
