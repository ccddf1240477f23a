"""Under which conditions a comparison is made: on which networks and data, and how its plans are measured.

They are in each row, and from before the first search in a file of the run folder: what is kept of searches, trainings
and fine-tuning is named after networks and searchers, and would else be taken for that of other weights of that name.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from prunegym.agents.run_folders.finished_rows import ROWS
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.pruning.errors import PruningError
from prunegym.pruning.training import weights_digest

Row: TypeAlias = dict[str, Any]

CONDITIONS = "conditions.json"
"""By network, what its rows are measured on and how: see :func:`identity`."""

SHARED = (
    "data",
    "data_fingerprint",
    "split_seed",
    "recovery",
    "scored",
    "criterion",
    "statistics_examples",
    "recovery_examples",
    "reward_examples",
    "measure",
    "recovery_steps",
    "recovery_rate",
    "recovery_split",
    "precision",
    "allowance",
    "epochs",
)
"""What a row must share with all others to stand beside them."""


def identity(problem: PruningProblem, config: CompareConfig) -> Row:
    """What the rows of a problem were measured on and how."""
    scorer, policy = problem.scorer, config.policy
    settings = scorer.settings
    return {
        "network": scorer.network.name,
        "network_fingerprint": weights_digest(scorer.network.model)[:16],
        "data": scorer.task.name,
        "data_fingerprint": scorer.task.fingerprint[:16],
        "split_seed": config.split_seed,
        "recovery": settings.recovery,
        "scored": settings.scoring,
        "criterion": settings.criterion,
        "statistics_examples": settings.statistics_examples,
        "recovery_examples": settings.recovery_examples,
        "reward_examples": settings.examples,
        "measure": settings.measure,
        "recovery_steps": settings.recovery_steps,
        "recovery_rate": settings.recovery_rate,
        "recovery_split": settings.recovery_split,
        "precision": settings.precision,
        "allowance": config.evaluations,
        "epochs": config.epochs,
        "policy_fingerprint": policy and hashlib.sha256(policy.read_bytes()).hexdigest()[:16],
    }


def check_folder(run: RunFolder, conditions: Sequence[Row]) -> None:
    """Refuse a run folder whose rows, searches, trainings and fine-tuned plans were made under other conditions.

    Raises:
        PruningError: As :func:`check_same`.
    """
    there = [*run.read_rows(ROWS), *_noted(run).values()]
    for one in conditions:
        check_same(there, one)


def note_conditions(run: RunFolder, conditions: Sequence[Row]) -> None:
    """Keep in the run folder what will be computed there under which conditions."""
    before = _noted(run)
    now = {one["network"]: one for one in conditions}
    for network, one in now.items():
        if one["policy_fingerprint"] is None:  # of a comparison that was gone on with without its policy
            one = {**one, "policy_fingerprint": before.get(network, one)["policy_fingerprint"]}
        now[network] = one
    if now:
        run.write_json(CONDITIONS, {**before, **now})


def _noted(run: RunFolder) -> dict[str, Row]:
    found: dict[str, Row] = run.read_json(CONDITIONS) if run.path(CONDITIONS).exists() else {}
    return found


def check_same(rows: Sequence[Mapping[str, Any]], now: Mapping[str, Any]) -> None:
    """Refuse to add rows to others that they cannot be compared with.

    Args:
        rows: Rows that are there, or conditions of what is.
        now: What new rows are measured on, see :func:`identity`.

    Raises:
        PruningError: Data, splits, criterion, recovery, reward or allowance differ; or a network or policy of the
            same name has other weights.
    """
    for row in rows:
        names = list(SHARED)
        if row.get("network") == now["network"]:
            names.append("network_fingerprint")
        # of rows, others than the policy's own do not depend on it
        policies = row.get("searcher", "policy") == "policy" and row.get("policy_fingerprint") is not None
        if policies and now["policy_fingerprint"] is not None:
            names.append("policy_fingerprint")
        differing = [name for name in names if str(row.get(name)) != str(now[name])]
        if differing:
            name = differing[0]
            raise PruningError(
                "`--out` should hold what new rows can be compared with. Received rows or searches of "
                f"{row.get('network')} whose {name.replace('_', ' ')} is {row.get(name)}; now it is {now[name]} "
                f"(differing: {', '.join(one.replace('_', ' ') for one in differing)}). "
                "Choose another folder, or bring back the earlier network, data and settings."
            )
