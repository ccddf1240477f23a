"""From a plan to a score: prune, recover, run. The search spends its time here.

The forward passes are what must be paid; the rest is kept small. Statistics of the unpruned network are
computed once and sliced, surgery copies Python objects but not the tensors it replaces, calibration and
reward batches are prepared once, and scoring runs with batch normalisation folded into the convolutions, in
channels-last layout and in bfloat16 where the device computes that fast and the network agrees with itself in
float32.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_map

from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError
from prunegym.pruning.importance.criteria import Calibration, Context, Criterion, Scores, unit_scores
from prunegym.pruning.importance.statistics import Statistics, collect_statistics, without_gradient
from prunegym.pruning.inference import InferenceForm, has_fast_bfloat16, tensors_of, to_float
from prunegym.pruning.layout import common, layout_for
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import compensated_tensors, recalibrating, train_steps
from prunegym.pruning.surgery import rebuilt, sliced_tensors
from prunegym.pruning.task import Task, empty_split, first_batch, forward, scores_of

CACHE_LIMIT = 1 << 30
"""Most bytes of prepared batches kept in memory; beyond that batches are prepared anew for each plan."""

QUICK_EXAMPLES = 128
"""Calibration examples of the recalibration between rounds."""


@dataclass(frozen=True)
class Score:
    """What a recovered network does on a split."""

    score: float
    """Mean score per example, accuracy in [0, 1] for classification."""
    loss: float
    examples: int


@dataclass(frozen=True, kw_only=True)
class ScorerSettings:
    """How plans are turned into scores. The same for every searcher that is compared."""

    criterion: str = "taylor"
    """Which channels of a group are kept."""
    compensate: bool = True
    """Fold removed input channels into kept ones by least squares."""
    statistics_examples: int = 512
    """Calibration examples for activations, covariances and Taylor scores."""
    recalibration_examples: int = 512
    """Calibration examples for batch normalisation; 0 leaves the running statistics as they are."""
    split: str = "reward"
    examples: int = 1000
    """Examples of the split that are scored."""
    batch_size: int = 250
    recovery_steps: int = 0
    """Optimiser steps before scoring: the reward of the fine-tuned regime."""
    learning_rate: float = 0.02
    precision: str = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the device has fast instructions for it."""
    seed: int = 0
    """Seed of the batches of the recovery steps, the same for every plan, and of criteria that draw numbers."""

    def __post_init__(self) -> None:
        if self.precision not in {"auto", "float32", "bfloat16"}:
            raise PruningError(f"`precision` should be auto, float32 or bfloat16. Received {self.precision!r}.")
        for name in ("examples", "batch_size", "statistics_examples"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name}` should be at least 1. Received {getattr(self, name)}.")


class Journal(Protocol):
    """Where scores outlive the process: a search that was killed is repeated with them, which is quick."""

    def read(self, plan: PruningPlan, split: str, examples: int) -> Score | None:
        """The score that was written for a plan; None if there is none."""

    def write(self, plan: PruningPlan, split: str, examples: int, score: Score) -> None:
        """Keep a score."""


class Scorer:
    """Scores plans of one network, and remembers them.

    Args:
        network: the network to prune.
        task: data, loss and score.
        settings: criterion, recovery and split.
        statistics: of the unpruned network; collected here if not given.
        given: criteria that are made elsewhere, see :class:`.Context`.
        device: where to run.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        task: Task,
        settings: ScorerSettings | None = None,
        *,
        statistics: Statistics | None = None,
        given: Mapping[str, Criterion] | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network = network
        self.task = task
        self.settings = settings or ScorerSettings()
        self.given = dict(given or {})
        self.device = torch.device(device)
        network.model.to(self.device)
        self.statistics = statistics or self._collect()
        self.unit_scores = self.criterion_scores(self.settings.criterion)
        self._prepared: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
        self.form = self._choose_form()
        """Layout and precision in which candidates run."""
        self._cache: dict[tuple[PruningPlan, str, int], Score] = {}
        self._unpruned: dict[tuple[str, int], Score] = {}
        self.scored = 0
        """Plans run so far; cached ones do not count."""
        self.journal: Journal | None = None
        """Where scores are kept, and looked up, beyond the life of this process."""

    def _collect(self) -> Statistics:
        """Statistics of the unpruned network, with a warning where they do not tell what they seem to."""
        network, examples = self.network, self.settings.statistics_examples
        found = collect_statistics(network.model, network.graph, self.task, examples=examples, device=self.device)
        blind = without_gradient(network.graph, found)
        if blind:
            names = f"{', '.join(blind[:3])}{f' and {len(blind) - 3} more' if len(blind) > 3 else ''}"
            warnings.warn(
                f"no gradient reaches the channel groups {names}, so that Taylor criteria, the knapsack and policies "
                "take them for worthless. Look for a detach() or a layer of zeros after them; "
                f"`--bound '{blind[0]}=1..1'` leaves a group as it is",
                stacklevel=3,
            )
        return found

    def criterion_scores(self, criterion: str) -> Scores:
        """Scores of all units ``(units,)`` of the unpruned network by a criterion."""
        examples = self.settings.statistics_examples
        return unit_scores(criterion, self._context(self.network.model, self.statistics, None, examples))

    def score(self, plan: PruningPlan, *, split: str | None = None, examples: int | None = None) -> Score:
        """Prune by the plan, recover, and run on the settings' split and examples (or others)."""
        key = (plan, split or self.settings.split, examples or self.settings.examples)
        if key not in self._cache:
            known = None if self.journal is None else self.journal.read(*key)
            if known is None:
                known = self.run(*key)
                self.scored += 1
                if self.journal is not None:
                    self.journal.write(*key, known)
            self._cache[key] = known
        return self._cache[key]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: neither prepared batches, which are large, nor the journal, which has one writer."""
        return {**self.__dict__, "_prepared": {}, "journal": None}

    def unpruned(self, *, split: str | None = None, examples: int | None = None) -> Score:
        """The unpruned network's score, in the same precision and on the same examples."""
        key = (split or self.settings.split, examples or self.settings.examples)
        if key not in self._unpruned:
            model = duplicate(self.network.model)
            self.form.prepare_layers(model)
            self._unpruned[key] = self._measure(model, *key)
        return self._unpruned[key]

    def forget(self) -> None:
        """Drop all scores of plans, so that the next search pays for each of its own; batches stay prepared."""
        self._cache.clear()

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """The smaller network right after surgery and compensation, in float32."""
        graph, model = self.network.graph, self.network.model
        mask = plan.mask(graph)
        replaced = compensated_tensors(model, graph, mask, self.statistics) if self.settings.compensate else None
        return rebuilt(model, graph, mask, sliced_tensors(model, graph, mask, replaced), plan.removed)

    def recovered(self, plan: PruningPlan, *, quick: bool = False) -> nn.Module:
        """The smaller network after recovery, in float32.

        Args:
            plan: channels to keep.
            quick: for a look between rounds: fewer calibration examples and no optimiser steps.
        """
        model = self.pruned(plan)
        if self.settings.recovery_steps and not quick:
            self._recalibrate(model, half=False)
            self._train(model)
        self._recalibrate(model, half=False, examples=QUICK_EXAMPLES if quick else None)
        return model

    def look(self, plan: PruningPlan, examples: int) -> tuple[Statistics, Scores]:
        """What the network that a plan leaves looks like to the next round of pruning.

        Args:
            plan: channels that are left.
            examples: calibration examples to look at.

        Returns:
            Statistics of the recovered network, and the settings' criterion ``(units,)``; for units that are
            gone both hold 0.
        """
        model, mask = self.recovered(plan, quick=True), plan.mask(self.network.graph)
        statistics = collect_statistics(
            model,
            self.network.graph,
            self.task,
            mask=mask,
            examples=examples,
            covariances=False,
            device=self.device,
        )
        return statistics, unit_scores(self.settings.criterion, self._context(model, statistics, mask, examples))

    def _context(
        self, model: nn.Module, statistics: Statistics, mask: NDArray[np.bool_] | None, examples: int
    ) -> Context:
        """What criteria may look at in one state of the network."""
        return Context(
            model,
            self.network.graph,
            statistics,
            mask=mask,
            calibration=Calibration(task=self.task, examples=examples, device=self.device),
            given=self.given,
            seed=self.settings.seed,
        )

    def run(self, plan: PruningPlan, split: str | None = None, examples: int | None = None) -> Score:
        """Prune, recover and score, whether or not the plan has been scored before."""
        _, folded = self.candidate(plan)
        return self._measure(folded, split or self.settings.split, examples or self.settings.examples)

    def candidate(self, plan: PruningPlan) -> tuple[nn.Module, nn.Module]:
        """The recovered network as it is recalibrated, and as it is scored: in the form chosen, then folded.

        Both share what they can; the first is not usable once the second has been trained or changed.
        """
        model = self.pruned(plan)
        if self.settings.recovery_steps:
            self._recalibrate(model, half=False)
            self._train(model)
        weights = self.form.prepare_layers(model)
        self._recalibrate(model, half=self.form.half)
        return model, self.form.folded(model, weights)

    def _train(self, model: nn.Module) -> None:
        train_steps(
            model,
            self.task,
            steps=self.settings.recovery_steps,
            learning_rate=self.settings.learning_rate,
            seed=self.settings.seed,
            form=self.form,
            device=self.device,
        )

    def _recalibrate(self, model: nn.Module, *, half: bool, examples: int | None = None) -> None:
        if self.settings.recalibration_examples == 0:
            return
        examples = min(examples or self.settings.recalibration_examples, self.settings.recalibration_examples)
        with recalibrating(model) as needed, torch.no_grad():
            if needed:
                for inputs, _ in self.batches("calibration", examples):
                    forward(model, inputs if half else tree_map(to_float, inputs))

    def _measure(self, model: nn.Module, split: str, examples: int) -> Score:
        total, losses, count = 0.0, 0.0, 0
        with evaluating(model), torch.inference_mode():
            for inputs, targets in self.batches(split, examples):
                outputs = tree_map(to_float, forward(model, inputs))
                scores = scores_of(self.task, outputs, targets)
                total += float(scores.sum())
                losses += float(self.task.loss(outputs, targets)) * len(scores)
                count += len(scores)
        if not count:
            raise empty_split(self.task, split)
        return Score(total / count, losses / count, count)

    def batches(self, split: str, examples: int) -> Iterable[tuple[Any, Any]]:
        """Batches in the layout and precision of the scored networks, prepared once if they fit in memory."""
        key = (split, examples)
        if key in self._prepared:
            return self._prepared[key]
        source = self.task.batches(split, batch_size=self.settings.batch_size, limit=examples, device=self.device)
        ready: list[tuple[Any, Any]] = []
        size = 0
        for inputs, targets in source:
            inputs = tree_map(self.form.prepare_input, inputs)
            size += sum(part.nbytes for part in tensors_of(inputs))
            if size > CACHE_LIMIT:
                return self._stream(split, examples)
            ready.append((inputs, targets))
        self._prepared[key] = ready
        return ready

    def _stream(self, split: str, examples: int) -> Iterable[tuple[Any, Any]]:
        for inputs, targets in self.task.batches(
            split, batch_size=self.settings.batch_size, limit=examples, device=self.device
        ):
            yield tree_map(self.form.prepare_input, inputs), targets

    def _choose_form(self) -> InferenceForm:
        """Channels last and bfloat16 (asked for, or fast here) where this network takes the one and bears the other."""
        folds, wanted = self.network.graph.folds, self.settings.precision
        inputs, _ = first_batch(self.task, "calibration", 8, self.device)
        modes = (False, True) if self.settings.recovery_steps else (False,)
        layout = common(layout_for(self.network.model, inputs, training=mode) for mode in modes)
        exact = InferenceForm(folds, half=False, layout=layout)
        if wanted == "float32" or (wanted == "auto" and not has_fast_bfloat16(self.device)):
            return exact
        form = InferenceForm(folds, half=True, layout=layout)
        return form if form.agrees(self.network.model, inputs) else exact
