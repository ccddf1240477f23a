"""Latency of any plan without building it, learned from a few dozen networks of random widths that were measured.

What is measured is not layers alone but whole networks, in which every operation runs as it does in a pruned one:
fused, on the memory layout that its neighbours leave, with the caches as they are. How far the table is off on plans
that it has not seen is measured too, see :meth:`LatencyTable.check`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares
from tqdm import tqdm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import read_json, write_json
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import Latency, LatencySettings, device_fingerprint
from prunegym.pruning.timing.latency_samples import RealSampler, Sample, Sampler, draw_counts, random_counts
from prunegym.pruning.timing.operation_model import OperationModel, batch_of
from prunegym.pruning.timing.speed_up import Reference, speed_up

FORMAT = 2

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

SAMPLES = 32
"""Networks that a table is learned from; a quarter of that where each is compiled, which takes far longer."""
_FEWEST = 4
#: Relative error of a whole network beyond which it counts as an exception.
_NOISE = 0.02
#: Share of the unpruned network's MACs that held-out plans keep.
HELD_OUT_MACS = (0.25, 0.9)

Ratio = Callable[[PruningPlan], float]
"""Latency of a plan's network as a share of the unpruned one's."""


@dataclass(frozen=True)
class TableError:
    """How far a table was off on plans that it was not learned from."""

    errors: tuple[float, ...]
    """Of each plan: predicted over measured latency, minus 1. Both are shares of the unpruned network's, which ran
    beside it."""
    seed: int
    """That the plans were drawn with."""

    @property
    def median(self) -> float:
        """Median of the absolute errors."""
        return float(np.median(np.abs(self.errors)))

    @property
    def p95(self) -> float:
        """95th percentile of the absolute errors."""
        return float(np.quantile(np.abs(self.errors), 0.95))

    def describe(self) -> str:
        """Both in words."""
        percentile = f"{self.p95:.1%} in the 95th percentile of {len(self.errors)} random plans"
        return f"off by {self.median:.1%} in the median and {percentile}"


class LatencyTable:
    """Predicts the latency of plans of one network, on one device, under one set of settings.

    Make one with :meth:`measure`, or :meth:`load` one.

    Args:
        network: the network.
        settings: what was measured.
        fingerprint: device and settings at the time of measuring.
        samples: networks that were measured, the unpruned one first.
        error: on other plans, if it was measured.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        settings: LatencySettings,
        fingerprint: Mapping[str, str | int],
        samples: Sequence[Sample],
        error: TableError | None = None,
    ) -> None:
        self.settings = settings
        self.fingerprint = dict(fingerprint)
        self.samples = tuple(samples)
        self.error = error
        self.network = network
        self._reference: Reference | None = None
        counts = np.array([one.counts for one in samples])
        self._model = OperationModel(
            network,
            settings.batch_size,
            counts,
            np.array([one.operations for one in samples]),
        )
        parts = np.array([self._model.seconds(one).sum() for one in counts])
        self._scale, self.fixed = _whole_from_parts(parts, np.array([one.seconds for one in samples]))
        self._best = fastest_widths(self._model, network.graph.sizes)
        self.measured = float(samples[0].seconds)
        """Measured latency of the unpruned network, seconds per run."""
        self.full = self.latency(network.graph.sizes)
        """Predicted latency of the unpruned network, which budgets are shares of."""

    def prediction(self, counts: Counts) -> float:
        """Seconds per run that a network with these counts ``(groups,)`` will take.

        Kernels like some widths better than others, so it may fall where a group keeps more channels.
        """
        return float(self.operation_latency(counts).sum()) + self.fixed

    def latency(self, counts: Counts) -> float:
        """Seconds per run of the fastest network with these counts ``(groups,)`` or with wider groups.

        That is what budgets are about. It stays the same while a group grows to a width that the runtime likes, so a
        plan that takes all that it may for nothing has such widths, and its :meth:`prediction` is the same. Where it
        falls when a count rises, it is by the errors of what was learned.
        """
        return self.prediction(self._widened(counts))

    def _widened(self, counts: Counts) -> Counts:
        """Counts of each group raised to where the network is fastest, if it is faster there than with fewer."""
        return np.array([choices[count] for choices, count in zip(self._best, counts.tolist(), strict=True)])

    def operation_latency(self, counts: Counts) -> Floats:
        """Predicted seconds of each operation and what follows it ``(operations,)``.

        Together with :attr:`fixed` they add up to :meth:`prediction`.
        """
        return self._scale * self._model.seconds(counts)

    @classmethod
    def measure(
        cls,
        network: PrunableNetwork,
        settings: LatencySettings | None = None,
        *,
        progress: bool = True,
        cache: Path | None = None,
        samples: int | None = None,
        held_out: int = 0,
        sampler: Sampler | None = None,
    ) -> LatencyTable:
        """Measure networks of random widths, and learn from them.

        Args:
            network: the network; it is not changed.
            settings: how to measure.
            progress: show a progress bar on standard error.
            cache: a folder for tables. One that was measured for the same network, on the same device and
                under the same settings, is read instead of measuring; a new one is kept there.
            samples: networks to measure; by default :data:`SAMPLES`.
            held_out: other plans to measure, for :attr:`error`, unless that was done with as many.
            sampler: measures them; tests bring their own.

        Raises:
            PruningError: a network does not run under the settings, or the cached file is damaged.
        """
        settings = settings or LatencySettings()
        amount = samples or (SAMPLES if settings.backend != "compile" else SAMPLES // 4)
        if amount < _FEWEST:
            raise PruningError(f"`samples` should be at least {_FEWEST}. Received {samples}.")
        batch_of(network)
        fingerprint = device_fingerprint(settings)
        path = cache and cache / f"latency_{_digest(network, fingerprint, amount)}.json"
        if path is not None and path.exists():
            table = cls.load(path, network, settings)
        else:
            sampler = sampler or RealSampler(network, settings)
            drawn = draw_counts(network, amount, np.random.default_rng(0))
            bar = tqdm(drawn, total=amount, desc="latency", unit="network", disable=not progress)
            table = cls(network, settings, fingerprint, [sampler(counts) for counts in bar])
            if path is not None:
                table.save(path)
        if held_out and (table.error is None or len(table.error.errors) != held_out):
            table.check(held_out, progress=progress)
            if path is not None:
                table.save(path)
        return table

    def check(self, plans: int = 10, *, seed: int = 1, progress: bool = True, ratio: Ratio | None = None) -> TableError:
        """Measure plans that the table was not learned from, and remember how far it is off.

        Args:
            plans: how many; they keep random shares of the MACs (:data:`HELD_OUT_MACS`).
            seed: that they are drawn with.
            progress: show a progress bar on standard error.
            ratio: measures one beside the unpruned network; tests bring their own.
        """
        network, rng = self.network, np.random.default_rng([seed, plans])
        ratio = ratio or self._measured_ratio
        errors = []
        for _ in tqdm(range(plans), desc="held-out plans", disable=not progress):
            counts = random_counts(network, rng, macs=HELD_OUT_MACS)
            plan = PruningPlan.from_counts(network.graph, counts)
            predicted = self.prediction(counts) / self.prediction(network.graph.sizes)
            errors.append(predicted / ratio(plan) - 1)
        self.error = TableError(tuple(errors), seed)
        return self.error

    def beside(self, plan: PruningPlan) -> tuple[Latency, Latency]:
        """Measure the unpruned network and that of a plan side by side, under the settings of the table.

        Raises:
            PruningError: one of them does not run.
        """
        network = self.network
        if self._reference is None:
            self._reference = Reference(network.model, network.example_inputs, self.settings)
        return self._reference.beside(network.pruned(plan))

    def _measured_ratio(self, plan: PruningPlan) -> float:
        return 1 / speed_up(*self.beside(plan)).ratio

    def save(self, path: Path) -> None:
        """Write the table as JSON.

        Raises:
            PruningError: the file cannot be written.
        """
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "network": _signature(self.network),
            "samples": self.samples,
            "error": self.error,
        }
        write_json(path, content, argument="cache")

    @classmethod
    def load(cls, path: Path, network: PrunableNetwork, settings: LatencySettings | None = None) -> LatencyTable:
        """Read a table that :meth:`save` wrote.

        Args:
            path: the file.
            network: the network that it was measured for.
            settings: what it should have been measured under.

        Raises:
            PruningError: not a table, or measured on another device, under other settings or for another network.
        """
        settings = settings or LatencySettings()
        content = read_json(path, argument="cache")
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            fingerprint = dict(content["fingerprint"])
            signature = str(content["network"])
            samples = _read_samples(content["samples"])
            error = None if content["error"] is None else _read_error(content["error"])
        except (AttributeError, KeyError, TypeError, ValueError) as fault:
            raise PruningError(
                f"`cache` should be an undamaged latency table of format {FORMAT}. Received '{path}' "
                f"({type(fault).__name__}: {fault}). Delete it and measure again."
            ) from fault
        wanted = device_fingerprint(settings)
        other = [
            f"{key} {fingerprint.get(key)!r} instead of {value!r}"
            for key, value in wanted.items()
            if fingerprint.get(key) != value
        ]
        if other:
            raise PruningError(
                f"`cache` should be measured on this device under these settings. Received '{path}' with "
                f"{', '.join(other)}. Measure a new table, or ask for the settings of the file."
            )
        if signature != _signature(network):
            raise PruningError(
                f"`cache` should be measured for this network. Received '{path}', which was measured for one with "
                "other layers or channel groups. Measure a new table."
            )
        return cls(network, settings, fingerprint, samples, error)


def fastest_widths(model: OperationModel, sizes: Counts) -> list[list[int]]:
    """For each group and each count of it, the count from there on at which the network is fastest.

    Which one that is depends little on the other groups: it is taken with all of them at full and at half width.

    Args:
        model: predicts.
        sizes: channels of each group ``(groups,)``.

    Returns:
        For each group a list over counts from 0; of counts that are equally fast the largest.
    """
    best = []
    for group, size in enumerate(sizes.tolist()):
        widths = np.arange(1, size + 1)
        seconds = np.zeros(size)
        for others in (sizes, np.maximum(1, sizes // 2)):
            counts = np.tile(others, (size, 1))
            counts[:, group] = widths
            seconds += model.totals(counts)
        choices, fastest = [0] * (size + 1), size
        for width in range(size, 0, -1):
            fastest = width if seconds[width - 1] < seconds[fastest - 1] else fastest
            choices[width] = fastest
        best.append(choices)
    return best


def _whole_from_parts(parts: Floats, wholes: Floats) -> tuple[float, float]:
    """Factor on the operations, and seconds outside of them, that give the time of whole networks."""
    smallest = float(wholes.min())  # the unit of the second number: both are then of about one size

    def errors(numbers: Floats) -> Floats:
        # relative: small networks count as much
        difference: Floats = (numbers[0] * parts + numbers[1] * smallest) / wholes - 1
        return difference

    # what was interrupted is far off, and must not count more for it
    found = least_squares(errors, (1.0, 0.1), bounds=(0, np.inf), loss="soft_l1", f_scale=_NOISE)
    return float(found.x[0]), float(found.x[1]) * smallest


def _signature(network: PrunableNetwork) -> str:
    """Digest of all that decides how long a network takes besides the device: its layers, and how they are coupled."""
    graph = network.graph
    layers = [
        (one.kind, one.weight, one.groups, one.kernel, one.stride, one.input_shape[1:], one.output_shape[1:])
        for one in graph.operations
    ]
    sides = [[one.inputs.tolist(), one.outputs.tolist()] for one in graph.operations]
    text = json.dumps([layers, sides, graph.sizes.tolist(), type(network.model).__qualname__])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _digest(network: PrunableNetwork, fingerprint: Mapping[str, str | int], samples: int) -> str:
    """Name of the file of a table."""
    key = json.dumps([FORMAT, fingerprint, _signature(network), samples], sort_keys=True)
    return hashlib.sha256(key.encode()).hexdigest()[:16]


def _read_samples(content: Sequence[Mapping[str, Any]]) -> list[Sample]:
    """Read stored samples; KeyError, TypeError or ValueError if they are none."""
    samples: list[Sample] = []
    for one in content:
        counts = np.array(one["counts"], dtype=np.int64)
        seconds, operations = float(one["seconds"]), np.array(one["operations"], dtype=np.float64)
        first = samples[0] if samples else Sample(counts, seconds, operations)
        same = counts.shape == first.counts.shape and operations.shape == first.operations.shape
        if not same or not 0 < seconds < np.inf or not np.all(operations >= 0):
            raise ValueError(f"a sample of {counts.shape} counts and {operations.shape} times")
        samples.append(Sample(counts, seconds, operations))
    if len(samples) < _FEWEST:
        raise ValueError(f"{len(samples)} samples")
    return samples


def _read_error(content: Mapping[str, Any]) -> TableError:
    return TableError(tuple(float(one) for one in content["errors"]), int(content["seed"]))
