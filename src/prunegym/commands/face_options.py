"""Further options of the functions in the Python face: each takes effect, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeAlias

from prunegym.agents.configuration.option_rules import Options
from prunegym.agents.configuration.options import DataOptions
from prunegym.experiments.setup import build_task
from prunegym.pruning.datasets.data import DataSplits
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.task import ClassificationTask, Task

TaskLike: TypeAlias = Task | DataSplits | str | Path
"""What a function takes as its task: the thing itself, or data for image classification."""

#: Options of the commands that functions have other means for.
_INSTEAD = {
    "network": "Give the network itself, and what it is called as `name`.",
    "weights": "Load them into the model before.",
    "data": "Give the data as `task`.",
    "bound": "Give `bounds`, which maps patterns to shares of the channels.",
    "out": "Write what is returned with prunegym.save.",
    "json": "Call to_json() of what is returned.",
    "onnx": "Write what is returned with prunegym.export.",
    "program": "Write what is returned with prunegym.export.",
    "time_limit": "Use the command, which can be continued.",
}
#: Options of how data are read, with what :func:`prunegym.load_data` calls them.
_READING = {
    "data_root": "data_root",
    "image_size": "image_size",
    "split_seed": "seed",
    "reward_split": "sizes",
    "data_workers": "num_workers",
    "download": "download",
}
#: Options that hold paths, and those that hold several texts.
_PATHS, _TEXTS = ("plan", "data_root"), ("leave_out",)


def checked_options(
    function: Callable[..., object],
    kind: type[Options],
    options: Mapping[str, Any],
    task: TaskLike,
    idle: Mapping[str, str] | None = None,
    *,
    table: bool = False,
) -> dict[str, Any]:
    """Further options of a function, as its configuration takes them.

    Args:
        function: Which takes them as ``**options``.
        kind: The configuration, whose fields they are.
        options: As they were given.
        task: As it was given: where it is no text, nothing is read.
        idle: Options that would change nothing in this call, with what they are used with.
        table: Whether a latency table is read, which is below ``data_root`` too.

    Raises:
        PruningError: One is unknown, is an option of the command line only, or would change nothing.
    """
    known = {one.name for one in fields(kind)} - _INSTEAD.keys()
    idle = {**_idle_reading(task), **(idle or {})}
    if table:
        idle.pop("data_root", None)
    for name, value in options.items():
        if name in _INSTEAD:
            raise PruningError(
                f"`{name}` should be left out: only the command line has it. Received {value!r}. {_INSTEAD[name]}"
            )
        if name not in known:
            named = {one for one in inspect.signature(function).parameters if one != "options"}
            raise unknown_name("options", name, known | named)
        if name in idle:
            raise PruningError(
                f"`{name}` should be given with {idle[name]}. Received {value!r}, which would change nothing. Leave "
                "it out, or change the other."
            )
    return {name: _converted(name, value) for name, value in options.items()}


def texts_of(value: Any) -> tuple[str, ...]:
    """Several texts, or one that stands alone."""
    return tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (value,)


def data_name(task: TaskLike) -> dict[str, Any]:
    """The option ``data`` where a task is the name of data, their file or folder."""
    return {"data": str(task)} if isinstance(task, str | Path) else {}


def as_task(task: TaskLike, options: DataOptions) -> Task:
    """A task as it is, or image classification on data, which are read as the options say.

    Raises:
        PruningError: It is no task, or the data cannot be read.
    """
    if isinstance(task, str | Path):
        return build_task(options)
    if isinstance(task, DataSplits):
        return ClassificationTask(task)
    missing = [name for name in ("name", "fingerprint", "batches", "loss", "score") if not hasattr(task, name)]
    if missing:
        raise PruningError(
            f"`task` should be an object with the methods of prunegym.Task, or data. Received a {type(task).__name__} "
            f"without {', '.join(missing)}. Add them, or give what prunegym.load_data returns, or a name, file or "
            "folder of images."
        )
    return task


def _idle_reading(task: TaskLike) -> dict[str, str]:
    """Options of how data are read, where none are."""
    if isinstance(task, str | Path):
        return {}
    if isinstance(task, DataSplits | ClassificationTask):
        what = "data by name, file or folder, or else to prunegym.load_data as `{}`"
    else:
        what = "data by name, file or folder: a task of one's own has its data"
    return {name: what.format(theirs) for name, theirs in _READING.items()}


def _converted(name: str, value: Any) -> Any:
    """An option in the type that its configuration has."""
    if name in _PATHS and value is not None:
        return Path(value)
    return texts_of(value) if name in _TEXTS else value
