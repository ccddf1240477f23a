"""Run folders: what a run is asked, where it ran and what came out, written by this module only.

A folder holds ``config.json`` (the command and its configuration), ``env.json`` (commit, versions, machine)
and what the command adds: tidy rows in ``metrics.csv``, JSON results, a plan, networks. Files are replaced
whole or extended by whole rows, so a run killed at any moment can be continued from its folder.
"""

import csv
import hashlib
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

from prunegym.agents.run_folders.provenance import describe_environment
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import append, plain, read_json, remove_leftovers, replacing, write_failure, write_json

Scalar: TypeAlias = bool | int | float | str | None

#: Where run folders are made unless ``--out`` says otherwise, relative to the working directory.
DEFAULT_PARENT = Path("runs")
#: Configuration fields that do not change what is computed, so that a run may be resumed with another value.
NOT_COMPARED = frozenset({"out", "json", "progress", "checkpoint_minutes", "ray", "time_limit"})
#: Characters; four such parts and the time stay below the 255 bytes of a file name.
_LONGEST_PART = 56
#: Characters of a name that is told from others by a digest; three such parts stay below 255 bytes too.
_LONGEST_SLUG = 48
#: Numbers exactly as Python writes them: ``12e4`` in a commit hash or a label such as ``007`` stay text.
_INTEGER = re.compile(r"-?(0|[1-9]\d*)")
_FLOAT = re.compile(r"-?(\d+\.\d+(e[+-]\d{2,})?|\d+e[+-]\d{2,}|inf)|nan")


@dataclass(frozen=True)
class RunFolder:
    """One run on disk.

    Args:
        folder: The folder; to read a finished run, ``RunFolder(folder)`` is enough.
        resumed: Whether the folder already held this run when it was opened for writing.
    """

    folder: Path
    resumed: bool = False

    @classmethod
    def create(
        cls,
        out: Path | None,
        *,
        network: str | Sequence[str],
        searcher: str,
        budget: str | float,
        seed: int,
        config: Any,
        command: str | None = None,
        extendable: Collection[str] = (),
    ) -> "RunFolder":
        """Make the folder of a new run, or open the folder of an interrupted one.

        Args:
            out: The folder; None makes
                ``runs/{network}__{searcher}__b{budget}__s{seed}__{YYYYmmdd-HHMMSS}/``.
            network: Name of the network, or names of several.
            searcher: Name of the searcher (``ppo`` for the agent).
            budget: The budget as the user gave it, e.g. ``macs:0.5``.
            seed: Seed of the run.
            config: The whole configuration, a dataclass instance or a mapping.
            command: The sub-command; by default from the class of ``config`` (``TrainConfig`` is ``train``).
            extendable: Fields of the configuration that a run may be continued with other values of;
                ``config.json`` then keeps the latest.

        Returns:
            The folder, with ``config.json`` and ``env.json`` in it.

        Raises:
            PruningError: The folder cannot be written, holds another run, or files that are not a run's.
        """
        names = [network] if isinstance(network, str) else list(network)
        asked = {
            "command": command or _command_of(config),
            "network": names,
            "searcher": searcher,
            "budget": budget,
            "seed": seed,
            "config": plain(config),
        }
        if out is None:
            run = cls(_make_default_folder(_folder_name("+".join(names), searcher, budget, seed)))
        else:
            run = cls(out.expanduser(), resumed=_holds_run(out.expanduser(), asked, extendable))
            if run.resumed:
                remove_leftovers(run.folder)
        if not run.resumed or extendable:
            run.write_json("config.json", asked)
        run._write_environment(asked["config"])
        return run

    def path(self, name: str) -> Path:
        """Path of a file in the folder, which need not exist."""
        return self.folder / name

    def subfolder(self, name: str) -> "RunFolder":
        """A part of this run with files of its own."""
        folder = self.path(name)
        try:
            folder.mkdir(exist_ok=True)
        except OSError as error:
            raise write_failure(folder, error) from error
        return RunFolder(folder, resumed=self.resumed)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as JSON, replacing the file in one step.

        Args:
            name: File name in the folder.
            value: Anything that :func:`prunegym.pruning.files.plain` understands.

        Raises:
            PruningError: The file could not be written; an earlier one is still there.
        """
        write_json(self.path(name), value)

    def read_json(self, name: str) -> Any:
        """Read a JSON file of the folder.

        Raises:
            PruningError: The file is missing or damaged.
        """
        return read_json(self.path(name))

    def append_row(self, name: str, row: Mapping[str, Any]) -> None:
        """Add one row to a CSV file and wait until it is on the disk.

        The first row decides the columns. Later rows may leave some out (empty cells) but not bring new ones.
        A last line that a kill left unfinished is dropped first.

        Args:
            name: File name in the folder, e.g. ``metrics.csv``.
            row: Column name -> number, string, boolean or None; 0-d arrays and tensors count as numbers.
                Line breaks in strings become spaces: one row is one line.

        Raises:
            PruningError: The row has a column that the file has not, or could not be written; earlier rows
                are kept.
        """
        path = self.path(name)
        try:
            columns, size = _header_and_size(path)
            text = _format_row(path, columns, row)
            append(path, size, text.encode())
        except OSError as error:
            raise write_failure(path, error) from error

    def read_rows(self, name: str) -> list[dict[str, Scalar]]:
        """Read the whole rows of a CSV file.

        Args:
            name: File name in the folder.

        Returns:
            One dict per row; cells that read as numbers or booleans are such, empty ones None. No file, no
            rows; an unfinished last line is left out.

        Raises:
            PruningError: The file is not a table.
        """
        path = self.path(name)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return []
        except OSError as error:
            raise PruningError(
                f"`--out` should be a readable run folder. Received '{path}' ({error.strerror}). Check the path."
            ) from error
        return list(_parse_rows(data[: data.rfind(b"\n") + 1], path))

    def truncate_rows(self, name: str, count: int) -> None:
        """Keep the first ``count`` rows of a CSV file: those that a checkpoint vouches for.

        Args:
            name: File name in the folder; no file is fine.
            count: Rows to keep, the header apart.

        Raises:
            PruningError: The file could not be written.
        """
        rows = self.read_rows(name)
        if len(rows) > count:
            columns, _ = _header_and_size(self.path(name))
            self.write_rows(name, rows[:count], columns)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
        """Replace a CSV file in one step.

        Args:
            name: File name in the folder.
            rows: All rows, as :meth:`append_row` takes them.
            columns: Of the file; by default those of the first row.

        Raises:
            PruningError: A row has other columns, or the file could not be written; an earlier one is still there.
        """
        path = self.path(name)
        known = list(columns or (rows[0] if rows else ()))
        text = _format_row(path, [], dict.fromkeys(known)).splitlines(keepends=True)[:1]
        text += [_format_row(path, known, row) for row in rows]
        with replacing(path) as temporary:
            temporary.write_text("".join(text), encoding="utf-8", newline="")

    def _write_environment(self, config: Mapping[str, Any]) -> None:
        """Write ``env.json``; a resumed run adds where it is resumed to where it was started."""
        device = config.get("device")
        here = describe_environment(device if isinstance(device, str) and device != "auto" else None)
        with suppress(PruningError):  # killed before the file was there
            if self.resumed:
                first = self.read_json("env.json")
                here = {**first, "resumed": [*first.get("resumed", []), here]}
        self.write_json("env.json", here)


def _folder_name(network: str, searcher: str, budget: str | float, seed: int) -> str:
    """Name of a run folder; parts are joined by a double underscore, which no part contains."""
    # local time, as people look for their runs; env.json has the offset
    time = datetime.now().strftime("%Y%m%d-%H%M%S")
    return "__".join([_part(network), _part(searcher), f"b{_part(str(budget))}", f"s{seed}", time])


def _part(text: str) -> str:
    """A piece of a folder name: letters, digits, dots, plus, equals, hyphens and single underscores."""
    cleaned = re.sub(r"_{2,}", "_", re.sub(r"[^\w.+=-]+", "-", text, flags=re.ASCII))
    return cleaned.strip("-_.")[:_LONGEST_PART] or "unnamed"


def slug(text: str) -> str:
    """A text as part of a file name; what is lost is made up for by a digest."""
    cleaned = re.sub(r"[^\w.+=-]+", "-", text, flags=re.ASCII)[:_LONGEST_SLUG]
    return cleaned if cleaned == text else f"{cleaned}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _make_default_folder(name: str) -> Path:
    """Make ``runs/name``; two runs started in the same second get different folders."""
    attempt = 1
    while True:
        folder = DEFAULT_PARENT / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError as error:
            if not folder.is_dir():  # `runs` itself, or this name, is a file
                raise write_failure(folder, error) from error
            attempt += 1
        except OSError as error:
            raise write_failure(folder, error) from error
        else:
            return folder


def _command_of(config: Any) -> str:
    """Sub-command of a configuration: ``TrainConfig`` is ``train``; a mapping may name its own."""
    if isinstance(config, Mapping):
        return str(config.get("command", "run"))
    return type(config).__name__.removesuffix("Config").lower()


def _holds_run(folder: Path, asked: Mapping[str, Any], extendable: Collection[str]) -> bool:
    """Whether the folder holds the run that is asked for; a folder that holds anything else is refused."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # hidden files are what an interrupted write or the desktop leaves behind
        strangers = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    except OSError as error:
        raise write_failure(folder, error) from error
    if not strangers:
        return False
    rule = "`--out` should be a new or empty folder, or one that holds the same run."
    if "config.json" not in strangers:
        raise PruningError(
            f"{rule} Received '{folder}', which holds '{strangers[0]}' and no config.json. Choose another folder."
        )
    stored = read_json(folder / "config.json")
    differences = _differences(_compared(stored, extendable), _compared(plain(asked), extendable))
    if differences:
        raise PruningError(
            f"{rule} Received '{folder}', whose config.json differs: {'; '.join(differences)}. "
            "Choose another folder, or repeat the earlier settings."
        )
    return True


def _compared(stored: Any, extendable: Collection[str]) -> Any:
    """What of ``config.json`` decides whether two runs are the same."""
    if not isinstance(stored, dict) or not isinstance(stored.get("config"), dict):
        return stored
    config = {key: v for key, v in stored["config"].items() if key not in {*NOT_COMPARED, *extendable}}
    return {**{key: v for key, v in stored.items() if key not in extendable}, "config": config}


def _differences(before: Any, now: Any, name: str = "") -> list[str]:
    """Fields that differ, with both values, e.g. ``config.seed was 0 and is 1``."""
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            difference
            for key in sorted({*before, *now})
            for difference in _differences(before.get(key), now.get(key), f"{name}.{key}" if name else key)
        ]
    return [] if before == now else [f"{name or 'content'} was {before!r} and is {now!r}"]


def _header_and_size(path: Path) -> tuple[list[str], int]:
    """Columns of a CSV file and its size in bytes, counted to the end of the last whole line."""
    try:
        with path.open("rb") as file:
            header = file.readline()
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 1, 0))
            if file.read(1) != b"\n":  # empty, or torn by a kill: the only case in which all of it is read
                file.seek(0)
                size = file.read().rfind(b"\n") + 1
    except FileNotFoundError:
        return [], 0
    return (next(csv.reader([header.decode()]), []), size) if size else ([], 0)


def _format_row(path: Path, columns: list[str], row: Mapping[str, Any]) -> str:
    """The row as a line, below a header if the file has none yet."""
    new = [name for name in row if columns and name not in columns]
    if new:
        raise PruningError(
            f"`row` should have only the columns of '{path}': {', '.join(columns)}. "
            f"Received also {', '.join(new)}. Give every column in the first row."
        )
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    if not columns:
        writer.writerow(row)
    writer.writerow([_to_cell(row.get(name)) for name in columns or row])
    return text.getvalue()


def _to_cell(value: Any) -> str:
    """Text of a cell, such that :func:`_from_cell` gives the value back."""
    value = value.item() if hasattr(value, "item") else value
    if value is None:
        return ""
    # repr: the shortest text that reads back as exactly the same float
    return repr(value) if isinstance(value, float) else " ".join(str(value).splitlines())


def _from_cell(text: str) -> Scalar:
    """Value of a cell."""
    if text in ("", "True", "False"):
        return {"": None, "True": True, "False": False}[text]
    if _INTEGER.fullmatch(text):
        return int(text)
    return float(text) if _FLOAT.fullmatch(text) else text


def _parse_rows(data: bytes, path: Path) -> Iterator[dict[str, Scalar]]:
    """Rows of a CSV text whose first line is the header."""
    damaged = (
        f"`--out` should be a run folder whose tables are whole. Received '{path}', {{}}. "
        "Delete the damaged lines, or the file."
    )
    try:
        lines = list(csv.reader(io.StringIO(data.decode(), newline=""), strict=True))
    except (UnicodeDecodeError, csv.Error) as error:
        raise PruningError(damaged.format(f"which is not a CSV table ({error})")) from error
    for number, line in enumerate(lines[1:], start=2):
        if len(line) != len(lines[0]):
            raise PruningError(damaged.format(f"line {number} with {len(line)} of {len(lines[0])} cells"))
        yield dict(zip(lines[0], map(_from_cell, line), strict=True))
