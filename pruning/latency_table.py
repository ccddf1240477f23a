"""Latency of any plan without building it: layers timed once at a few widths, calibrated on whole networks.

What lies between the layers (normalisation, activations, the cost of calling anything) cannot be timed alone.
So a few whole networks are measured too, and three non-negative factors are fitted to them: one for the
layers, one for the elements that pass between them, and one for what no pruning removes. The prediction never
falls when a group keeps more channels, so a budget can be met by bisection.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import nnls
from torch import nn
from tqdm import tqdm

from prunegym.pruning.errors import PruningError
from prunegym.pruning.files import read_json, write_json
from prunegym.pruning.latency import LatencySettings, compare_latency, device_fingerprint
from prunegym.pruning.layer_times import (
    Floats,
    LayerModel,
    LayerShape,
    LayerTimes,
    Timer,
    layer_grid,
    layer_shapes,
    time_layer,
)
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

FORMAT = 1

#: Keep ratios, lowest and highest, of the networks measured besides the unpruned one; drawn for each group.
#: "mixed" has the awkward widths of real plans, "small" shows what cannot be removed. (A single channel
#: everywhere would show it best, but breaks networks that squeeze dimensions of size 1.)
_ANCHORS = {"mixed": (0.25, 1.0), "small": (0.125, 0.125)}
#: Weight of the layers as timed against one measured network. Without it the fit could not tell the layers
#: from the elements between them, which shrink together.
_TRUST = 0.3


def median_seconds(
    models: Mapping[str, nn.Module], inputs: tuple[Any, ...], settings: LatencySettings
) -> dict[str, float]:
    """Median seconds per run of each network, measured side by side."""
    return {name: one.median for name, one in compare_latency(models, inputs, settings).items()}


@dataclass(frozen=True)
class Calibration:
    """Seconds of the unpruned network by what they go to.

    They add up to its measured latency or, where the runtime favours round widths, to more.
    """

    layers: float
    elements: float
    """Passing over what the layers put out: normalisation, activations, sums."""
    fixed: float
    """What no pruning removes."""
    measured: Mapping[str, float]
    """Seconds of the networks that this was fitted to; ``unpruned`` is one of them."""


class LatencyTable:
    """Predicts the latency of plans of one network, on one device, under one set of settings.

    Make one with :meth:`measure`, or :meth:`load` one.

    Args:
        network: the network.
        settings: what was measured.
        fingerprint: device and settings at the time of measuring.
        times: the layers, by shape.
        calibration: fitted to the network.
    """

    def __init__(
        self,
        network: PrunableNetwork,
        settings: LatencySettings,
        fingerprint: Mapping[str, str | int],
        times: Mapping[LayerShape, LayerTimes],
        calibration: Calibration,
    ) -> None:
        self.settings = settings
        self.fingerprint = dict(fingerprint)
        self.times = dict(times)
        self.calibration = calibration
        self._model = LayerModel(network, settings.batch_size, times)
        sizes = network.graph.sizes
        self._per_second = calibration.layers / _positive(self._model.seconds(sizes))
        self._per_element = calibration.elements / _positive(self._model.elements(sizes))
        self.full = float(calibration.measured["unpruned"])
        """Measured latency of the unpruned network, seconds per run."""

    def latency(self, counts: NDArray[np.int64]) -> float:
        """Predicted seconds per run for kept counts ``(groups,)``.

        Never falls when a count rises, is never above :attr:`full`, and is equal to it for the unpruned
        network.
        """
        return min(self.full, float(self.operation_latency(counts).sum()) + self.calibration.fixed)

    def operation_latency(self, counts: NDArray[np.int64]) -> Floats:
        """Predicted seconds of each operation and of passing over what it puts out ``(operations,)``.

        Together with ``calibration.fixed`` they add up to :meth:`latency`, unless that is bounded by
        :attr:`full`.
        """
        return self._per_second * self._model.seconds(counts) + self._per_element * self._model.elements(
            counts
        )

    @classmethod
    def measure(
        cls,
        network: PrunableNetwork,
        settings: LatencySettings | None = None,
        *,
        progress: bool = True,
        cache: Path | None = None,
        points: int = 5,
        timer: Timer = median_seconds,
    ) -> "LatencyTable":
        """Time the layers of a network and calibrate on the network itself.

        Args:
            network: the network; it is not changed.
            settings: how to measure whole networks; layers are repeated less often.
            progress: show a progress bar on standard error.
            cache: a folder for tables. One that was measured for the same layers, on the same device and
                under the same settings, is read instead of measuring; a new one is kept there.
            points: widths at which a layer is timed, per side, evenly spaced up to all channels.
            timer: gives median seconds; tests bring their own.

        Raises:
            PruningError: a layer or the network does not run under the settings, or the cached file is
            damaged.
        """
        if points < 2:
            raise PruningError(f"`points` should be at least 2. Received {points}.")
        settings = settings or LatencySettings()
        fingerprint = device_fingerprint(settings)
        shapes = _distinct_shapes(network, settings)
        key = json.dumps([FORMAT, fingerprint, points, [one.to_json() for one in shapes]], sort_keys=True)
        path = cache and cache / f"latency_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
        if path is not None and path.exists():
            return cls.load(path, network, settings)
        total = sum(len(layer_grid(one, points)) for one in shapes) + 1
        # the layers' random weights must not move the caller's generator
        with (
            torch.random.fork_rng(devices=[]),
            tqdm(total=total, desc="latency", disable=not progress) as bar,
        ):
            times = {one: time_layer(one, points, settings, timer, bar.update) for one in shapes}
            measured = dict(timer(_anchor_models(network), network.example_inputs, settings))
            bar.update()
        calibration = _calibrate(network, LayerModel(network, settings.batch_size, times), measured)
        table = cls(network, settings, fingerprint, times, calibration)
        if path is not None:
            table.save(path)
        return table

    def save(self, path: Path) -> None:
        """Write the table as JSON.

        Raises:
            PruningError: the file cannot be written.
        """
        layers = [
            {
                "shape": one.shape.to_json(),
                "inputs": one.inputs,
                "outputs": one.outputs,
                "seconds": one.seconds,
            }
            for one in self.times.values()
        ]
        content = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "calibration": self.calibration,
            "layers": layers,
        }
        write_json(path, content, argument="cache")

    @classmethod
    def load(
        cls, path: Path, network: PrunableNetwork, settings: LatencySettings | None = None
    ) -> "LatencyTable":
        """Read a table that :meth:`save` wrote.

        Args:
            path: the file.
            network: the network that it was measured for.
            settings: what it should have been measured under.

        Raises:
            PruningError: not a table, or measured on another device, under other settings or for other
            layers.
        """
        settings = settings or LatencySettings()
        content = read_json(path, argument="cache")
        try:
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r}")
            fingerprint = dict(content["fingerprint"])
            calibration = _read_calibration(content["calibration"])
            stored = {_key(one["shape"]): _read_times(one) for one in content["layers"]}
            if len({times[2].shape for times in stored.values()}) != 1:
                raise ValueError("layers with different numbers of widths")
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
        shapes = _distinct_shapes(network, settings)
        missing = [one for one in shapes if _key(one.to_json()) not in stored]
        if missing:
            raise PruningError(
                f"`cache` should be measured for this network. Received '{path}', which lacks "
                f"{len(missing)} of {len(shapes)} layers, such as a {missing[0].kind} of "
                f"{missing[0].inputs} to {missing[0].outputs} channels. Measure a new table."
            )
        times = {one: LayerTimes(one, *stored[_key(one.to_json())]) for one in shapes}
        return cls(network, settings, fingerprint, times, calibration)


def _positive(amounts: Floats) -> float:
    """Their sum, or a number to divide zero by."""
    return float(amounts.sum()) or 1.0


def _distinct_shapes(network: PrunableNetwork, settings: LatencySettings) -> list[LayerShape]:
    return list(dict.fromkeys(one for one in layer_shapes(network, settings.batch_size) if one is not None))


def _key(shape: Mapping[str, Any]) -> str:
    return json.dumps(shape, sort_keys=True)


def _anchors(network: PrunableNetwork) -> dict[str, NDArray[np.int64]]:
    """Kept counts ``(groups,)`` of the networks to measure, by name; always the same for one network."""
    rng = np.random.default_rng(0)
    sizes = network.graph.sizes
    counts = {"unpruned": sizes}
    for name, (lowest, highest) in _ANCHORS.items():
        ratios = rng.uniform(lowest, highest, len(sizes))
        counts[name] = np.maximum(1, np.round(ratios * sizes)).astype(np.int64)
    return counts


def _anchor_models(network: PrunableNetwork) -> dict[str, nn.Module]:
    """The networks to measure, by name."""
    graph = network.graph
    scores = np.zeros(graph.units)  # which channels stay does not matter
    return {
        name: network.pruned(PruningPlan.from_scores(graph, counts, scores))
        for name, counts in _anchors(network).items()
    }


def _calibrate(network: PrunableNetwork, layers: LayerModel, measured: Mapping[str, float]) -> Calibration:
    """Fit the three factors to the measured networks."""
    sizes = network.graph.sizes
    seconds, elements = _positive(layers.seconds(sizes)), _positive(layers.elements(sizes))
    rows = [[_TRUST / seconds, 0.0, 0.0]]
    for name, counts in _anchors(network).items():
        share = [layers.seconds(counts).sum() / seconds, layers.elements(counts).sum() / elements, 1.0]
        rows.append([one / measured[name] for one in share])  # relative errors: small networks count as much
    factors, _ = nnls(np.array(rows), np.array([_TRUST, *[1.0] * (len(rows) - 1)]))
    # met exactly: from below here, from above by the bound in `latency`
    factors *= max(1.0, measured["unpruned"] / factors.sum())
    return Calibration(float(factors[0]), float(factors[1]), float(factors[2]), dict(measured))


def _read_calibration(content: Mapping[str, Any]) -> Calibration:
    """Read a stored calibration; ValueError or TypeError if it is none."""
    numbers = [float(content[name]) for name in ("layers", "elements", "fixed")]
    measured = {str(name): float(value) for name, value in content["measured"].items()}
    if not all(0 <= number < np.inf for number in numbers) or not 0 < measured["unpruned"] < np.inf:
        raise ValueError(f"calibration {numbers}")
    return Calibration(numbers[0], numbers[1], numbers[2], measured)


def _read_times(content: Mapping[str, Any]) -> tuple[tuple[int, ...], tuple[int, ...], Floats]:
    """Read the stored times of one layer; ValueError or TypeError if they are none."""
    inputs, outputs = (tuple(int(width) for width in content[side]) for side in ("inputs", "outputs"))
    seconds = np.array(content["seconds"], dtype=np.float64)
    rising = all(np.all(np.diff(side) > 0) and len(side) > 1 for side in (inputs, outputs))
    if not rising or seconds.shape != (len(inputs), len(outputs)) or not np.all(seconds >= 0):
        raise ValueError(f"times {seconds.shape} over {len(inputs)} x {len(outputs)} widths")
    return inputs, outputs, seconds
