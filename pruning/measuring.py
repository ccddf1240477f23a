"""How well a network does on a split."""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.layout import laid_out, layout_for
from prunegym.pruning.modes import evaluating
from prunegym.pruning.task import Task, empty_split, forward, scores_of


@dataclass(frozen=True)
class Measurement:
    """How well a network does on a split.

    Args:
        score: Mean over the examples; accuracy in [0, 1] for classification.
        loss: Mean over the examples.
        examples: How many there were.
    """

    score: float
    loss: float
    examples: int


def evaluate_network(
    model: nn.Module,
    task: Task,
    split: str,
    *,
    batch_size: int = 500,
    limit: int | None = None,
    device: torch.device | str = "cpu",
    amp: bool = False,
) -> Measurement:
    """Measure a network on a split; it is left as it was, except that it is moved to ``device``.

    Args:
        model: The network.
        task: Data, loss and score.
        split: One of ``prunegym.pruning.datasets.data.SPLITS``.
        batch_size: Examples per forward pass; the result does not depend on it.
        limit: Only the first so many examples.
        device: Where to compute.
        amp: Compute in bfloat16 where autocast deems it safe.

    Raises:
        PruningError: The split is unknown or empty, the network's outputs do not fit the task, or it
            does not give one score per example.
    """
    model.to(device)
    device = torch.device(device)
    score = loss = 0.0
    examples = 0
    layout: torch.memory_format | None = None
    with evaluating(model), torch.inference_mode():
        for inputs, targets in task.batches(split, batch_size=batch_size, limit=limit, device=device):
            layout = layout or layout_for(model, inputs)
            with torch.autocast(device.type, torch.bfloat16, enabled=amp):
                outputs = forward(model, laid_out(inputs, layout))
            scores = scores_of(task, outputs, targets)
            score += float(scores.double().sum())
            loss += float(task.loss(outputs, targets)) * len(scores)
            examples += len(scores)
    if not examples:
        raise empty_split(task, split)
    return Measurement(score / examples, loss / examples, examples)


def compare_networks(
    models: Mapping[str, nn.Module],
    task: Task,
    *,
    device: torch.device | str = "cpu",
    may_fail: Collection[str] = (),
) -> dict[str, float]:
    """Score networks on the test split, such as one before and after something was done to it.

    Of outputs that are NaN, ``argmax`` still makes an accuracy, which would stand in a table as if it meant something.

    Args:
        models: The networks by name; each is moved to ``device``.
        task: Data, loss and score.
        device: Where to compute.
        may_fail: Networks whose score is NaN where their outputs are: what was only cut, and is repaired next.

    Returns:
        The mean score of each.

    Raises:
        PruningError: The loss or the score of another network is NaN.
    """
    scores: dict[str, float] = {}
    for name, model in models.items():
        found = evaluate_network(model, task, "test", device=device)
        scores[name] = math.nan if math.isnan(found.loss) else found.score
        if math.isnan(scores[name]) and name not in may_fail:
            raise PruningError(
                f"`network` should have a loss and a score that are numbers. Received NaN on the test split of "
                f"'{task.name}' for the network {name.replace('_', ' ')}. Look for values in its weights or in the "
                "data that are not finite; if it was trained, lower the learning rate."
            )
    return scores
