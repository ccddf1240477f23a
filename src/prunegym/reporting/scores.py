"""The rows of all commands in one form, and what may stand beside what.

Scores are put side by side only within a *field*: the same network and data, the same images, the same stage. A row
that two folders hold (the uniform plan beside every policy) counts once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from statistics import fmean
from typing import Any

from prunegym.experiments.prune import STAGES
from prunegym.reporting.gather import Record, Run

#: Stages in words.
WORDS = {
    "after_pruning": "right after pruning",
    "after_recovery": "after recovery",
    "after_finetuning": "after fine-tuning",
}
#: Searchers whose plan comes from learning: what a reader wants to know about first.
LEARNED = ("policy", "agent", "few-shot", "zero-shot", "best sampled", "agent best", "few-shot best")
#: Searchers that try nothing out.
SIMPLE = ("uniform", "knapsack", "global_magnitude", "lamp", "global_taylor", "halp")


@dataclass(frozen=True, kw_only=True)
class Field:
    """Where scores may be compared."""

    network: str
    data: str
    """Data set and the seed of its splits."""
    split: str
    stage: str
    """One of :data:`WORDS`."""
    recovery: str
    epochs: int
    """Of fine-tuning; 0 for the stages before it."""

    @property
    def title(self) -> str:
        """The field in words."""
        tuned = f" ({self.epochs} epochs)" if self.epochs else ""
        return f"{self.network} {WORDS[self.stage]}{tuned}, {self.split} images"


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The score of one plan, in one field."""

    where: Field
    budget: str
    searcher: str
    identity: str
    """What makes it a run of its own: seeds, or the policy file."""
    score: float
    cost: float | None
    """Share of the budgeted cost."""
    macs: int | None
    parameters: int | None
    latency_ratio: float | None
    """Measured latency as a share of the unpruned network's, under ``latency_of``."""
    latency_of: str | None
    reward_score: float | None
    reward_examples: int | None
    evaluations: int | None
    seconds: float | None
    run: str


@dataclass(frozen=True, kw_only=True)
class Unpruned:
    """A network as it was."""

    macs: int | None = None
    parameters: int | None = None
    scores: dict[tuple[str, str], float]
    """By data and split."""
    examples: dict[tuple[str, str], int]
    """Images in a split, by data and split."""


@dataclass(frozen=True)
class Scores:
    """All scores of a page."""

    rows: tuple[Scored, ...]
    unpruned: dict[str, Unpruned]
    """By network."""

    @cached_property
    def fields(self) -> dict[Field, list[Scored]]:
        """Rows by field; what stands alone in one is no comparison and is still listed."""
        found: dict[Field, list[Scored]] = {}
        for row in self.rows:
            found.setdefault(row.where, []).append(row)
        order = ("selection", "test")  # what was chosen by, before what was read at the end
        return dict(sorted(found.items(), key=lambda item: order.index(item[0].split)))

    def unpruned_score(self, where: Field) -> float | None:
        """Score of the unpruned network on the images of a field."""
        known = self.unpruned.get(where.network)
        return known.scores.get((where.data, where.split)) if known else None

    def examples(self, where: Field) -> int | None:
        """Images that the scores of a field are means over."""
        known = self.unpruned.get(where.network)
        return known.examples.get((where.data, where.split)) if known else None


def by_searcher(rows: Sequence[Scored], budget: str) -> dict[str, list[Scored]]:
    """The runs of each searcher at one budget: learned ones first, then by mean score."""
    found: dict[str, list[Scored]] = {}
    for row in rows:
        if row.budget == budget:
            found.setdefault(row.searcher, []).append(row)
    order = sorted(found, key=lambda name: (name not in LEARNED, -mean_score(found[name])))
    return {name: found[name] for name in order}


def mean_score(rows: Sequence[Scored]) -> float:
    """Mean over runs."""
    return fmean(row.score for row in rows)


def collect(runs: Sequence[Run]) -> Scores:
    """Bring the rows of all runs into one form.

    Args:
        runs: As of :func:`.gather.gather`.
    """
    rows: dict[tuple[Any, ...], Scored] = {}
    for run in runs:
        for row in _rows_of(run):
            key = (row.where, row.budget, row.searcher, row.identity)
            known = rows.setdefault(key, row)
            if known.score != row.score:  # something else than what tells runs apart here was different
                rows.setdefault((*key, row.run), row)
            elif known.latency_ratio is None:
                rows[key] = replace(known, latency_ratio=row.latency_ratio, latency_of=row.latency_of)
    return Scores(tuple(rows.values()), _unpruned(runs))


def _rows_of(run: Run) -> Iterator[Scored]:
    """Rows of one run."""
    if run.command == "compare":
        for row in run.rows:
            yield from _compared(run, row)
    elif result := run.came_to("prune"):
        yield from _pruned(run, result)
    else:
        for row in run.rows:
            if row["searcher"] != "unpruned":
                yield from _evaluated(run, row)


def _field(run: Run, network: str, split: str, stage: str, recovery: str, epochs: int = 0) -> Field:
    return Field(network=network, data=data_of(run), split=split, stage=stage, recovery=recovery, epochs=epochs)


def recovery_of(row: Record) -> str:
    """What follows pruning in a row or result."""
    return str(row.get("recovery") or "compensate")


def data_of(run: Run) -> str:
    """Data of a run: only what has the same name and the same splits can be compared."""
    data, seed = Path(str(run.config.get("data", "unknown"))).name, run.config.get("split_seed", 0)
    return f"{data} (split seed {seed})" if seed else data


def _common(run: Run, row: Record) -> dict[str, Any]:
    return {
        "budget": str(row["budget"]),
        "searcher": str(row["searcher"]),
        "macs": row.get("macs"),
        "parameters": row.get("parameters"),
        "cost": row.get("cost"),
        "reward_score": row.get("reward_score"),
        "reward_examples": run.config.get("reward_examples"),
        "evaluations": row.get("evaluations"),
        "seconds": row.get("seconds"),
        "run": run.name,
    }


def _evaluated(run: Run, row: Record) -> Iterator[Scored]:
    """A row of ``train``, ``evaluate`` or ``transfer``: scores after recovery."""
    identity = _identity(run, row["searcher"])
    for split in ("selection", "test"):
        if row.get(f"{split}_score") is not None:
            yield Scored(
                where=_field(run, row["network"], split, "after_recovery", recovery_of(row)),
                score=float(row[f"{split}_score"]),
                identity=identity,
                latency_ratio=None,
                latency_of=None,
                **_common(run, row),
            )


def _compared(run: Run, row: Record) -> Iterator[Scored]:
    """A row of a comparison: up to three stages on one or two splits."""
    conditions = _conditions(str(row.get("latency") or ""))
    for split in ("selection", "test"):
        for stage in WORDS:
            score = row.get(f"{stage}_score" if split == "selection" else f"test_{stage}_score")
            if score is None or stage == "after_pruning":
                continue
            tuned = stage == "after_finetuning"
            epochs = int(row.get("epochs") or 0) if tuned else 0
            # a plan that stands for several seeds is one run; so is one search that is fine-tuned with several seeds,
            # until it is fine-tuned
            plan = "" if row["searcher"] in SIMPLE else f"{run.name} {row['plan']}"
            seeds = f"{plan} f{row['finetune_seed']}" if tuned else plan
            yield Scored(
                where=_field(run, row["network"], split, stage, recovery_of(row), epochs),
                score=float(score),
                identity=_settings(run) + seeds,
                latency_ratio=row.get("latency_ratio"),
                latency_of=conditions,
                **_common(run, row),
            )


def _pruned(run: Run, result: Record) -> Iterator[Scored]:
    """The stages of ``prune``, on the test split."""
    latency = next((one for one in result.get("latency", ()) if one.get("speed_up")), None)
    row = {
        **result,
        "macs": result["macs"]["after"],
        "parameters": result["parameters"]["after"],
        "cost": None,
        **result.get("search", {}),
    }
    for stage in STAGES[2:]:
        score = result["test_scores"].get(stage)
        if score is None:
            continue
        epochs = int(result.get("epochs") or 0) if stage == "after_finetuning" else 0
        yield Scored(
            where=_field(run, result["network"], "test", stage, recovery_of(result), epochs),
            score=float(score),
            identity=_identity(run, result["searcher"]) + (f" f{run.asked['seed']}" if epochs else ""),
            latency_ratio=1 / latency["speed_up"] if latency else None,
            latency_of=_conditions(latency["sentence"]) if latency else None,
            **_common(run, row),
        )


def _identity(run: Run, searcher: str) -> str:
    """What makes another plan of a searcher: settings, and the policy file or the seed."""
    policy = (run.result or {}).get("policy") or run.config.get("policy")
    if searcher in SIMPLE:
        return _settings(run)
    learned = searcher in LEARNED and policy
    return _settings(run) + (str(Path(str(policy)).resolve()) if learned else f"s{run.asked['seed']}")


def _settings(run: Run) -> str:
    """Options that make another result of the same searcher."""
    config = run.config
    return f"{config.get('criterion')} {config.get('align')} {config.get('bound')} "


def _conditions(sentence: str) -> str | None:
    """Device, runtime, threads and batch from the sentence about a latency: what stands behind the number of runs."""
    found = re.search(r"paired turns; (.*?)\)\.", sentence)
    return found[1] if found else None


def _unpruned(runs: Sequence[Run]) -> dict[str, Unpruned]:
    """What is known of the networks before pruning, from whichever run has it."""
    found: dict[str, Unpruned] = {}

    def note(network: str, macs: Any = None, parameters: Any = None) -> Unpruned:
        known = found.get(network) or Unpruned(scores={}, examples={})
        found[network] = Unpruned(
            macs=known.macs or macs,
            parameters=known.parameters or parameters,
            scores=known.scores,
            examples=known.examples,
        )
        return found[network]

    for run in runs:
        data = data_of(run)
        for record in run.networks:
            known = note(record["network"], record.get("macs"), record.get("parameters"))
            for split, one in record.get("unpruned", {}).items():
                known.scores[data, split] = one["score"]
                known.examples[data, split] = one["examples"]
        if result := run.came_to("prune"):
            known = note(result["network"], result["macs"]["before"], result["parameters"]["before"])
            known.scores[data, "test"] = result["test_scores"]["unpruned"]
        for row in run.rows:
            if row["searcher"] == "unpruned":
                known = note(row["network"], row["macs"], row["parameters"])
                for split in ("reward", "selection", "test"):
                    known.scores[data, split] = row[f"{split}_score"]
        for network in run.network_names:
            known = note(network)
            for split, count in run.examples.items():
                known.examples.setdefault((data, split), count)
    return found
