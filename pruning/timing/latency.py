"""Measured latency: warmed up, with a fixed number of threads, median and quartiles, networks side by side.

Machines drift (heat, other work), so networks are measured in turns: each runs a few times before the next one does,
over and over, and the ratio of neighbouring turns survives what shifts both. The first run of a turn is not timed: it
brings back to the caches what the other networks drove out, as in a program that runs one network.
"""

from __future__ import annotations

import gc
import platform
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.errors import PruningError, unknown_name
from prunegym.pruning.timing.runtimes import DTYPES, RUNTIMES, Opener, Run, runtime_named, wait_for

#: Turns that are made even if they exceed the time limit; quartiles of fewer say nothing.
_FEWEST_TURNS = 5
#: Turns that networks take before they are loaded afresh, at least, if so many are made in the time.
_TURNS_PER_SESSION = 5
#: Times that each network is loaded for a measurement, at most.
_SESSIONS = 10
#: Timed runs of one turn, whose median counts.
_RUNS_PER_TURN = 3
#: Seconds of a run above which a turn is one run: refilling the caches is no part of it that can be seen.
_LONG_RUN = 0.05
#: Change from the first third of the turns to the last that is called a drift, if it is beyond the quartiles too.
_DRIFT = 0.05

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
    """``torch`` (eager), ``compile`` (torch.compile), ``onnxruntime`` or ``openvino``."""
    dtype: str = "float32"
    """Of weights and inputs: ``float32``, ``bfloat16`` or ``float16``, where the backend takes it."""
    device: str = "cpu"
    """A torch device; ONNX Runtime takes ``cpu`` and ``cuda``, OpenVINO ``cpu``."""
    repeats: int = 50
    """Turns of each network."""
    warmup: int = 5
    """Runs before that, which are not timed."""
    time_limit: float = 20.0
    """Seconds after which no further turn begins (but a few are always made)."""

    def __post_init__(self) -> None:
        for name, smallest in (("batch_size", 1), ("repeats", 1), ("warmup", 0), ("threads", 1)):
            value = getattr(self, name)
            if value is not None and value < smallest:
                raise PruningError(f"`{name}` should be at least {smallest}. Received {value}.")
        if not self.time_limit > 0:
            raise PruningError(f"`time_limit` should be above 0 seconds. Received {self.time_limit}.")
        if self.dtype not in DTYPES:
            raise unknown_name("dtype", self.dtype, DTYPES)
        if not runtime_named(self.backend).accepts(self.device, self.dtype):
            able = [name for name, one in RUNTIMES.items() if one.accepts(self.device, self.dtype)]
            raise PruningError(
                f"`backend` {self.backend} should be used with a device and a data type that it takes. Received device "
                f"{self.device} and dtype {self.dtype}. Use float32 on the CPU, or for these backend "
                f"{' or '.join(able)}."
            )


@dataclass(frozen=True)
class Latency:
    """Latency of one network: seconds per run."""

    median: float
    lower_quartile: float
    upper_quartile: float
    repeats: int
    """Turns."""
    settings: LatencySettings
    """With the number of threads that was in force."""
    device_name: str
    samples: tuple[float, ...] = ()
    """Seconds per run of every turn, in order; those of networks measured side by side belong together."""
    sessions: tuple[int, ...] = ()
    """How many of the turns each session had, in order: the network was loaded once for them."""

    @classmethod
    def from_samples(cls, samples: list[float], settings: LatencySettings, sessions: Sequence[int] = ()) -> Latency:
        """Summarise timed turns, in seconds.

        Args:
            samples: seconds per run of every turn, in order.
            settings: with the number of threads that was in force.
            sessions: how many of the turns each session had; by default as many as it usually has.
        """
        lower, middle, upper = np.quantile(samples, (0.25, 0.5, 0.75)).tolist()
        name = device_name(settings.device)
        known = tuple(sessions) or _usual_sessions(len(samples))
        return cls(middle, lower, upper, len(samples), settings, name, tuple(samples), known)

    @property
    def drift(self) -> float:
        """How much slower the last third of the turns was than the first, as a share; 0 if within the quartiles."""
        third = len(self.samples) // 3
        if third < 3:
            return 0.0
        change = median(self.samples[-third:]) - median(self.samples[:third])
        noticed = abs(change) > max(_DRIFT * self.median, self.upper_quartile - self.lower_quartile)
        return change / median(self.samples[:third]) if noticed else 0.0

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
        """The summary in what JSON holds, without the single turns."""
        return {
            "median_seconds": self.median,
            "lower_quartile_seconds": self.lower_quartile,
            "upper_quartile_seconds": self.upper_quartile,
            "repeats": self.repeats,
            "sessions": list(self.sessions),
            "drift": self.drift,
            **device_fingerprint(self.settings),
        }


def _usual_sessions(turns: int) -> tuple[int, ...]:
    """Turns of the sessions of a measurement that is only known to have so many."""
    whole, rest = divmod(turns, _TURNS_PER_SESSION)
    return (_TURNS_PER_SESSION,) * whole + ((rest,) if rest else ())


def drifted(change: float) -> str:
    """A drift in words."""
    return f"the last third of the turns took {abs(change):.0%} {'longer' if change > 0 else 'less'} than the first"


def compare_latency(
    models: Mapping[str, nn.Module],
    example_inputs: Tensor | tuple[Any, ...],
    settings: LatencySettings | None = None,
    *,
    clock: Clock = time.perf_counter,
) -> dict[str, Latency]:
    """Measure networks side by side: a few runs of each in turn, over and over.

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
    with ready_to_measure(settings or LatencySettings()) as known:
        inputs = with_batch(example_inputs, known.batch_size)
        prepared = {name: prepare(name, model, inputs, known) for name, model in models.items()}
        return take_turns_in_sessions(prepared, known, clock)


@contextmanager
def ready_to_measure(settings: LatencySettings) -> Iterator[LatencySettings]:
    """Lock the number of threads for a while; yields the settings with the number in force.

    Raises:
        PruningError: the runtime is not there.
    """
    runtime_named(settings.backend).require()
    with _threads(settings.threads) as threads:
        yield replace(settings, threads=threads)


def take_turns_in_sessions(
    openers: Mapping[str, Opener], settings: LatencySettings, clock: Clock = time.perf_counter
) -> dict[str, Latency]:
    """Load the networks a few times, and let them take part of their turns each time.

    Where the memory of a network happens to lie makes it faster or slower for as long as it is loaded, which no number
    of turns averages out. Slow networks take fewer turns in a session, fast ones more where many are asked for.

    Args:
        openers: from :func:`prepare`.
        settings: how many turns in all, and for how long; from :func:`ready_to_measure`.
        clock: gives seconds.

    Returns:
        The latency of each network, by name.
    """
    samples: dict[str, list[float]] = {name: [] for name in openers}
    lengths: list[int] = []
    sessions = max(1, min(_SESSIONS, settings.repeats // _TURNS_PER_SESSION))
    warmup, fewest = -(-settings.warmup // sessions), -(-_FEWEST_TURNS // sessions)
    for number in range(sessions):
        turns = settings.repeats * (number + 1) // sessions - settings.repeats * number // sessions
        part = replace(settings, warmup=warmup, repeats=turns, time_limit=settings.time_limit / sessions)
        runs = {name: opener() for name, opener in openers.items()}
        for name, times in take_turns(runs, part, clock, fewest=fewest).items():
            samples[name] += times
        # all networks take as many turns
        lengths.append(max(map(len, samples.values()), default=0) - sum(lengths))
    return {name: Latency.from_samples(times, settings, lengths) for name, times in samples.items()}


@torch.inference_mode()
def take_turns(
    runs: Mapping[str, Run],
    settings: LatencySettings,
    clock: Clock = time.perf_counter,
    *,
    fewest: int = _FEWEST_TURNS,
) -> dict[str, list[float]]:
    """Warm up, then let each network take its turns.

    Args:
        runs: of networks that are loaded.
        settings: how many turns, and for how long.
        clock: gives seconds.
        fewest: turns that are made even if they exceed the time.

    Returns:
        Seconds per run of each turn, by network.
    """
    with _no_garbage_collection():
        return _turns(runs, settings, clock, fewest)


def _turns(runs: Mapping[str, Run], settings: LatencySettings, clock: Clock, fewest: int) -> dict[str, list[float]]:
    longest = 0.0
    for _ in range(settings.warmup):
        longest = max(_seconds(run, clock) for run in runs.values())
    timed, untimed = (1, 0) if longest > _LONG_RUN else (_RUNS_PER_TURN, 1)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    start = clock()
    for done in range(settings.repeats):
        if done >= fewest and clock() - start > settings.time_limit:
            break
        for name, run in runs.items():
            for _ in range(untimed):
                run()
            samples[name].append(median(_seconds(run, clock) for _ in range(timed)))
    return samples


def waiting_clock(device: str, clock: Clock = time.perf_counter) -> Clock:
    """A clock that is read when a device has done what it was asked."""

    def now() -> float:
        wait_for(device)
        return clock()

    return now


def _seconds(run: Run, clock: Clock) -> float:
    before = clock()
    run()
    return clock() - before


def prepare(name: str, model: nn.Module, inputs: tuple[Any, ...], settings: LatencySettings) -> Opener:
    """Make a network ready to be loaded; what is loaded is run once, which shows that it works.

    Args:
        name: of the network, for errors.
        model: the network.
        inputs: of the batch size wanted.
        settings: how to run it.

    Raises:
        PruningError: it does not run.
    """
    with refusing(name, settings), torch.no_grad():
        opener = runtime_named(settings.backend).prepare(model, inputs, settings)

    def open_and_run() -> Run:
        with refusing(name, settings):
            with torch.no_grad():
                run = opener()
            with torch.inference_mode():  # as it is timed: torch.compile compiles for the mode that it sees
                run()
        return run

    return open_and_run


@contextmanager
def refusing(name: str, settings: LatencySettings) -> Iterator[None]:
    """Say of which network and under which settings something failed.

    Args:
        name: of the network.
        settings: that it was to run under.

    Raises:
        PruningError: in place of whatever the network, the device or the runtime raised.
    """
    try:
        yield
    except PruningError:
        raise
    except Exception as fault:
        reason = (str(fault).splitlines() or [""])[0]
        raise PruningError(
            f"`models` should run on the example inputs with batch size {settings.batch_size}, "
            f"{settings.dtype}, on {settings.device} in {settings.backend}. Received {name}, which raised "
            f"{type(fault).__name__}: {reason} Give inputs of the shape that the network takes, or other settings."
        ) from fault


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
    return processor_name() if device.startswith("cpu") else device


def processor_name() -> str:
    """Name the processor as the system does."""
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
    version = runtime_named(backend).version
    return f"{'torch.compile' if backend == 'compile' else backend} {version}".rstrip()


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
