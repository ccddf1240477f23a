"""From a plan to a score: prune, recover, run. The search spends its time here.

The forward passes are what must be paid; the rest is kept small. Statistics of the unpruned network are computed once
and sliced, surgery copies Python objects but not the tensors it replaces, calibration and reward batches are prepared
once, and scoring runs with batch normalisation folded into the convolutions, in channels-last layout and in bfloat16
where the device computes that fast and the network agrees with itself in float32.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from prunegym.pruning.criteria import Context, Scores, unit_scores
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import compensated_tensors, recalibrating, train_steps
from prunegym.pruning.statistics import Statistics, collect_statistics
from prunegym.pruning.surgery import rebuilt, sliced_tensors
from prunegym.pruning.task import Task, forward
from prunegym.pruning.trace import evaluating

CACHE_LIMIT = 1 << 30
"""Most bytes of prepared batches kept in memory; beyond that batches are prepared anew for each plan."""

BFLOAT16_TOLERANCE = 0.05
"""bfloat16 is used if it changes the unpruned network's outputs by no more than this share of their size."""


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

    criterion: str = "taylor_squared"
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
    """Seed of the batches of the recovery steps, the same for every plan."""

    def __post_init__(self) -> None:
        if self.precision not in {"auto", "float32", "bfloat16"}:
            raise PruningError(f"`precision` should be auto, float32 or bfloat16. Received {self.precision!r}.")
        for name in ("examples", "batch_size", "statistics_examples"):
            if getattr(self, name) < 1:
                raise PruningError(f"`{name}` should be at least 1. Received {getattr(self, name)}.")


class Scorer:
    """Scores plans of one network, and remembers them.

    Args:
        network: the network to prune.
        task: data, loss and score.
        settings: criterion, recovery and split.
        statistics: of the unpruned network; collected here if not given.
        device: where to run.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        task: Task,
        settings: ScorerSettings | None = None,
        *,
        statistics: Statistics | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        self.network = network
        self.task = task
        self.settings = settings or ScorerSettings()
        self.device = torch.device(device)
        network.model.to(self.device)
        self.statistics = statistics or collect_statistics(
            network.model, network.graph, task, examples=self.settings.statistics_examples, device=self.device
        )
        self.unit_scores = self.criterion_scores(self.settings.criterion)
        self._prepared: dict[tuple[str, int], list[tuple[Any, Any]]] = {}
        self.half = self._half_precision_works()
        self._cache: dict[tuple[PruningPlan, str], Score] = {}
        self.scored = 0
        """Plans run so far; cached ones do not count."""

    def criterion_scores(self, criterion: str) -> Scores:
        """Scores of all units ``(units,)`` of the unpruned network by a criterion."""
        return unit_scores(criterion, Context(self.network.model, self.network.graph, self.statistics))

    def score(self, plan: PruningPlan, *, split: str | None = None) -> Score:
        """Prune by the plan, recover, and run on the settings' split (or another)."""
        key = (plan, split or self.settings.split)
        if key not in self._cache:
            self._cache[key] = self._run(plan, key[1])
            self.scored += 1
        return self._cache[key]

    def unpruned(self, split: str | None = None) -> Score:
        """The unpruned network's score, in the same precision and on the same examples."""
        name = f"unpruned:{split or self.settings.split}"
        key = (PruningPlan(()), name)
        if key not in self._cache:
            model = copy.deepcopy(self.network.model)
            self._prepare_layers(model)
            self._cache[key] = self._measure(model, split or self.settings.split)
        return self._cache[key]

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """The smaller network right after surgery and compensation, in float32."""
        graph, model = self.network.graph, self.network.model
        mask = plan.mask(graph)
        replaced = compensated_tensors(model, graph, mask, self.statistics) if self.settings.compensate else None
        return rebuilt(model, graph, mask, sliced_tensors(model, graph, mask, replaced))

    def recovered(self, plan: PruningPlan) -> nn.Module:
        """The smaller network after all recovery of the settings, in float32."""
        model = self.pruned(plan)
        if self.settings.recovery_steps:
            self._recalibrate(model, half=False)
            self._train(model)
        self._recalibrate(model, half=False)
        return model

    def _run(self, plan: PruningPlan, split: str) -> Score:
        model = self.pruned(plan)
        if self.settings.recovery_steps:
            self._recalibrate(model, half=False)
            self._train(model)
        weights = self._prepare_layers(model)
        self._recalibrate(model, half=self.half)
        self._fold(model, weights)
        return self._measure(model, split)

    def _train(self, model: nn.Module) -> None:
        train_steps(
            model,
            self.task,
            steps=self.settings.recovery_steps,
            learning_rate=self.settings.learning_rate,
            seed=self.settings.seed,
            device=self.device,
        )

    def _recalibrate(self, model: nn.Module, *, half: bool) -> None:
        examples = self.settings.recalibration_examples
        if examples == 0:
            return
        with recalibrating(model) as needed, torch.no_grad():
            if needed:
                for inputs, _ in self._batches("calibration", examples):
                    forward(model, inputs if half else tree_map(_to_float, inputs))

    def _measure(self, model: nn.Module, split: str) -> Score:
        total, losses, count = 0.0, 0.0, 0
        with evaluating(model), torch.inference_mode():
            for inputs, targets in self._batches(split, self.settings.examples):
                outputs = tree_map(_to_float, forward(model, inputs))
                scores = self.task.score(outputs, targets)
                total += float(scores.sum())
                losses += float(self.task.loss(outputs, targets)) * len(scores)
                count += len(scores)
        return Score(total / count, losses / count, count)

    def _batches(self, split: str, examples: int) -> Iterable[tuple[Any, Any]]:
        """Batches in the layout and precision of the scored networks, prepared once if they fit in memory."""
        key = (split, examples)
        if key in self._prepared:
            return self._prepared[key]
        source = self.task.batches(
            split, batch_size=self.settings.batch_size, limit=examples, device=self.device
        )
        ready: list[tuple[Any, Any]] = []
        size = 0
        for inputs, targets in source:
            inputs = tree_map(self._prepare_input, inputs)
            size += sum(part.nbytes for part in _tensors(inputs))
            if size > CACHE_LIMIT:
                return self._stream(split, examples)
            ready.append((inputs, targets))
        self._prepared[key] = ready
        return ready

    def _stream(self, split: str, examples: int) -> Iterable[tuple[Any, Any]]:
        for inputs, targets in self.task.batches(
            split, batch_size=self.settings.batch_size, limit=examples, device=self.device
        ):
            yield tree_map(self._prepare_input, inputs), targets

    def _prepare_input(self, value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            value = value.to(torch.bfloat16 if self.half else torch.float32)
            return value.contiguous(memory_format=torch.channels_last) if value.ndim == 4 else value
        return value

    def _prepare_layers(self, model: nn.Module) -> dict[str, Tensor]:
        """Give convolutions and linear layers their layout and precision; their float32 weights by module path."""
        weights = {}
        dtype = torch.bfloat16 if self.half else torch.float32
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                weights[name] = module.weight.detach()
                _set_weight(module, module.weight.detach(), dtype)
                if module.bias is not None:
                    module.bias = nn.Parameter(module.bias.detach().to(dtype), requires_grad=False)
        return weights

    def _fold(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        """Fold batch normalisation into the convolution before it, from float32 weights."""
        modules = dict(model.named_modules())
        for conv_name, norm_name in self.network.graph.folds:
            conv, norm = modules.get(conv_name), modules.get(norm_name)
            if not isinstance(conv, nn.Conv2d) or not isinstance(norm, nn.BatchNorm2d) or norm.running_var is None:
                continue
            assert norm.running_mean is not None
            scale = torch.rsqrt(norm.running_var + norm.eps)
            if norm.weight is not None:
                scale = scale * norm.weight.detach()
            shift = -norm.running_mean * scale
            if norm.bias is not None:
                shift = shift + norm.bias.detach()
            if conv.bias is not None:
                shift = shift + conv.bias.detach().float() * scale
            dtype = conv.weight.dtype
            _set_weight(conv, weights[conv_name] * scale.view(-1, 1, 1, 1), dtype)
            conv.bias = nn.Parameter(shift.to(dtype), requires_grad=False)
            parent, _, leaf = norm_name.rpartition(".")
            setattr(modules[parent], leaf, nn.Identity())

    def _half_precision_works(self) -> bool:
        """Decide on bfloat16: asked for, or fast here and harmless to this network."""
        wanted = self.settings.precision
        if wanted == "float32" or (wanted == "auto" and not _has_fast_bfloat16(self.device)):
            return False
        inputs, _ = next(iter(self.task.batches("calibration", batch_size=8, limit=8, device=self.device)))
        try:
            with evaluating(self.network.model), torch.no_grad():
                exact = _tensors(forward(self.network.model, inputs))
                self.half = True
                model = copy.deepcopy(self.network.model)
                self._fold(model, self._prepare_layers(model))
                rough = _tensors(forward(model.eval(), tree_map(self._prepare_input, inputs)))
        except RuntimeError:  # a layer without bfloat16 support, or float32 parameters outside layers
            return False
        return all(
            float((a - b.float()).abs().max()) <= BFLOAT16_TOLERANCE * max(float(a.abs().max()), 1e-6)
            for a, b in zip(exact, rough, strict=True)
            if a.is_floating_point()
        )


def _set_weight(module: nn.Linear | nn.Conv2d, weight: Tensor, dtype: torch.dtype) -> None:
    weight = weight.to(dtype)
    if weight.ndim == 4:
        weight = weight.contiguous(memory_format=torch.channels_last)
    module.weight = nn.Parameter(weight, requires_grad=False)


def _to_float(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.bfloat16 else value


def _tensors(value: Any) -> list[Tensor]:
    found: list[Tensor] = []
    tree_map(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, value)
    return found


def _has_fast_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and bool(torch.cpu._is_avx512_bf16_supported())
