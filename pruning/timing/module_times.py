"""Where the time of a network goes: the seconds of each of its modules, taken while the whole network runs.

PyTorch only, in eval mode. A module's time is its own, without that of the modules inside it; what a block computes
between its modules (sums, activations written as functions, reshapes) is the block's own. Reading the clock takes time
too, for each module, which counts as the surrounding block's.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.timing.latency import Clock, LatencySettings, ready_to_measure, waiting_clock
from prunegym.pruning.timing.runtimes import on_device

BETWEEN = "between modules"
"""Kind of what blocks compute themselves."""

#: Runs that are timed at most, and seconds after which no further one begins: shares need less than speed-ups do.
_REPEATS, _SECONDS, _FEWEST = 30, 10.0, 5
_NORMS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
_POOLS: tuple[type[nn.Module], ...] = (
    nn.modules.pooling._MaxPoolNd,
    nn.modules.pooling._AvgPoolNd,
    nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd,
)


@dataclass(frozen=True)
class ModuleTime:
    """The time that one module takes for itself in a run of its network."""

    module: str
    """Path; empty for the network itself."""
    kind: str
    seconds: float
    """Median over the runs; all calls of a run together."""


@dataclass(frozen=True)
class TimeProfile:
    """Where the time of one network goes."""

    seconds: float
    """Median of a whole run, the reading of clocks included."""
    modules: tuple[ModuleTime, ...]
    """In the order in which they first finish."""
    kinds: dict[str, float]
    """Seconds per run by kind of module, longest first: sums over the modules."""
    repeats: int

    def to_json(self) -> dict[str, Any]:
        """The profile in what JSON holds."""
        return {
            "seconds": self.seconds,
            "repeats": self.repeats,
            "kinds": dict(self.kinds),
            "modules": [vars(one) for one in self.modules],
        }


def compare_module_times(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...],
    settings: LatencySettings | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, TimeProfile]:
    """Time the modules of networks side by side: one run of each in turn, over and over.

    Args:
        models: Networks by name. They run as copies in eval mode and are not changed.
        example_inputs: A tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``; repeated or cut
            to the batch size asked for.
        settings: Batch size, threads, data type, device, warm-up and repeats; the backend does not matter.
        clock: Gives seconds; tests bring their own.

    Returns:
        The profile of each network, by name.
    """
    settings = replace(settings or LatencySettings(), backend="torch")
    inputs = with_batch(example_inputs, settings.batch_size)
    now = waiting_clock(settings.device, clock)
    timers = {name: _Timer(*on_device(one, inputs, settings), now) for name, one in models.items()}
    repeats, limit = min(settings.repeats, _REPEATS), min(settings.time_limit, _SECONDS)
    with ready_to_measure(settings), torch.inference_mode():
        for _ in range(settings.warmup):
            for timer in timers.values():
                timer.model(*timer.inputs)
        start = time.perf_counter()
        for done in range(repeats):
            if done >= _FEWEST and time.perf_counter() - start > limit:
                break
            for timer in timers.values():
                timer.run()
    return {name: timer.profile() for name, timer in timers.items()}


class _Timer:
    """A network with hooks on its modules.

    Args:
        model: The network; it keeps the hooks.
        inputs: Its own.
        now: Gives seconds, once the device has done what it was asked.
    """

    def __init__(self, model: nn.Module, inputs: tuple[Any, ...], now: Clock) -> None:
        self.model, self.inputs = model, inputs
        self._now = now
        self._open: list[list[float]] = []  # of each module that is running: when it began, seconds of those inside
        self._run: dict[str, float] | None = None
        self.runs: list[dict[str, float]] = []
        self.totals: list[float] = []
        self._kinds: dict[str, str] = {}
        for path, module in model.named_modules():
            self._kinds[path] = kind_of(module)
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave(path))

    def run(self) -> None:
        """One timed run."""
        self._run = defaultdict(float)
        self._open = [[0.0, 0.0]]
        self.model(*self.inputs)
        self.totals.append(self._open[0][1])
        self.runs.append(self._run)
        self._run = None

    def profile(self) -> TimeProfile:
        """What the runs came to."""
        paths = list(dict.fromkeys(path for run in self.runs for path in run))
        modules = tuple(
            ModuleTime(path, self._kinds[path], float(np.median([run.get(path, 0.0) for run in self.runs])))
            for path in paths
        )
        # sums of medians, not medians of sums: on a busy machine every run is held up somewhere, each elsewhere
        kinds: dict[str, float] = defaultdict(float)
        for one in modules:
            kinds[one.kind] += one.seconds
        longest = dict(sorted(kinds.items(), key=lambda item: -item[1]))
        return TimeProfile(float(np.median(self.totals)), modules, longest, len(self.runs))

    def _enter(self, _module: nn.Module, _inputs: Any) -> None:
        if self._run is not None:
            self._open.append([self._now(), 0.0])

    def _leave(self, path: str) -> Callable[..., None]:
        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            if self._run is not None:
                began, inside = self._open.pop()
                elapsed = self._now() - began
                self._run[path] += elapsed - inside
                self._open[-1][1] += elapsed

        return leave


def kind_of(module: nn.Module) -> str:
    """What a module does, in a word or two; blocks that only call others are :data:`BETWEEN`."""
    if isinstance(module, nn.modules.conv._ConvNd):
        if module.groups > 1 and module.groups == module.in_channels:
            return "depthwise convolution"
        return "1×1 convolution" if max(module.kernel_size) == 1 else "convolution"
    if isinstance(module, nn.Linear):
        return "linear"
    if isinstance(module, nn.MultiheadAttention):
        return "attention"
    if isinstance(module, _NORMS):
        return "normalisation"
    if isinstance(module, _POOLS):
        return "pooling"
    if type(module).__module__ == nn.modules.activation.__name__:
        return "activation"
    return BETWEEN if any(True for _ in module.children()) else "other modules"
