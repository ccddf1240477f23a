"""From a plan to a score: prune, recover, run. The search spends its time here.

The forward passes are what must be paid; the rest is kept small. Statistics of the unpruned network are
computed once and sliced, surgery copies Python objects but not the tensors it replaces, calibration and
reward batches are prepared once, and scoring runs with batch normalisation folded into the convolutions, in
channels-last layout and in bfloat16 where the device computes that fast and the network agrees with itself in
float32.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.importance.criteria import Calibration, Context, Criterion, Scores, unit_scores
from prunegym.pruning.importance.statistics import Statistics, collect_statistics, without_gradient
from prunegym.pruning.inference import InferenceForm, has_fast_bfloat16, tensors_of, to_float
from prunegym.pruning.layout import common, layout_for
from prunegym.pruning.memory import peak_memory
from prunegym.pruning.modes import evaluating
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import (
    Fitting,
    Reconstruction,
    Targets,
    Teacher,
    compensated_tensors,
    divergence,
    observe_targets,
    recalibrating,
    reconstruct,
    train_steps,
)
from prunegym.pruning.surgery import rebuilt, sliced_tensors
from prunegym.pruning.task import Task, empty_split, first_batch, forward, scores_of

CACHE_LIMIT = 1 << 30
"""Most bytes of prepared batches kept in memory; beyond that batches are prepared anew for each plan."""

Recovery: TypeAlias = Literal["none", "bn", "compensate", "reconstruct", "distill"]
RECOVERIES: tuple[str, ...] = get_args(Recovery)
Measure: TypeAlias = Literal["task", "loss", "divergence"]
MEASURES: tuple[str, ...] = get_args(Measure)

QUICK_EXAMPLES = 128
"""Calibration examples of a look between rounds, and of reconstruction where a plan is only scored."""
QUICK_FITTING = Fitting(per_unknown=8, fewest=1000, most=3000, numbers=1.8e6, double=False)
"""Reconstruction where a plan is only scored."""
QUICK_STEPS = 20
"""Most steps of distillation where a plan is only scored."""
ACTIVATION_LIMIT = 1 << 30
"""Most bytes of activations of a batch that is reconstructed on; more examples make several batches."""
CHUNK_SHARE = 4
"""Where there are several batches, each gives so many times its share of the positions: the first are of a network
whose early layers were fitted to few examples."""


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

    criterion: str = "residual_taylor"
    """Which channels of a group are kept."""
    recovery: Recovery = "reconstruct"
    """What follows pruning: nothing, recalibrated normalisation, that after least-squares compensation, layer-wise
    reconstruction, or steps towards the unpruned network."""
    scored: Recovery | None = None
    """The recovery that plans get, in a cheap form, where they are only scored; by default that of the result. Where
    training follows, reconstruction ranks plans better than the compensation that training starts from."""
    statistics_examples: int = 512
    """Calibration examples for activations, covariances and Taylor scores."""
    recovery_examples: int = 512
    """Calibration examples for recalibration and reconstruction."""
    recovery_steps: int = 400
    """Optimiser steps of the recovery `distill`."""
    recovery_rate: float = 0.02
    """Learning rate of the first of them."""
    recovery_split: str = "train"
    """Where their examples come from: all of `train`, or the first `recovery_examples` of `calibration`."""
    split: str = "reward"
    examples: int = 1000
    """Examples of the split that are scored."""
    batch_size: int = 250
    measure: Measure = "task"
    """What a score is: the task's own; `loss`: exp(-loss); or `divergence`, which needs no labels: exp(-d), with d the
    divergence from the outputs of the unpruned network."""
    precision: str = "auto"
    """`float32`, `bfloat16`, or `auto`: bfloat16 where the device has fast instructions for it."""
    seed: int = 0
    """Seed of the batches of the recovery steps, the same for every plan, and of criteria that draw numbers."""

    def __post_init__(self) -> None:
        if self.precision not in {"auto", "float32", "bfloat16"}:
            raise PruningError(f"`precision` should be auto, float32 or bfloat16. Received {self.precision!r}.")
        for name, known in (("recovery", RECOVERIES), ("scoring", RECOVERIES), ("measure", MEASURES)):
            if getattr(self, name) not in known:
                raise unknown_name(name.replace("scoring", "scored"), getattr(self, name), known)
        if self.recovery_split not in {"train", "calibration"}:
            raise unknown_name("recovery_split", self.recovery_split, ("train", "calibration"))
        if not 0 < self.recovery_rate < math.inf:
            raise PruningError(f"`recovery_rate` should be positive and finite. Received {self.recovery_rate}.")
        for name in ("examples", "batch_size", "statistics_examples", "recovery_examples", "recovery_steps"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name}` should be at least 1. Received {getattr(self, name)}.")

    @property
    def scoring(self) -> Recovery:
        """The recovery of plans that are only scored."""
        return self.scored or self.recovery


class ScoreStore(Protocol):
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
        self._outputs: dict[tuple[str, int], list[Any]] = {}
        self._targets: dict[tuple[int, float], list[Targets]] = {}
        self.scored = 0
        """Plans run so far; cached ones do not count."""
        self.store: ScoreStore | None = None
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
            known = None if self.store is None else self.store.read(*key)
            if known is None:
                known = self.run(*key)
                self.scored += 1
                if self.store is not None:
                    self.store.write(*key, known)
            self._cache[key] = known
        return self._cache[key]

    def __getstate__(self) -> dict[str, Any]:
        """What a worker gets: neither prepared batches, which are large, nor the store, which has one writer."""
        return {**self.__dict__, "_prepared": {}, "_outputs": {}, "_targets": {}, "store": None}

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

    def forget_targets(self) -> None:
        """Drop what is remembered of the unpruned network for reconstruction, and free its memory."""
        self._targets.clear()

    def pruned(self, plan: PruningPlan, recovery: Recovery | None = None) -> nn.Module:
        """The smaller network right after surgery, and compensation where the recovery has it, in float32."""
        graph, model = self.network.graph, self.network.model
        mask = plan.mask(graph)
        compensates = (recovery or self.settings.recovery) not in {"none", "bn"}
        replaced = compensated_tensors(model, graph, mask, self.statistics) if compensates else None
        return rebuilt(model, graph, mask, sliced_tensors(model, graph, mask, replaced), plan.removed)

    def recovered(self, plan: PruningPlan, *, quick: bool = False) -> nn.Module:
        """The smaller network after its whole recovery, in float32: what the user gets.

        Args:
            plan: channels to keep.
            quick: the cheap form of the recovery, as for a look between rounds.
        """
        return self.recover(plan, quick=quick)[0]

    def recover(
        self, plan: PruningPlan, *, quick: bool = False, progress: bool = False
    ) -> tuple[nn.Module, dict[str, str]]:
        """The smaller network after recovery, in float32, and the layers that reconstruction left, with the reason."""
        model, settings = self.pruned(plan), self.settings
        if settings.recovery == "reconstruct":
            twin = duplicate(model)  # runs in the fastest form
            exact = self._prepared_layers(twin)
            found = self._reconstruct(twin, plan, quick=quick, exact=exact)
            fitted = {**dict(twin.named_parameters()), **dict(twin.named_buffers()), **exact}
            with torch.no_grad():
                for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
                    tensor.copy_(fitted[name])
            return model, found.skipped
        if settings.recovery == "distill" and not quick:
            self._recalibrate(model, half=False)
            self._distill(model, plan, settings.recovery_steps, progress=progress)
            return model, {}  # its statistics come from training; measured anew they would cost accuracy
        if settings.recovery != "none":
            self._recalibrate(model, half=False, examples=QUICK_EXAMPLES if quick else None)
        return model, {}

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
        """Prune, recover and score, whether or not the plan has been scored before.

        On more examples of the settings' split than searches score on, which is a second look at a candidate for the
        result, reconstruction takes its full form.
        """
        split, examples = split or self.settings.split, examples or self.settings.examples
        whole = split == self.settings.split and examples > self.settings.examples
        _, folded = self.candidate(plan, quick=not whole)
        return self._measure(folded, split, examples)

    def candidate(self, plan: PruningPlan, *, quick: bool = True) -> tuple[nn.Module, nn.Module]:
        """The network after recovery in its cheap form, as it is recovered, and as it is scored: folded.

        Both share what they can; the first is not usable once the second has been trained or changed.
        """
        recovery, settings = self.settings.scoring, self.settings
        model = self.pruned(plan, recovery)
        if recovery == "distill":
            self._recalibrate(model, half=False)
            self._distill(model, plan, min(settings.recovery_steps, QUICK_STEPS))
        exact = self._prepared_layers(model)
        if recovery == "reconstruct":
            self._reconstruct(model, plan, quick=quick, exact=exact)
        elif recovery in {"bn", "compensate"}:
            self._recalibrate(model, half=self.form.half)
        weights = {name.removesuffix(".weight"): tensor for name, tensor in exact.items() if name.endswith(".weight")}
        return model, self.form.folded(model, weights)

    def _prepared_layers(self, model: nn.Module) -> dict[str, Tensor]:
        """Bring layers into the form, in place; their exact weights and biases by name."""
        before = {name: parameter.detach() for name, parameter in model.named_parameters()}
        layers = self.form.prepare_layers(model)
        names = [f"{path}.{kind}" for path in layers for kind in ("weight", "bias")]
        return {name: before[name] for name in names if name in before}

    def _reconstruct(
        self, model: nn.Module, plan: PruningPlan, *, quick: bool, exact: dict[str, Tensor]
    ) -> Reconstruction:
        """Fit the layers of a pruned network, in the form that they are in."""
        graph, settings = self.network.graph, self.settings
        examples = min(settings.recovery_examples, QUICK_EXAMPLES) if quick else settings.recovery_examples
        fitting = QUICK_FITTING if quick else Fitting()
        return reconstruct(model, graph, plan.mask(graph), self._targets_on(examples, fitting), fitting, exact=exact)

    def _targets_on(self, examples: int, fitting: Fitting) -> Iterable[Targets]:
        """What the unpruned network computes; remembered where one batch holds all examples."""
        key = (examples, fitting.per_unknown)
        if key in self._targets:
            return self._targets[key]
        size = max(1, min(examples, ACTIVATION_LIMIT // max(1, self._activations)))
        targets = self._observed(examples, size, fitting)
        if size < examples:
            return targets
        self._targets[key] = list(targets)
        return self._targets[key]

    @cached_property
    def _activations(self) -> int:
        """Bytes of activations for one example."""
        return peak_memory(self.network.model, self.network.example_inputs).bytes

    def _observed(self, examples: int, size: int, fitting: Fitting) -> Iterator[Targets]:
        teacher = duplicate(self.network.model)
        self.form.prepare_layers(teacher)
        share = min(1.0, CHUNK_SHARE * size / examples)
        part = replace(fitting, per_unknown=fitting.per_unknown * share, fewest=round(fitting.fewest * share))
        batches = self.task.batches("calibration", batch_size=size, limit=examples, device=self.device)
        for number, (inputs, _) in enumerate(batches):
            prepared = tree_map(self.form.prepare_input, inputs)
            yield observe_targets(teacher, prepared, part, seed=self.settings.seed + number)

    def _distill(self, model: nn.Module, plan: PruningPlan, steps: int, *, progress: bool = False) -> None:
        """Draw a pruned network towards the unpruned one."""
        graph, settings = self.network.graph, self.settings
        train_steps(
            model,
            self.task,
            steps=steps,
            learning_rate=settings.recovery_rate,
            seed=settings.seed,
            form=self.form,
            device=self.device,
            teacher=Teacher(self.network.model, graph, plan.mask(graph)),
            split=settings.recovery_split,
            limit=settings.recovery_examples if settings.recovery_split == "calibration" else None,
            progress=progress,
        )

    def _recalibrate(self, model: nn.Module, *, half: bool, examples: int | None = None) -> None:
        examples = min(examples or self.settings.recovery_examples, self.settings.recovery_examples)
        with recalibrating(model) as needed, torch.no_grad():
            if needed:
                for inputs, _ in self.batches("calibration", examples):
                    forward(model, inputs if half else tree_map(to_float, inputs))

    def _measure(self, model: nn.Module, split: str, examples: int) -> Score:
        total, losses, count = 0.0, 0.0, 0
        wanted = self._wanted(split, examples) if self.settings.measure == "divergence" else None
        with evaluating(model), torch.inference_mode():
            for number, (inputs, targets) in enumerate(self.batches(split, examples)):
                outputs = tree_map(to_float, forward(model, inputs))
                if wanted is None:
                    scores = scores_of(self.task, outputs, targets)
                    total += float(scores.sum())
                    losses += float(self.task.loss(outputs, targets)) * len(scores)
                    count += len(scores)
                else:  # no labels
                    examples_here = len(tensors_of(inputs)[0])
                    losses += float(divergence(outputs, wanted[number])) * examples_here
                    count += examples_here
        if not count:
            raise empty_split(self.task, split)
        score = total / count if self.settings.measure == "task" else math.exp(-losses / count)
        return Score(score, losses / count, count)

    def _wanted(self, split: str, examples: int) -> list[Any]:
        """Outputs of the unpruned network on a split, batch by batch."""
        key = (split, examples)
        if key not in self._outputs:
            model = duplicate(self.network.model)
            model = self.form.folded(model, self.form.prepare_layers(model))
            with evaluating(model), torch.inference_mode():
                found = [tree_map(to_float, forward(model, inputs)) for inputs, _ in self.batches(split, examples)]
            self._outputs[key] = found
        return self._outputs[key]

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
        modes = (False, True) if "distill" in (self.settings.recovery, self.settings.scoring) else (False,)
        layout = common(layout_for(self.network.model, inputs, training=mode) for mode in modes)
        exact = InferenceForm(folds, half=False, layout=layout)
        if wanted == "float32" or (wanted == "auto" and not has_fast_bfloat16(self.device)):
            return exact
        form = InferenceForm(folds, half=True, layout=layout)
        return form if form.agrees(self.network.model, inputs) else exact
