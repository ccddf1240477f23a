"""What every command needs to run: a folder, someone to report to, and no result computed twice."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit

# the command line imports this module, and `prunegym --help` should not wait for PyTorch
if TYPE_CHECKING:
    from prunegym.agents.run_folders.runs import RunFolder
    from prunegym.envs.setting import PruningProblem
    from prunegym.pruning.budget import Budget

RESULT = "result.json"
"""What a command came to; a run folder that has it is finished."""
SPLITS = "splits.npz"
"""Which images were in which split."""


@dataclass(frozen=True)
class Result:
    """What a command came to."""

    content: dict[str, Any]
    """In what JSON holds."""
    text: str
    """For a terminal."""


@dataclass
class Reporter:
    """How a running command keeps its user informed."""

    progress: bool = True
    """Show bars."""
    say: Callable[[str], None] = lambda text: None
    """Takes a line for the user to read."""
    folder: Path | None = None
    """Of the run, once it has one: what an interrupted command is continued from."""
    limit: TimeLimit = NO_LIMIT
    """When to stop."""


class RunConfig(Protocol):
    """A configuration of a command that has a run folder."""

    @property
    def out(self) -> Path | None:
        """The folder, if one was asked for."""

    @property
    def seed(self) -> int:
        """Seed of the run."""


@dataclass(frozen=True)
class Launch:
    """A command about to run: what its folder is named after and compared with.

    Args:
        config: The configuration.
        reporter: Is told about the folder.
        network: Name of the network, or names.
        searcher: Who searches, or what is done.
        budget: As the user gave it.
        extendable: Fields of the configuration that the folder may be continued with other values of.
    """

    config: RunConfig
    reporter: Reporter
    network: str | tuple[str, ...]
    searcher: str
    budget: str
    extendable: tuple[str, ...] = ()

    def finished(self) -> dict[str, Any] | None:
        """The result of the same run in the folder asked for, if it is there.

        Raises:
            PruningError: The folder holds another run, or a damaged result.
        """
        out = self.config.out
        if out is None or not (out.expanduser() / RESULT).is_file():
            return None
        run = self.open()
        content: dict[str, Any] = run.read_json(RESULT)
        self.reporter.say(f"{run.folder} is finished already: nothing is computed again")
        return content

    def open(self) -> RunFolder:
        """Make the run folder, or open that of an interrupted run.

        To be called once data and networks are found to be in order: a typing error should leave no folder.

        Raises:
            PruningError: The folder cannot be written, or holds something else.
        """
        from prunegym.agents.run_folders.runs import RunFolder

        run = RunFolder.create(
            self.config.out,
            network=self.network if isinstance(self.network, str) else list(self.network),
            searcher=self.searcher,
            budget=self.budget,
            seed=self.config.seed,
            config=self.config,
            extendable=self.extendable,
        )
        self.reporter.folder = run.folder
        self.reporter.say(f"run folder: {run.folder}{' (continued)' if run.resumed else ''}")
        return run


def joined(budgets: Sequence[Budget]) -> str:
    """Budgets in the name of a run folder."""
    return "+".join(map(str, budgets))


def save_splits(problems: Sequence[PruningProblem], run: RunFolder) -> None:
    """Keep in the run folder which images were in which split; problems of a command share them."""
    from prunegym.pruning.task import ClassificationTask

    task = problems[0].scorer.task
    if isinstance(task, ClassificationTask):
        task.data.save_indices(run.path(SPLITS), argument="--out")
