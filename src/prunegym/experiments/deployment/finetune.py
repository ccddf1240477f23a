"""Fine-tune a network, and know what came of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.tables import format_table
from prunegym.experiments.fitting import fit
from prunegym.experiments.setup import example_inputs
from prunegym.pruning.copies import duplicate
from prunegym.pruning.deployment.recipe import Blueprint
from prunegym.pruning.deployment.saving import write_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.modes import evaluating
from prunegym.pruning.task import Task, first_batch, forward, scores_of
from prunegym.pruning.training import EpochRow, TrainingSettings, compare_networks

#: Names of the scores of a result.
STAGES = ("before_finetuning", "after_finetuning")


@dataclass(frozen=True, kw_only=True)
class FinetuneResult:
    """A fine-tuned network and what is known of it."""

    model: nn.Module = field(repr=False)
    """The network, in evaluation mode."""
    name: str
    """What it is called."""
    scores: Mapping[str, float]
    """On the test split: ``before_finetuning`` and ``after_finetuning`` (last epoch, averaged weights if any)."""
    epochs: tuple[EpochRow, ...] = field(repr=False)
    settings: TrainingSettings = field(repr=False)
    distilled: bool
    """Whether a teacher was imitated."""
    blueprint: Blueprint = field(repr=False)
    """What rebuilds the network around its tensors, for :func:`prunegym.save`."""
    example_inputs: tuple[Any, ...] = field(repr=False)
    metadata: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What was known of the network before."""

    def to_json(self) -> dict[str, Any]:
        """The result without the network, in what JSON holds."""
        return {
            "network": self.name,
            "test_scores": dict(self.scores),
            "parameters": sum(one.numel() for one in self.model.parameters()),
            "epochs": len(self.epochs),
            "distilled": self.distilled,
            "settings": asdict(self.settings),
        }

    @property
    def full_metadata(self) -> dict[str, Any]:
        """What is known of the network now: what was before, and one entry for each fine-tuning."""
        before = self.metadata.get("finetuning", [])
        return {**self.metadata, "finetuning": [*before, self.to_json()]}

    def save(self, folder: Path) -> None:
        """Write the network, to be read by :func:`prunegym.load`.

        Raises:
            PruningError: The folder cannot be written, or the network would not come back as it is.
        """
        inputs, metadata = self.example_inputs, self.full_metadata
        write_network(folder, self.blueprint, self.model, example_inputs=inputs, metadata=metadata)


def finetune_network(
    model: nn.Module,
    task: Task,
    settings: TrainingSettings,
    *,
    blueprint: Blueprint,
    name: str,
    metadata: Mapping[str, Any] | None = None,
    teacher: nn.Module | None = None,
    device: torch.device | str = "cpu",
    checkpoint: Path | None = None,
    checkpoint_minutes: float = 10.0,
    run: RunFolder | None = None,
    progress: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> FinetuneResult:
    """Fine-tune a copy of a network. The test split is read at the end only.

    Args:
        model: The network; it is not changed.
        task: Data, loss and score.
        settings: Everything that the result depends on besides.
        blueprint: What rebuilds the network around its tensors.
        name: What it is called.
        metadata: What is known of it.
        teacher: Network whose outputs are imitated.
        device: Where to train.
        checkpoint: File from which an interrupted training goes on.
        checkpoint_minutes: Longest time without a checkpoint.
        run: Takes the place of ``checkpoint``, and gets a table of the epochs too.
        progress: Show a bar.
        limit: When to stop: after the epoch under way.

    Raises:
        TimeUp: The limit is reached.
        PruningError: Network and task do not fit, or the loss became non-finite; the last checkpoint is kept.
    """
    tuned = duplicate(model)
    check_fits(tuned, task)
    rows = fit(
        tuned,
        task,
        settings,
        run=run,
        checkpoint=checkpoint,
        checkpoint_minutes=checkpoint_minutes,
        teacher=None if teacher is None else duplicate(teacher),
        device=device,
        progress=progress,
        limit=limit,
    )
    both = (duplicate(model), tuned)
    scores = compare_networks(dict(zip(STAGES, both, strict=True)), task, device=device)
    return FinetuneResult(
        model=tuned,
        name=name,
        scores=scores,
        epochs=tuple(rows),
        settings=settings,
        distilled=teacher is not None,
        blueprint=blueprint,
        example_inputs=example_inputs(task),
        metadata=metadata or {},
    )


def check_fits(model: nn.Module, task: Task) -> None:
    """Make sure that a network takes the inputs of a task and gives what the task scores.

    Raises:
        PruningError: It does not, or there are no examples to score it on.
    """
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    inputs, targets = first_batch(task, "calibration", 2, device)
    first_batch(task, "test", 1)  # the scores that are told come from there, at the end
    try:
        with evaluating(model), torch.no_grad():
            scores_of(task, forward(model, inputs), targets)
    except PruningError:
        raise
    except Exception as fault:  # whatever a network may raise
        shapes = [tuple(one.shape) for one in (inputs if isinstance(inputs, tuple) else (inputs,))]
        raise PruningError(
            f"`--data` should be what the network takes. Received '{task.name}' with inputs of shape {shapes}, for "
            f"which the network raised {type(fault).__name__}: {fault}. Choose the data that it was made for."
        ) from fault


def describe(content: Mapping[str, Any]) -> str:
    """A result, as of :meth:`FinetuneResult.to_json`, for a terminal."""
    scores = content["test_scores"]
    rows = [
        {"network": name.replace("_", " ").replace("finetuning", "fine-tuning"), "test score": scores[name]}
        for name in STAGES
    ]
    return format_table(rows)
