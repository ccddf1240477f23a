"""Measured latency: warmed up, with a fixed number of threads, median and quartiles, networks side by side.

Machines drift (heat, other work), so two networks are compared by running them in turn: the ratio of
neighbouring runs survives what shifts both.
"""

import copy
import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib import metadata
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.onnx_export import onnx_bytes, open_session, require_onnx, session_feeds, with_batch

BACKENDS = ("torch", "onnxruntime")
DTYPES = ("float32", "bfloat16", "float16")

#: Repeats that are made even if they exceed the time limit; quartiles of fewer say nothing.
_FEWEST_REPEATS = 5

Clock = Callable[[], float]
"""Seconds since some fixed moment."""


@dataclass(frozen=True, kw_only=True)
class LatencySettings:
    """How latency is measured.

    Raises:
        PruningError: a value is out of range, or the backend does not offer it.
    """

    batch_size: int = 1
    """Examples per run."""
    threads: int | None = None
    """Threads that work on one operation; None leaves torch's number."""
    backend: str = "torch"
    """``torch`` (eager) or ``onnxruntime``."""
    dtype: str = "float32"
    """Of weights and inputs; ONNX Runtime takes float32 only."""
    device: str = "cpu"
    """A torch device; ONNX Runtime takes ``cpu`` only."""
    repeats: int = 50
    """Timed runs of each network."""
    warmup: int = 5
    """Runs before that, which are not timed."""
    time_limit: float = 20.0
    """Seconds after which no further repeat begins (but a few are always made)."""

    def __post_init__(self) -> None:
        for name, smallest in (("batch_size", 1), ("repeats", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise PruningError(f"`{name}` should be at least {smallest}. Received {value}.")
        if not self.time_limit > 0:
            raise PruningError(f"`time_limit` should be above 0 seconds. Received {self.time_limit}.")
        for name, choices in (("backend", BACKENDS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise unknown_name(name, getattr(self, name), choices)
        if self.backend == "onnxruntime" and (self.device, self.dtype) != ("cpu", "float32"):
            raise PruningError(
                "`backend` onnxruntime should be used with device cpu and dtype float32. Received device "
                f"{self.device} and dtype {self.dtype}. Use backend torch for these."
            )


@dataclass(frozen=True)
class Latency:
    """Latency of one network: seconds per run."""

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int
    settings: LatencySettings
    """With the number of threads that was in force."""
    device_name: str
    samples: tuple[float, ...] = ()
    """Seconds of every run, in order; those of networks measured side by side belong together."""

    @classmethod
    def from_samples(cls, samples: list[float], settings: LatencySettings) -> "Latency":
        """Summarise timed runs, in seconds."""
        lower, median, upper = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        name = device_name(settings.device)
        return cls(median, lower, upper, len(samples), settings, name, tuple(samples))

    def describe(self) -> str:
        """Say what was measured, on what, and how much it varied."""
        quartiles = f"quartiles {1e3 * self.lower_quartile:.3g} to {1e3 * self.upper_quartile:.3g}"
        return f"{1e3 * self.median:.3g} ms ({quartiles}, {self.repeats} runs; {self.conditions})"

    @property
    def conditions(self) -> str:
        """Device, runtime, threads, batch size and data type."""
        settings = self.settings
        threads = f", {settings.threads} thread{'' if settings.threads == 1 else 's'}"
        return (
            f"{self.device_name}, {_runtime(settings.backend)}{threads if settings.device == 'cpu' else ''}, "
            f"batch {settings.batch_size}, {settings.dtype}"
        )

    def to_json(self) -> dict[str, Any]:
        """The summary in what JSON holds, without the single runs."""
        return {
            "median_seconds": self.median,
            "lower_quartile_seconds": self.lower_quartile,
            "upper_quartile_seconds": self.upper_quartile,
            "repeats": self.repeats,
            **device_fingerprint(self.settings),
        }


def measure_latency(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    settings: LatencySettings | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> Latency:
    """Measure one network; :func:`compare_latency` takes the same arguments."""
    return compare_latency({"network": model}, example_inputs, settings, clock=clock)["network"]


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...],
    settings: LatencySettings | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Measure networks side by side: one run of each in turn, over and over.

    Args:
        models: networks by name. They run as copies in eval mode and are not changed.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``; repeated
            or cut to the batch size asked for.
        settings: how to measure; by default one example on the CPU with torch's number of threads.
        clock: gives seconds; tests bring their own.

    Returns:
        The latency of each network, by name.

    Raises:
        PruningError: a network does not run (or export) on these inputs, or the device or runtime is not
        there.
    """
    settings = settings or LatencySettings()
    samples: dict[str, list[float]] = {name: [] for name in models}
    with _threads(settings.threads) as threads:
        settings = replace(settings, threads=threads)
        inputs = with_batch(example_inputs, settings.batch_size)
        runners = {name: _runner(name, model, inputs, settings) for name, model in models.items()}
        with torch.inference_mode(), _no_garbage_collection():
            for _ in range(settings.warmup):
                for run in runners.values():
                    run()
            start = clock()
            for done in range(settings.repeats):
                if done >= _FEWEST_REPEATS and clock() - start > settings.time_limit:
                    break
                for name, run in runners.items():
                    before = clock()
                    run()
                    samples[name].append(clock() - before)
    return {name: Latency.from_samples(times, settings) for name, times in samples.items()}


def speed_up(before: Latency, after: Latency) -> tuple[float, str]:
    """How many times faster the second network is, and what can honestly be said about it.

    Args:
        before: latency of the unpruned network.
        after: latency of the pruned network, from the same :func:`compare_latency`.

    Returns:
        The median ratio of neighbouring runs (above 1 is faster), and a sentence. The sentence claims a
        difference only if the quartiles of the ratios lie on one side of 1.

    Raises:
        PruningError: the two were not measured side by side.
    """
    if not before.samples or len(before.samples) != len(after.samples) or before.settings != after.settings:
        raise PruningError(
            "`after` should be measured side by side with `before`. Received measurements of "
            f"{len(before.samples)} and {len(after.samples)} runs, made under "
            f"{'the same' if before.settings == after.settings else 'different'} settings. Use one "
            "compare_latency for both."
        )
    # a clock too coarse for a tiny network may show no time at all
    floor = np.finfo(np.float64).tiny
    ratios = np.maximum(before.samples, floor) / np.maximum(after.samples, floor)
    lower, ratio, upper = np.quantile(ratios, (0.25, 0.5, 0.75)).tolist()
    spread = f"quartiles {lower:.3g} to {upper:.3g}, {len(ratios)} paired runs; {after.conditions}"
    if lower > 1:
        return ratio, f"{ratio:.3g} times as fast as before ({spread})."
    if upper < 1:
        return ratio, f"Slower than before: {ratio:.3g} times as fast ({spread})."
    return ratio, f"No measurable speed-up: {ratio:.3g} times as fast ({spread})."


def device_fingerprint(settings: LatencySettings) -> dict[str, str | int]:
    """What a measured latency depends on besides the network.

    The number of threads is the one that would be used.
    """
    return {
        "device": settings.device,
        "device_name": device_name(settings.device),
        "threads": settings.threads or torch.get_num_threads(),
        "torch": str(torch.__version__),
        "backend": settings.backend,
        "runtime": _runtime(settings.backend),
        "batch_size": settings.batch_size,
        "dtype": settings.dtype,
    }


def device_name(device: str) -> str:
    """Name the card behind a torch device, or the processor as the system does."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    if not device.startswith("cpu"):
        return device
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def _runtime(backend: str) -> str:
    """Name of the runtime with its version."""
    if backend == "torch":
        return f"torch {torch.__version__}"
    try:
        return f"onnxruntime {metadata.version('onnxruntime')}"
    except metadata.PackageNotFoundError:
        return "onnxruntime"  # other builds of it have other names


@contextmanager
def _threads(threads: int | None) -> Iterator[int]:
    """Set torch's number of threads for a while; yields the number in force."""
    before = torch.get_num_threads()
    if threads is None or threads == before:
        yield before
        return
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Keep Python's collector from running inside a timed run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _runner(
    name: str, model: nn.Module, inputs: tuple[Any, ...], settings: LatencySettings
) -> Callable[[], object]:
    """What is timed, after one run that shows that it works."""
    prepare = _onnx_runner if settings.backend == "onnxruntime" else _torch_runner
    try:
        with torch.no_grad():
            run = prepare(model, inputs, settings)
            run()
    except PruningError:
        raise
    except Exception as fault:  # whatever the network, the device or the runtime may raise
        reason = (str(fault).splitlines() or [""])[0]
        raise PruningError(
            f"`models` should run on the example inputs with batch size {settings.batch_size}, "
            f"{settings.dtype}, on {settings.device}. Received {name}, which raised {type(fault).__name__}: "
            f"{reason} Give inputs of the shape that the network takes, or other settings."
        ) from fault
    return run


def _torch_runner(
    model: nn.Module, inputs: tuple[Any, ...], settings: LatencySettings
) -> Callable[[], object]:
    device, dtype = torch.device(settings.device), getattr(torch, settings.dtype)
    twin = copy.deepcopy(model).to(device=device, dtype=dtype).eval()
    moved = tree_map_only(
        Tensor, lambda leaf: leaf.to(device, dtype if leaf.is_floating_point() else leaf.dtype), inputs
    )
    if device.type == "cpu":
        return lambda: twin(*moved)

    def run_and_wait() -> None:
        twin(*moved)
        torch.accelerator.synchronize(device)

    return run_and_wait


def _onnx_runner(
    model: nn.Module, inputs: tuple[Any, ...], settings: LatencySettings
) -> Callable[[], object]:
    require_onnx()
    inputs = tree_map_only(
        Tensor, lambda leaf: leaf.cpu().float() if leaf.is_floating_point() else leaf.cpu(), inputs
    )
    data = onnx_bytes(copy.deepcopy(model).float().cpu().eval(), inputs)
    session = open_session(data, settings.threads or torch.get_num_threads())
    feeds = session_feeds(session, inputs)
    return lambda: session.run(None, feeds)
