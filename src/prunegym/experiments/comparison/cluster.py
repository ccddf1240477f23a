"""A comparison on a Ray cluster: rows that share a search are one task; only the driver writes to the run folder.

A task gets what the run folder holds of its search, works in a temporary folder of its node, and sends back rows and
files, also when the time limit stopped it half-way. Tasks whose node or process died are repeated by Ray.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from prunegym.agents.configuration.time_limit import TimeLimit, TimeUp
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import WITHOUT_SEED
from prunegym.agents.searching.stored_search import PLAN
from prunegym.agents.training.workers import check_device
from prunegym.envs.cluster import Packed, cause_of, connected, pack, reason_of, unpack
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.config import AGENTS, CompareConfig
from prunegym.experiments.comparison.measure import FINETUNING
from prunegym.experiments.comparison.measure import folder_name as name_of_finetuning
from prunegym.experiments.comparison.rows import Key, Row, computed_here
from prunegym.experiments.comparison.search import SEARCHES, TRAININGS
from prunegym.experiments.comparison.search import folder_name as name_of_search
from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import replacing
from prunegym.pruning.plan import PruningPlan

RETRIES = 5
"""How often a task is repeated whose process or node died."""
POLICY = "policy_of_the_comparison.safetensors"
"""The policy file of `--policy`, in the temporary folder of a task."""


@dataclass(frozen=True)
class Outcome:
    """What comes back from a task."""

    rows: list[Row]
    """Of the first keys of the piece."""
    files: dict[str, bytes]
    """By path in the run folder."""
    removed: list[str]
    """Files that the task was given and has no more use for, such as checkpoints."""
    finished: bool
    """Whether the rows are all of the piece; else the time limit was reached."""


def computed_on_cluster(
    work: Sequence[Key],
    problems: Mapping[str, PruningProblem],
    config: CompareConfig,
    run: RunFolder,
    announce: Callable[[Key], None],
    limit: TimeLimit,
) -> Iterator[tuple[Key, Row]]:
    """Compute rows on the cluster of the configuration.

    Args:
        work: Keys of the rows.
        problems: By network.
        config: Of the comparison.
        run: Gets the files of each piece as it is finished.
        announce: Told of the last row.
        limit: When tasks stop.

    Yields:
        Keys with their rows, as they are finished: rows of one search in their order, searches in any.

    Raises:
        PruningError: There is no such cluster, or a searcher fails, or a task died too often.
        TimeUp: The limit is reached; what the tasks had is in the run folder.
    """
    check_device(config.torch_device)
    assert config.ray is not None
    whole = True
    with connected(config.ray) as ray:
        waiting = _submit(ray, pieces(work), problems, config, run, limit)
        while waiting:
            done, _ = ray.wait(list(waiting), num_returns=1)
            keys = waiting.pop(done[0])
            outcome = _outcome(ray, done[0])
            take(outcome, run)
            for key, row in zip(keys, outcome.rows, strict=False):
                yield key, row
                announce(key)
            whole = whole and outcome.finished
    if not whole:
        raise TimeUp


def pieces(work: Sequence[Key]) -> list[tuple[Key, ...]]:
    """Keys whose rows share a search or a training, together."""
    found: dict[tuple[object, ...], list[Key]] = {}
    for key in work:
        network, budget, searcher, seed, _ = key
        shared = AGENTS.get(searcher, searcher)
        kind = "training" if searcher in AGENTS else "search"
        found.setdefault((network, budget, kind, shared, None if searcher in WITHOUT_SEED else seed), []).append(key)
    return [tuple(keys) for keys in found.values()]


def compute(
    packed: Packed, config: CompareConfig, keys: Sequence[Key], files: Mapping[str, bytes], end: float
) -> Outcome:
    """Compute the rows of a piece: what runs on a node.

    Args:
        packed: The problem.
        config: Of the comparison.
        keys: Of the rows.
        files: What the run folder holds of the piece.
        end: When to stop, in seconds since 1970: clocks of nodes agree on nothing else.
    """
    limit = TimeLimit(end - time.time())
    if limit.reached:
        return Outcome([], {}, [], finished=False)
    torch.set_num_threads(_processors(config, keys))
    problem: PruningProblem = unpack(packed)
    with TemporaryDirectory() as folder:
        run = RunFolder(Path(folder))
        save_files(files, run)
        if config.policy is not None:
            config = replace(config, policy=run.path(POLICY))
        rows: list[Row] = []
        with suppress(TimeUp):
            for _, row in computed_here(keys, {keys[0][0]: problem}, config, run, lambda key: None, limit=limit):
                rows.append(row)
        produced = read_files(run, [path for path in run.folder.iterdir() if path.is_dir()])
        removed = [name for name in files if not run.path(name).exists()]
    return Outcome(rows, produced, removed, finished=len(rows) == len(keys))


def take(outcome: Outcome, run: RunFolder) -> None:
    """Bring the run folder to where a task left its own.

    Raises:
        PruningError: A file could not be written.
    """
    save_files(outcome.files, run)
    for name in outcome.removed:
        run.path(name).unlink(missing_ok=True)


def save_files(files: Mapping[str, bytes], run: RunFolder) -> None:
    """Write files into a run folder; in the order of their names, so that what says that others are there comes last.

    Raises:
        PruningError: One could not be written.
    """
    for name, content in sorted(files.items()):
        with replacing(run.path(name)) as temporary:
            temporary.write_bytes(content)


def read_files(run: RunFolder, folders: Sequence[Path]) -> dict[str, bytes]:
    """All files below some folders of a run folder, without what is hidden."""
    found = (path for folder in folders for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(run.folder).as_posix(): path.read_bytes() for path in found if not path.name.startswith(".")
    }


def _submit(
    ray: Any,
    work: Sequence[tuple[Key, ...]],
    problems: Mapping[str, PruningProblem],
    config: CompareConfig,
    run: RunFolder,
    limit: TimeLimit,
) -> dict[Any, tuple[Key, ...]]:
    """Hand in a task for each piece."""
    sent = {name: ray.put(pack(problem)) for name, problem in problems.items()}
    shared = {} if config.policy is None else {POLICY: config.policy.read_bytes()}
    end = time.time() + limit.left
    tasks = {}
    for keys in work:
        processors = _processors(config, keys)
        _check_size(ray, processors)
        files = {**shared, **read_files(run, _folders(keys, config, run))}
        task = ray.remote(compute).options(num_cpus=processors, max_retries=RETRIES, scheduling_strategy="SPREAD")
        tasks[task.remote(sent[keys[0][0]], config, keys, files, end)] = keys
    return tasks


def _processors(config: CompareConfig, keys: Sequence[Key]) -> int:
    """Processors of a task, and threads that torch may use there: one, or the workers of an agent."""
    return config.workers if keys[0][2] in AGENTS else 1


def _check_size(ray: Any, processors: int) -> None:
    """Refuse tasks that no node could take.

    Raises:
        PruningError: The largest node has fewer processors.
    """
    largest = max((int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"]), default=0)
    if processors > largest:
        raise PruningError(
            f"`--workers` should be at most {largest} in a comparison on this cluster, the processors of its largest "
            f"node: the workers of an agent share one. Received {processors}. Lower it."
        )


def _folders(keys: Sequence[Key], config: CompareConfig, run: RunFolder) -> list[Path]:
    """Where the run folder keeps what belongs to a piece, as far as it has been computed."""
    found = []
    for network, budget, searcher, seed, finetune_seed in keys:
        seeds = {seed, config.seeds[0]} if searcher in WITHOUT_SEED else {seed}
        found += [run.path(SEARCHES) / name_of_search(searcher, network, budget, one) for one in seeds]
        if searcher in AGENTS:
            found.append(run.path(TRAININGS) / name_of_search(AGENTS[searcher], network, budget, seed))
        plans = [folder / PLAN for folder in found if (folder / PLAN).exists()] if finetune_seed is not None else []
        for path in plans:
            name = name_of_finetuning(network, PruningPlan.load(path), finetune_seed or 0)
            found.append(run.path(FINETUNING) / name)
    return list(dict.fromkeys(found))


def _outcome(ray: Any, reference: Any) -> Outcome:
    """What a task returned.

    Raises:
        PruningError: A searcher failed, or the task died too often.
    """
    try:
        outcome: Outcome = ray.get(reference)
    except ray.exceptions.RayTaskError as fault:
        raise cause_of(fault) from None
    except ray.exceptions.RayError as fault:
        raise PruningError(
            f"`--ray` should have nodes that live. Received a task that died {RETRIES + 1} times "
            f"({reason_of(fault)}). Look at the memory of the nodes and at the logs of Ray, and repeat the command: "
            "what was finished is kept."
        ) from fault
    return outcome
