"""How long each operation takes inside a running network, where caches, fusion and memory layouts are what they are.

What follows an operation until the next one begins (activations, sums, changes of memory layout) is counted with it.
ONNX Runtime and OpenVINO keep the time of every node of their graph themselves; networks in torch are watched with
hooks on the modules of the operations.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from prunegym.pruning.deployment.onnx_export import on_cpu, onnx_bytes, open_session
from prunegym.pruning.graph import Operation
from prunegym.pruning.timing.latency import Clock, LatencySettings, prepare, refusing, waiting_clock
from prunegym.pruning.timing.onnx_names import named_after_operations, operation_of
from prunegym.pruning.timing.runtimes import Run, compile_openvino, on_device, session_run

Floats = NDArray[np.float64]

#: What errors call a network that is watched.
_NAME = "network"
#: Of the runs of an operation the one that counts: interruptions only ever add time.
QUANTILE = 0.25


@dataclass(frozen=True)
class Profile:
    """Seconds of each operation with what follows it ``(operations,)``."""

    seconds: Floats
    events: NDArray[np.int64]
    """Moments at which time was taken for each operation ``(operations,)``: what that costs was timed with them."""


@dataclass(frozen=True)
class Probe:
    """A network made ready to be measured as a whole and in parts."""

    run: Run
    profile: Callable[[int], Profile]
    """Runs the network so many times, watched."""


@dataclass(frozen=True)
class Widths:
    """Input and output channels of each operation of a pruned network ``(operations,)``."""

    inputs: NDArray[np.int64]
    """That each output reads."""
    outputs: NDArray[np.int64]


def make_probe(
    model: nn.Module,
    operations: Sequence[Operation],
    widths: Widths,
    inputs: tuple[Any, ...],
    settings: LatencySettings,
) -> Probe:
    """Make a network ready.

    Args:
        model: the network, pruned or not; it is not changed.
        operations: of the unpruned network.
        widths: of the operations in this network.
        inputs: of the batch size wanted.
        settings: runtime, device, data type and threads.

    Raises:
        PruningError: the network does not run, or the runtime is not there.
    """
    with refusing(_NAME, settings):
        probe = _PROBES.get(settings.backend, _torch_probe)(model, operations, widths, inputs, settings)
        with torch.inference_mode():  # as it is timed
            probe.run()

    def profile(runs: int) -> Profile:
        with refusing(_NAME, settings):
            return probe.profile(runs)

    return Probe(probe.run, profile)


# ---- torch


def _torch_probe(
    model: nn.Module,
    operations: Sequence[Operation],
    widths: Widths,
    inputs: tuple[Any, ...],
    settings: LatencySettings,
) -> Probe:
    # compiled code cannot be looked into; how its time divides is taken from the same network in eager mode
    twin, moved = on_device(model, inputs, settings)
    now = waiting_clock(settings.device)

    def profile(runs: int) -> Profile:
        tables = []
        with torch.inference_mode():
            for _ in range(runs):
                with _marks(twin, operations, now) as marks:
                    twin(*moved)
                    end = now()
                tables.append(_between(marks, end, len(operations)))
        seconds = np.quantile(np.array([row for row, _ in tables]), QUANTILE, axis=0)
        return Profile(seconds, tables[-1][1])

    return Probe(prepare(_NAME, model, inputs, settings)(), profile)


@contextmanager
def _marks(model: nn.Module, operations: Sequence[Operation], now: Clock) -> Iterator[list[tuple[int, float]]]:
    """Note the moment at which each operation begins, as its number and a time."""
    waiting: dict[str, list[int]] = {}
    for number, one in enumerate(operations):
        waiting.setdefault(_module_of(one), []).append(number)
    modules = dict(model.named_modules())
    marks: list[tuple[int, float]] = []

    def hook(numbers: list[int]) -> Callable[..., None]:
        left = iter(numbers)  # a module that runs several times, or holds several operations, begins them in order

        def mark(*_: Any) -> None:
            if (number := next(left, None)) is not None:
                marks.append((number, now()))

        return mark

    handles = [
        modules[path].register_forward_pre_hook(hook(numbers)) for path, numbers in waiting.items() if path in modules
    ]
    try:
        yield marks
    finally:
        for handle in handles:
            handle.remove()


def _module_of(one: Operation) -> str:
    """Path of the module that holds the weight, or that runs the operation."""
    return one.module if one.weight is None else one.weight.rpartition(".")[0]


def _between(marks: Sequence[tuple[int, float]], end: float, operations: int) -> tuple[Floats, NDArray[np.int64]]:
    """Seconds from the beginning of each operation to that of the next, and how many moments were noted."""
    seconds, events = np.zeros(operations), np.zeros(operations, dtype=np.int64)
    for (number, start), (_, stop) in zip(marks, [*marks[1:], (-1, end)], strict=True):
        seconds[number] += stop - start
        events[number] += 1
    return seconds, events


# ---- ONNX Runtime and OpenVINO


def _onnxruntime_probe(
    model: nn.Module,
    operations: Sequence[Operation],
    widths: Widths,
    inputs: tuple[Any, ...],
    settings: LatencySettings,
) -> Probe:
    threads = settings.threads or torch.get_num_threads()
    placed, data = _exported(model, operations, widths, inputs, half=settings.dtype == "float16")
    session = open_session(data, threads, device=settings.device)

    def profile(runs: int) -> Profile:
        with TemporaryDirectory() as folder:
            watched = open_session(data, threads, device=settings.device, profile=Path(folder) / "nodes")
            run = session_run(watched, placed, settings.device)
            for _ in range(runs):
                run()
            events = json.loads(Path(watched.end_profiling()).read_text())
        nodes: dict[str, list[float]] = {}
        for event in events:
            if event.get("cat") == "Node" and event["name"].endswith(_KERNEL):
                nodes.setdefault(event["name"].removesuffix(_KERNEL), []).append(1e-6 * event["dur"])
        return _by_operation(list(nodes.items()), len(operations))

    return Probe(session_run(session, placed, settings.device), profile)


_KERNEL = "_kernel_time"
#: Means of so many groups of runs are told apart in OpenVINO.
_BLOCKS = 4


def _openvino_probe(
    model: nn.Module,
    operations: Sequence[Operation],
    widths: Widths,
    inputs: tuple[Any, ...],
    settings: LatencySettings,
) -> Probe:
    placed, data = _exported(model, operations, widths, inputs)
    run, _ = compile_openvino(data, placed, settings)

    def profile(runs: int) -> Profile:
        watched, request = compile_openvino(data, placed, settings, watched=True)
        # OpenVINO tells means over all runs so far: those of a few runs follow from two of them
        totals: list[dict[str, float]] = []
        block = max(1, runs // _BLOCKS)
        for number in range(1, _BLOCKS + 2):  # the first runs prepare, and do not count
            for _ in range(block):
                watched()
            done = [node for node in request.profiling_info if node.status == node.Status.EXECUTED]
            totals.append({one.node_name: number * block * one.real_time.total_seconds() for one in done})
        # a node whose mean is below a microsecond so far is not said to be executed
        means = {
            name: [max(0.0, (b.get(name, 0.0) - a.get(name, 0.0)) / block) for a, b in pairwise(totals)]
            for name in max(totals, key=len)
        }
        return _by_operation(list(means.items()), len(operations))

    return Probe(run, profile)


_PROBES = {"onnxruntime": _onnxruntime_probe, "openvino": _openvino_probe}
"""Makers of probes, for runtimes that tell the time of every node."""


def _exported(
    model: nn.Module,
    operations: Sequence[Operation],
    widths: Widths,
    inputs: tuple[Any, ...],
    *,
    half: bool = False,
) -> tuple[tuple[Any, ...], bytes]:
    """Inputs, and an ONNX file whose nodes are named after the operations."""
    twin, placed = on_cpu(model, inputs, torch.float16 if half else torch.float32)
    data = onnx_bytes(twin, placed, quick=True)
    return placed, named_after_operations(data, operations, widths.inputs, widths.outputs)


def _by_operation(nodes: Sequence[tuple[str, list[float]]], operations: int) -> Profile:
    """Add up nodes, in the order in which they ran, by the operation that they belong to or follow."""
    seconds, events, current = np.zeros(operations), np.zeros(operations, dtype=np.int64), 0
    for name, samples in nodes:
        own = operation_of(name)
        current = current if own is None else own
        seconds[current] += np.quantile(samples, QUANTILE)
        events[current] += 1
    return Profile(seconds, events)
