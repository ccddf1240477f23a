"""Read run folders into plain data; a file that a run does not have, or not yet, is left empty.

Nothing here runs a network, and nothing is unpickled: a folder may come from someone else.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from prunegym.agents.configuration.options import DEFAULT_BUDGET
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.records import ATTENTION, NETWORKS, PLANS
from prunegym.agents.run_folders.running import RESULT, SPLITS
from prunegym.agents.run_folders.runs import RunFolder, slug
from prunegym.agents.training.loop import METRICS
from prunegym.experiments import evaluate
from prunegym.experiments.comparison.report import CURVES
from prunegym.experiments.comparison.rows import KEY, TIMED
from prunegym.experiments.comparison.search import TRAININGS
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import read_json

Record: TypeAlias = Mapping[str, Any]

#: Commands that keep a row for each plan, with what identifies a row and what of it is measured in time. A comparison
#: has all of them there and nowhere else; the results of the others hold them too, once there is one.
_TABLES = {
    "compare": (KEY, TIMED),
    **dict.fromkeys(("train", "evaluate", "transfer"), (evaluate.KEY, evaluate.TIMED)),
}

#: What `train` calls its plans -> what tables call them.
_NAMES = {"own": "policy", "best": "best sampled"}


@dataclass(frozen=True, kw_only=True)
class Training:
    """The learning curve of one agent."""

    network: str
    budget: str
    seed: int
    metrics: Sequence[Record]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run folder."""

    folder: Path
    name: str
    """What it is called on the page; unique on it."""
    command: str
    asked: Record
    """``config.json``: network, searcher, budget, seed, and ``config`` with every option."""
    environment: Record = field(default_factory=dict)
    result: Record | None = None
    """None where the command has not finished."""
    networks: Sequence[Record] = ()
    attention: Sequence[Record] = ()
    plans: Mapping[str, Mapping[str, Record]] = field(default_factory=dict)
    """Searcher -> ``network budget`` -> plan."""
    rows: Sequence[Record] = ()
    """Of ``compare``; of ``train``, ``evaluate`` and ``transfer`` those of the result, or so far finished."""
    curves: Sequence[Record] = ()
    """Of ``compare``: what each search would have returned earlier."""
    trainings: Sequence[Training] = ()
    examples: Mapping[str, int] = field(default_factory=dict)
    """Images in each split."""

    @property
    def config(self) -> Record:
        """Every option of the command."""
        content = self.asked.get("config")
        return content if isinstance(content, Mapping) else {}

    @property
    def label(self) -> str:
        """The run's name, with its command where that is not part of it."""
        return self.name if self.command in self.name else f"{self.command} {self.name}"

    @property
    def is_finished(self) -> bool:
        """Whether it came to its end: every command writes its result last."""
        return self.result is not None

    def came_to(self, command: str) -> Record:
        """The result, if the run is one of that command; empty if it is of another, or not finished."""
        return self.result or {} if self.command == command else {}

    @property
    def network_names(self) -> list[str]:
        """Networks that were asked for; of a saved network, which is asked for by its folder, its name."""
        saved = self.came_to("finetune") or self.came_to("export")
        return texts(saved["network"] if saved else self.asked.get("network"))

    @property
    def is_quick(self) -> bool:
        """Whether it is part of a quick demonstration, whose figures mean nothing."""
        return bool(self.config.get("quick"))


def texts(value: Any) -> list[str]:
    """What an option that may be given several times holds; nothing where it is empty."""
    if value is None or value == "":
        return []
    return [str(one) for one in value] if isinstance(value, list | tuple) else [str(value)]


def gather(folders: Sequence[Path]) -> list[Run]:
    """Read run folders.

    Args:
        folders: Of any command; a demonstration counts as all of its steps.

    Returns:
        One entry per folder, in that order, each folder once.

    Raises:
        PruningError: A folder is absent, no run's, or holds a damaged file.
    """
    if not folders:
        raise PruningError("`RUN` should be at least one run folder. Received none. Give for example runs/demo.")
    paths: dict[Path, Path] = {}
    for folder in folders:
        given = Path(folder).expanduser()
        for path in [given, *_parts(given)]:
            paths.setdefault(path.resolve(), path)
    return [_read(path, name) for path, name in zip(paths.values(), _names(list(paths)), strict=True)]


def _parts(folder: Path) -> list[Path]:
    """Folders of the steps of a demonstration."""
    asked = _asked(folder)
    if asked.get("command") != "demo":
        return []
    steps = [path for path in folder.iterdir() if (path / "config.json").is_file()]
    return sorted(steps, key=lambda path: (path / "config.json").stat().st_mtime)


def _asked(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        reason = "there is no config.json in it" if folder.is_dir() else "there is no such folder"
        raise PruningError(
            f"`RUN` should be a run folder. Received '{folder}' ({reason}). Give the folder that a command such as "
            "`prunegym prune` printed as its run folder."
        )
    content = read_json(folder / "config.json", argument="RUN")
    if not isinstance(content, dict) or not isinstance(content.get("command"), str):
        raise PruningError(
            f"`RUN` should be a run folder. Received '{folder}', whose config.json does not say of which command. "
            "Choose another folder."
        )
    return content


def _names(folders: Sequence[Path]) -> list[str]:
    """The last parts of paths, as many of each as tell them apart."""
    names = []
    for folder in folders:
        depth = 1
        while sum(other.parts[-depth:] == folder.parts[-depth:] for other in folders) > 1:
            depth += 1
        names.append("/".join(folder.parts[-depth:]))
    return names


def _read(folder: Path, name: str) -> Run:
    asked, run = _asked(folder), RunFolder(folder)
    command = str(asked["command"])
    result = _optional(folder / RESULT, None)
    rows = _rows(run, command, result)
    return Run(
        folder=folder,
        name=name,
        command=command,
        asked=asked,
        environment=_optional(folder / "env.json", {}),
        result=result,
        networks=_networks(folder, command),
        attention=_attention(folder),
        plans=_plans(folder, rows if command == "compare" else ()),
        rows=rows,
        curves=run.read_rows(CURVES),
        trainings=tuple(_trainings(folder, asked)),
        examples=_examples(folder / SPLITS),
    )


def _rows(run: RunFolder, command: str, result: Record | None) -> list[Record]:
    """Rows about plans, as far as there are any."""
    if command not in _TABLES:
        return []
    if command != "compare" and result is not None:
        return list(result.get("rows", ()))
    return list(FinishedRows(run, *_TABLES[command]).read())


def _plans(folder: Path, rows: Sequence[Record]) -> dict[str, dict[str, Record]]:
    """Plans by searcher and ``network budget``; of a comparison those of the first seed."""
    found: dict[str, dict[str, Record]] = {}
    for row in rows:
        if not row.get("plan"):
            continue
        kept = found.setdefault(str(row["searcher"]), {})
        key, path = f"{row['network']} {row['budget']}", (folder / str(row["plan"])).resolve()
        # a table of strangers should not lead out of its folder
        if key not in kept and path.is_relative_to(folder.resolve()) and path.is_file():
            kept[key] = read_json(path, argument="RUN")
    content = _optional(folder / PLANS, {})
    if "format" not in content:  # `prune` has one plan in that file, without a name
        for name, plans in content.items():
            found.setdefault(_NAMES.get(name, name), {}).update(plans)
    return found


def _optional(path: Path, otherwise: Any) -> Any:
    """Content of a JSON file; a file that is absent is no error, one that is damaged is."""
    return read_json(path, argument="RUN") if path.is_file() else otherwise


def _networks(folder: Path, command: str) -> list[Record]:
    """Channel graphs; the result of ``inspect`` is one."""
    if command == "inspect" and (folder / RESULT).is_file():
        return [read_json(folder / RESULT, argument="RUN")]
    return list(_optional(folder / NETWORKS, []))


def _attention(folder: Path) -> list[Record]:
    """What policies looked at: the run's own, or in a comparison those of the first seed of each agent."""
    records: list[Record] = list(_optional(folder / ATTENTION, []))
    for path in sorted((folder / TRAININGS).glob("data__*")) if (folder / TRAININGS).is_dir() else []:
        known = {(one["network"], one["budget"]) for one in records}
        for one in _optional(path / ATTENTION, []):
            if (one["network"], one["budget"]) not in known:
                records.append(one)
    return records


def _trainings(folder: Path, asked: Record) -> Iterator[Training]:
    """Learning curves: of ``train`` its own, of ``transfer`` and ``compare`` those in sub-folders."""
    config = asked.get("config", {})
    networks, budgets = texts(config.get("network")), texts(config.get("budget")) or [DEFAULT_BUDGET]
    seed = int(asked.get("seed", 0))
    if asked["command"] == "train":
        yield from _training(folder, ", ".join(networks), ", ".join(budgets), seed)
    for network in networks:
        for budget in budgets:
            cost = budget.replace(":", "")
            if asked["command"] == "transfer":
                name = f"{network}__{cost}".replace("/", "-")
                yield from _training(folder / name, network, budget, seed)
            elif asked["command"] == "compare":
                for offset in range(int(config.get("repeats", 1))):
                    name = f"data__{slug(network)}__{slug(cost)}__s{seed + offset}"
                    yield from _training(folder / TRAININGS / name, network, budget, seed + offset)


def _training(folder: Path, network: str, budget: str, seed: int) -> Iterator[Training]:
    metrics = RunFolder(folder).read_rows(METRICS)
    if metrics:
        yield Training(network=network, budget=budget, seed=seed, metrics=metrics)


def _examples(path: Path) -> dict[str, int]:
    """Number of images in each split."""
    if not path.is_file():
        return {}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: int(file[name].shape[0]) for name in file.files if file[name].ndim}
    except (OSError, ValueError) as fault:
        raise PruningError(
            f"`RUN` should hold whole files. Received '{path}' ({fault}). Leave that run out, or make it again."
        ) from fault
