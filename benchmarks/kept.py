"""What is kept of a comparison's run folder: enough to read its tables, and to go on with it on another machine.

Rows, tables and pictures are copied as they are. The JSON files that a run goes on from (plans, what the searches
cost, curves, scores after fine-tuning) stand in one file, a line each, in the same order whenever it is written. Of a
search whose curve is drawn the trail is left out: it holds whole plans, and nothing reads it again. Trainings, journals
and checkpoints are not kept: an agent whose rows are not all there is trained again.

Paths of the machine are not kept either. Weights and data are known by their fingerprints, which stand in the rows.
"""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prunegym.agents.run_folders.finished_rows import ROWS, TIMES
from prunegym.agents.searching.stored_search import PLAN, SEARCH
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.measure import FINETUNING, SCORES
from prunegym.experiments.comparison.rows import CURVE, KEY
from prunegym.experiments.comparison.search import SEARCHES
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import plain, read_json, replacing, write_json

COPIED = (ROWS, TIMES, "table.md", "curves.csv", "anytime.png", "profiles.png")
CONFIG, ENVIRONMENT = "config.json", "env.json"
FILES = "files.jsonl"
"""The JSON files that a run goes on from: path and content of one in each line."""
#: Of a configuration, what is another path on another machine.
_PATHS = ("data", "data_root", "weights", "out")
_FOLDERS = re.compile(r"(?<![\w.+-])~?/(?:[\w.+-]+/)*")


def keep(run: Path, folder: Path) -> None:
    """Copy what tables come from and what the run can go on from.

    Args:
        run: A run folder of ``prunegym compare``, finished or not; nothing is kept of one without rows.
        folder: Where to; what is there is replaced.
    """
    if not (run / ROWS).is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (run / name).exists():
            shutil.copyfile(run / name, folder / name)
    asked = read_json(run / CONFIG)
    asked["config"] = {name: value for name, value in asked["config"].items() if name not in _PATHS}
    write_json(folder / CONFIG, asked)
    write_json(folder / ENVIRONMENT, _without_folders(read_json(run / ENVIRONMENT)))
    with replacing(folder / FILES) as temporary:
        lines = (json.dumps(line, separators=(",", ":")) for line in _files(run))
        temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def restore(folder: Path, run: Path, config: CompareConfig) -> bool:
    """Make the run folder from what was kept, so that ``prunegym compare`` goes on with it.

    Args:
        folder: What :func:`keep` wrote.
        run: The run folder; one that exists is left alone.
        config: Of this machine: where data and weights are.

    Returns:
        Whether the run folder was made.

    Raises:
        PruningError: Rows are kept that the run would not go on from: they would be lost when it is kept in turn.
    """
    known = _keys(folder / ROWS)
    whole = all((folder / name).is_file() for name in (CONFIG, ENVIRONMENT, FILES))
    if run.exists() or not whole:
        lost = len(known - _keys(run / ROWS))
        if lost:
            remedy = "Move that run away: it is made anew from what is kept" if whole else "Move those rows away"
            raise PruningError(
                f"`--runs` should lead to the run that '{folder}' was kept of. Received '{run}', which lacks {lost} of "
                f"its rows. {remedy}."
            )
        return False
    # under another name until it is whole: a run folder that exists is left alone
    begun = run.with_name(f"{run.name}.partial")
    shutil.rmtree(begun, ignore_errors=True)
    begun.mkdir(parents=True)
    for line in (folder / FILES).read_text(encoding="utf-8").splitlines():
        one = json.loads(line)
        path = (begun / one["file"]).resolve()
        if not path.is_relative_to(begun.resolve()):
            raise PruningError(f"`{FILES}` should name files of a run folder. Received '{one['file']}'. Restore it.")
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, one["content"])
    for name in (*COPIED, ENVIRONMENT):
        if (folder / name).exists():
            shutil.copyfile(folder / name, begun / name)
    asked, here = read_json(folder / CONFIG), plain(config)
    asked["config"] |= {name: here[name] for name in _PATHS}
    write_json(begun / CONFIG, asked)
    begun.rename(run)
    return True


def _files(run: Path) -> Iterator[dict[str, Any]]:
    """Every JSON file that the run goes on from, by path."""
    for search in sorted((run / SEARCHES).glob("*")):
        for name in (PLAN, SEARCH, CURVE):
            path = search / name
            if not path.is_file():
                continue
            content = read_json(path)
            if name == SEARCH and (search / CURVE).is_file():
                content = {**content, "history": [], "improvements": []}
            yield {"file": path.relative_to(run).as_posix(), "content": content}
    for path in sorted((run / FINETUNING).glob(f"*/{SCORES}")):
        yield {"file": path.relative_to(run).as_posix(), "content": read_json(path)}


def _without_folders(value: Any) -> Any:
    """Texts with paths cut down to their last part."""
    if isinstance(value, dict):
        return {name: _without_folders(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_without_folders(one) for one in value]
    return _FOLDERS.sub("", value) if isinstance(value, str) else value


def _keys(path: Path) -> set[tuple[str, ...]]:
    """Which rows a table holds."""
    if not path.is_file():
        return set()
    with path.open(newline="", encoding="utf-8") as file:
        return {tuple(row[name] for name in KEY) for row in csv.DictReader(file)}
