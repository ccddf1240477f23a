"""How long each operation of a network takes at any widths, learned from a few whole networks that were watched.

Two layers of a model, as in nn-Meter (Zhang et al., "nn-Meter: Towards Accurate Latency Prediction of DNN Model
Inference on Diverse Edge Devices", MobiSys 2021), but fitted to operations inside running networks of the one kind that
is pruned: a sum of non-negative terms (multiply-accumulates, elements read and written, a constant) says how time
grows, and a forest of randomised trees says how it departs from that, by kernel, size, place in the network and the
powers of two that divide the widths. What it predicts is kept in tables, so that a plan is looked up.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls
from sklearn.ensemble import ExtraTreesRegressor
from torch import Tensor

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import Operation
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.timing.width_classes import Counts, Floats, WidthTables

_TREES = 60
#: Share of the features that each split of a tree may choose from.
_FEATURES = 0.7
#: Added to times before their logarithm is taken: a nanosecond is nothing.
_NOTHING = 1e-9


@dataclass(frozen=True)
class OperationSizes:
    """What of each operation no plan changes ``(operations,)``."""

    repeats: Floats
    """Multiply-accumulates per pair of input and output channel, in one run."""
    pixels_in: Floats
    """Elements read per channel."""
    pixels_out: Floats
    """Elements written per channel."""
    grouped: NDArray[np.bool_]
    """Reads as many channels as it makes, in groups."""
    kernel: Floats
    stride: Floats

    @classmethod
    def of(cls, operations: tuple[Operation, ...], *, examples: int, traced: int) -> OperationSizes:
        """Those of a network.

        Args:
            operations: as they were traced.
            examples: in a run.
            traced: examples that the shapes of the operations hold; their repeats are for one.
        """

        def pixels(shape: tuple[int, ...], channels: int) -> float:
            return max(1.0, examples / traced * prod(shape) / channels) if shape else 1.0

        return cls(
            repeats=np.array([examples * one.repeats for one in operations]),
            pixels_in=np.array([pixels(one.input_shape, len(one.inputs)) for one in operations]),
            pixels_out=np.array([pixels(one.output_shape, len(one.outputs)) for one in operations]),
            grouped=np.array([one.groups > 1 for one in operations]),
            kernel=np.array([float(prod(one.kernel)) for one in operations]),
            stride=np.array([float(one.stride[0]) if one.stride else 0.0 for one in operations]),
        )


class OperationModel:
    """Times of all operations of a network for any kept counts.

    Args:
        network: the network.
        examples: in a run.
        counts: channels that the groups of the watched networks kept ``(networks, groups)``.
        seconds: what their operations took ``(networks, operations)``.
    """

    def __init__(self, network: PrunableNetwork, examples: int, counts: Counts, seconds: Floats) -> None:
        operations = network.graph.operations
        self._costs = network.costs
        self._sizes = OperationSizes.of(operations, examples=examples, traced=batch_of(network))
        pairs = [self._widths(one) for one in counts]
        inputs, outputs = np.array([one for one, _ in pairs]), np.array([one for _, one in pairs])
        shares = np.array([self._costs.batch_shares(one) for one in counts])
        numbers = np.broadcast_to(np.arange(len(operations)), inputs.shape)
        # at some operations no time is ever taken: it was counted with others
        ever: NDArray[np.bool_] = seconds.sum(axis=0) > 0
        timed = np.broadcast_to(ever, inputs.shape)
        rows = (numbers[timed], inputs[timed], outputs[timed])
        self._fit(rows, (seconds / shares)[timed])

        def values(number: Counts, i: Counts, j: Counts) -> Floats:
            return np.where(ever[number], self._predict(number, i, j), 0.0)

        self._tables = WidthTables(
            [(one.fan_in, one.groups == 1 and bool((one.inputs >= 0).any())) for one in operations],
            [(len(one.outputs), bool((one.outputs >= 0).any())) for one in operations],
            values,
        )

    def seconds(self, counts: Counts) -> Floats:
        """Seconds of each operation ``(operations,)`` for kept counts ``(groups,)``."""
        return self._costs.batch_shares(counts) * self._tables.values(*self._widths(counts))

    def totals(self, counts: Counts) -> Floats:
        """Seconds of all operations together ``(plans,)`` for the counts of many plans ``(plans, groups)``."""
        pairs = [self._widths(one) for one in counts]
        shares = np.array([self._costs.batch_shares(one) for one in counts])
        values = self._tables.values(np.array([one for one, _ in pairs]), np.array([one for _, one in pairs]))
        totals: Floats = (shares * values).sum(axis=1)
        return totals

    def _widths(self, counts: Counts) -> tuple[Counts, Counts]:
        inputs, outputs = self._costs.widths(counts)
        return np.rint(inputs).astype(np.int64), np.rint(outputs).astype(np.int64)

    def _fit(self, rows: tuple[Counts, Counts, Counts], seconds: Floats) -> None:
        """Fit the sum of terms, then the forest to what it leaves."""
        terms = self._terms(*rows)
        # between absolute and relative errors: long operations matter more, short ones are many
        weight = 1 / np.sqrt(np.maximum(seconds, _NOTHING))
        self._factors, _ = nnls(terms * weight[:, None], seconds * weight)
        left = np.log(seconds + _NOTHING) - np.log(terms @ self._factors + _NOTHING)
        self._forest = ExtraTreesRegressor(_TREES, max_features=_FEATURES, random_state=0)
        self._forest.fit(self._features(*rows), left, sample_weight=1 / weight)

    def _predict(self, number: Counts, inputs: Counts, outputs: Counts) -> Floats:
        terms = self._terms(number, inputs, outputs) @ self._factors
        found: Floats = (terms + _NOTHING) * np.exp(self._forest.predict(self._features(number, inputs, outputs)))
        return found

    def _terms(self, number: Counts, inputs: Counts, outputs: Counts) -> Floats:
        """What time grows with ``(rows, 8)``: four terms, each for grouped layers and for others."""
        sizes = self._sizes
        read = np.where(sizes.grouped[number], outputs, inputs)
        terms = np.stack(
            [
                sizes.repeats[number] * inputs * outputs,
                sizes.pixels_in[number] * read,
                sizes.pixels_out[number] * outputs,
                np.ones(len(number)),
            ],
            axis=1,
        )
        grouped = sizes.grouped[number][:, None]
        return np.concatenate([terms * grouped, terms * ~grouped], axis=1)

    def _features(self, number: Counts, inputs: Counts, outputs: Counts) -> Floats:
        """What the trees split by ``(rows, features)``."""
        sizes = self._sizes
        read = np.where(sizes.grouped[number], outputs, inputs)
        columns = [
            np.log(sizes.repeats[number] * inputs * outputs),
            np.log(sizes.pixels_in[number] * read),
            np.log(sizes.pixels_out[number] * outputs),
            np.log(read),
            np.log(outputs),
            np.log(sizes.pixels_in[number]),
            sizes.grouped[number],
            sizes.kernel[number],
            sizes.stride[number],
            number,
            *(width % step == 0 for width in (read, outputs) for step in (16, 8, 4)),
        ]
        return np.stack([np.asarray(one, dtype=np.float64) for one in columns], axis=1)


def batch_of(network: PrunableNetwork) -> int:
    """Examples in the example input.

    Raises:
        PruningError: its first input has no batch dimension.
    """
    first = network.example_inputs[0]
    if not isinstance(first, Tensor) or first.ndim == 0 or first.shape[0] == 0:
        raise PruningError(
            "`network` should have an example input whose first tensor has a batch dimension. Received "
            f"{type(first).__name__}. Make the PrunableNetwork with one."
        )
    return first.shape[0]
