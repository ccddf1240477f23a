"""Compare searchers: networks x budgets x searchers x seeds, one row per finished piece.

Groups, criterion, recovery, projection, splits and fine-tuning are those of the problem, the same for every searcher.
A row is on the disk before the next piece begins, so a comparison that is killed at any moment goes on where it was;
rows that were measured under other conditions are refused, not mixed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from tqdm import tqdm

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.finished_rows import FinishedRows
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.searchers import check_evaluations
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.cluster import computed_on_cluster
from prunegym.experiments.comparison.conditions import check_folder, identity, note_conditions
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.measure import STAGES
from prunegym.experiments.comparison.rows import COLUMNS, KEY, TIMED, Key, Row, computed_here


def compare(
    problems: Sequence[PruningProblem],
    config: CompareConfig,
    run: RunFolder,
    *,
    progress: bool = True,
    limit: TimeLimit = NO_LIMIT,
) -> list[Row]:
    """Compute the rows that the run folder does not hold yet.

    Args:
        problems: Networks with their budgets, named as in ``config.labels``; those with all their rows may be absent.
        config: Searchers, seeds, allowance, and what is measured.
        run: Gets the rows with :data:`COLUMNS`, and the plans.
        progress: Show bars.
        limit: When to stop: after the evaluation, epoch or row under way.

    Returns:
        The rows of the configuration's grid, in its order.

    Raises:
        PruningError: The folder holds rows of other networks, data or settings; or the allowance is too small for a
            searcher, or a searcher fails. What was finished is kept.
        TimeUp: The limit is reached.
    """
    known = {problem.scorer.network.name: (problem, identity(problem, config)) for problem in problems}
    conditions = [one for _, one in known.values()]
    check_folder(run, conditions)
    note_conditions(run, conditions)
    work = [key for key in unfinished(config, run) if key[0] in known]
    for network, _, searcher, *_ in work:  # before anything is computed
        check_evaluations(searcher, known[network][0], config.evaluations)
    kept = _rows_of(run)
    best = _best_of(kept.read())
    with tqdm(total=len(work), desc="compare", unit="row", disable=not progress) as bar:

        def announce(key: Key) -> None:
            bar.set_postfix_str(f"{' '.join(map(str, key[:4]))}{best.get(key[:2], ('', 0))[0]}")

        networks = {name: problem for name, (problem, _) in known.items()}
        for key, measured in _computed(work, networks, config, run, announce, progress=progress, limit=limit):
            row = {**known[key[0]][1], **measured}
            kept.append({name: row[name] for name in COLUMNS})
            best = _best_of([row], best)
            bar.update()
    return finished(config, run)


def _computed(
    work: Sequence[Key],
    problems: Mapping[str, PruningProblem],
    config: CompareConfig,
    run: RunFolder,
    announce: Callable[[Key], None],
    *,
    progress: bool,
    limit: TimeLimit,
) -> Iterator[tuple[Key, Row]]:
    """The rows as they are finished: one after the other in this process, or as a cluster gets them done."""
    if config.ray is not None:
        return computed_on_cluster(work, problems, config, run, announce, limit)
    return computed_here(work, problems, config, run, announce, progress=progress, limit=limit)


def _best_of(
    rows: Sequence[Row], before: Mapping[tuple[str, ...], tuple[str, float]] | None = None
) -> dict[tuple[str, ...], tuple[str, float]]:
    """What a bar shows as the best so far of each network and budget, with its score after recovery."""
    best = dict(before or {})
    for row in rows:
        pair, score = (str(row["network"]), str(row["budget"])), float(row[STAGES[1]])
        if pair not in best or score > best[pair][1]:
            best[pair] = (f", best {row['searcher']} {score:.3f}", score)
    return best


def _rows_of(run: RunFolder) -> FinishedRows:
    return FinishedRows(run, KEY, TIMED)


def _grid(config: CompareConfig) -> Iterator[Key]:
    """Keys of all rows: rows that share a search come one after the other."""
    for network in config.labels:
        for budget in config.budgets:
            for searcher in config.searchers:
                for seed in config.seeds:
                    for finetune_seed in config.finetune_seeds:
                        yield network, str(budget), searcher, seed, finetune_seed


def unfinished(config: CompareConfig, run: RunFolder) -> list[Key]:
    """Keys of the rows that are still to be computed."""
    done = {_key(row) for row in _rows_of(run).read()}
    return [key for key in _grid(config) if key not in done]


def finished(config: CompareConfig, run: RunFolder) -> list[Row]:
    """The rows of the grid that are there, in the order of the grid."""
    rows = {_key(row): row for row in _rows_of(run).read()}
    return [dict(rows[key]) for key in _grid(config) if key in rows]


def _key(row: Mapping[str, Any]) -> Key:
    network, budget, searcher, seed, finetune_seed = (row[name] for name in KEY)
    return str(network), str(budget), str(searcher), int(seed), None if finetune_seed is None else int(finetune_seed)
