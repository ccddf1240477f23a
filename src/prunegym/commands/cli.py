"""The ``prunegym`` command, the only module that prints: results on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import shlex
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Annotated, TextIO, TypeAlias

import tyro

from prunegym.agents.configuration.config import (
    DemoConfig,
    EvaluateConfig,
    InspectConfig,
    PretrainConfig,
    PruneConfig,
    TrainConfig,
    TransferConfig,
)
from prunegym.agents.configuration.time_limit import TIME_UP, TimeLimit, TimeLimitOption, TimeUp
from prunegym.agents.evaluations.config import EvaluationsConfig
from prunegym.agents.run_folders.running import Reporter, Result
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.deployment.config import ExportConfig, FinetuneConfig, MeasureConfig
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import DISK_FULL, plain, write_failure
from prunegym.reporting.config import ReportConfig

Config: TypeAlias = (
    Annotated[InspectConfig, tyro.conf.subcommand("inspect")]
    | Annotated[PretrainConfig, tyro.conf.subcommand("pretrain")]
    | Annotated[TrainConfig, tyro.conf.subcommand("train")]
    | Annotated[EvaluateConfig, tyro.conf.subcommand("evaluate")]
    | Annotated[CompareConfig, tyro.conf.subcommand("compare")]
    | Annotated[TransferConfig, tyro.conf.subcommand("transfer")]
    | Annotated[PruneConfig, tyro.conf.subcommand("prune")]
    | Annotated[FinetuneConfig, tyro.conf.subcommand("finetune")]
    | Annotated[MeasureConfig, tyro.conf.subcommand("measure")]
    | Annotated[ExportConfig, tyro.conf.subcommand("export")]
    | Annotated[EvaluationsConfig, tyro.conf.subcommand("evaluations")]
    | Annotated[ReportConfig, tyro.conf.subcommand("report")]
    | Annotated[DemoConfig, tyro.conf.subcommand("demo")]
)

_COMMANDS: dict[type, str] = {
    InspectConfig: "commands.network_commands:run_inspect",
    PretrainConfig: "commands.network_commands:run_pretrain",
    TrainConfig: "commands.agent_commands:run_train",
    EvaluateConfig: "commands.agent_commands:run_evaluate",
    CompareConfig: "experiments.comparison.command:run_compare",
    TransferConfig: "commands.agent_commands:run_transfer",
    PruneConfig: "commands.network_commands:run_prune",
    FinetuneConfig: "experiments.deployment.commands:run_finetune",
    MeasureConfig: "experiments.deployment.measure:run_measure",
    ExportConfig: "experiments.deployment.commands:run_export",
    EvaluationsConfig: "agents.evaluations.command:run_evaluations",
    ReportConfig: "reporting.command:run_report",
    DemoConfig: "commands.demo:run_demo",
}
"""Modules below ``prunegym`` and functions that do what a configuration asks for."""

_DESCRIPTION = (
    "Prune channels of PyTorch networks with a learned agent. Each command has its own --help. Runs are kept "
    "in folders below runs/; an interrupted command goes on where it stopped if it is given its folder with "
    "--out."
)
#: Exit codes: what was asked cannot be done; interrupted by Ctrl-C.
REFUSED, INTERRUPTED = 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; by default those of the process.

    Returns:
        Exit code: 0, 2 for what cannot be done as asked or written to a full disk, 124 when the time limit was reached,
        130 after an interruption. After the last three, the same command with its run folder goes on.
    """
    started = time.monotonic()
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if arguments in (["--version"], ["-V"]):
        print(f"prunegym {metadata.version('prunegym')}")
        return 0
    reporter = Reporter()
    try:
        config = parse(arguments)
        reporter.say = lambda text: print(text, file=sys.stderr)
        if isinstance(config, TimeLimitOption):
            reporter.limit = TimeLimit(config.limit_seconds, started)
        with _quiet_libraries():
            result = run(config, reporter)
    except PruningError as fault:
        return _stopped(f"error: {' '.join(str(fault).split())}{_where(arguments, reporter)}", REFUSED)
    except OSError as fault:  # where files are not ours to write: TensorBoard, temporary files
        if fault.errno not in DISK_FULL:
            raise
        error = write_failure(reporter.folder or Path(fault.filename or "."), fault)
        return _stopped(f"error: {error}{_where(arguments, reporter)}", REFUSED)
    except TimeUp as stop:
        traceback.clear_frames(stop.__traceback__)  # ends bars that were open, so that the last line is the command
        return _stopped(f"the time limit is reached. {_how_to_continue(arguments, reporter)}", TIME_UP)
    except KeyboardInterrupt as stop:
        traceback.clear_frames(stop.__traceback__)
        return _stopped(f"interrupted. {_how_to_continue(arguments, reporter)}", INTERRUPTED)
    _print(result, as_json=config.json)
    return 0


def _stopped(message: str, code: int) -> int:
    """Say why a command ends early; bars may have left the line unfinished."""
    print(f"{'' if code == REFUSED else chr(10)}prunegym: {message}", file=sys.stderr)
    return code


def parse(arguments: Sequence[str]) -> Config:
    """Read the command line.

    Raises:
        PruningError: A value breaks its rule.
        SystemExit: After ``--help``, or for unknown flags, which have been explained on standard error.
    """
    messages = io.StringIO()
    try:
        # held back: tyro would wrap our messages into a box, over several lines
        with contextlib.redirect_stderr(messages):
            config: Config = tyro.cli(
                Config,
                prog="prunegym",
                description=_DESCRIPTION,
                args=arguments,
                config=(tyro.conf.FlagCreatePairsOff,),
            )
    except SystemExit as end:
        cause: BaseException | None = end
        while cause is not None and not isinstance(cause, PruningError):
            cause = cause.__cause__ or cause.__context__
        if cause is not None:
            raise cause from None
        sys.stderr.write(messages.getvalue())
        raise
    return config


def run(config: Config, reporter: Reporter) -> Result:
    """Run the command that a configuration belongs to."""
    module, name = _COMMANDS[type(config)].split(":")
    # imported here: `prunegym --help` should not wait for PyTorch
    result: Result = getattr(importlib.import_module(f"prunegym.{module}"), name)(config, reporter)
    return result


def _print(result: Result, *, as_json: bool) -> None:
    """Print a result for a program or for a person."""
    print(json.dumps(plain(result.content), ensure_ascii=False) if as_json else result.text)


def _how_to_continue(arguments: Sequence[str], reporter: Reporter) -> str:
    """The command that goes on from where this one was stopped."""
    if reporter.folder is None:
        return "Nothing had been computed yet."
    folder = [] if _names_folder(arguments) else ["--out", str(reporter.folder)]
    return f"Continue with: {shlex.join(['prunegym', *arguments, *folder])}"


def _where(arguments: Sequence[str], reporter: Reporter) -> str:
    """Where a failed command left what it had, unless its user chose the place."""
    if reporter.folder is None or _names_folder(arguments):
        return ""
    return f" (Its run folder, for --out: {shlex.quote(str(reporter.folder))})"


def _names_folder(arguments: Sequence[str]) -> bool:
    return any(one == "--out" or one.startswith("--out=") for one in arguments)


@contextlib.contextmanager
def _quiet_libraries() -> Iterator[None]:
    """Show our own warnings, in one line each, and not those that libraries address to programmers."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        print(f"prunegym: warning: {message}", file=sys.stderr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", category=UserWarning, module=r"prunegym\.")
        warnings.showwarning = show
        yield
