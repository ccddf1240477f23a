"""The layers of a network on their own: their shapes, and their times over a grid of widths.

Layers of equal shape are timed once. Between the widths that were timed the time is interpolated.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import Operation
from prunegym.pruning.latency import LatencySettings
from prunegym.pruning.network import PrunableNetwork

Floats = NDArray[np.float64]

Timer = Callable[[Mapping[str, nn.Module], tuple[Any, ...], LatencySettings], Mapping[str, float]]
"""Median seconds per run of each network, by name."""

_CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
#: Layers are many and alike: fewer repeats than for a network, and no layer may hold up the others.
_REPEATS, _WARMUP, _SECONDS = 20, 3, 0.25


@dataclass(frozen=True)
class LayerShape:
    """Everything that decides how long a layer takes. Layers of equal shape are timed once."""

    kind: str
    """``convolution``, ``transposed``, ``linear`` or ``product`` (of two activations)."""
    size: tuple[int, ...]
    """Batch and spatial size of the input; for linear layers and products its dimensions but the last."""
    inputs: int
    """Input channels that each output reads, unpruned."""
    outputs: int
    """Output channels, unpruned."""
    inputs_shrink: bool
    outputs_shrink: bool
    kernel: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    output_padding: tuple[int, ...] = ()
    dilation: tuple[int, ...] = ()
    groups: int = 1
    bias: bool = False

    @property
    def step(self) -> int:
        """Outputs that can only go together: those of one group of a grouped convolution."""
        return self.outputs // self.groups

    def layer(self, inputs: int, outputs: int) -> tuple[nn.Module, tuple[Tensor, ...]]:
        """The layer with random weights at other widths, and a random input for it.

        Args:
            inputs: input channels that each output reads.
            outputs: output channels; a grouped convolution has ``outputs / step`` groups.
        """
        if self.kind == "linear":
            return nn.Linear(inputs, outputs, self.bias), (torch.randn(*self.size, inputs),)
        if self.kind == "product":
            factors = torch.randn(*self.size, inputs), torch.randn(*self.size[:-1], inputs, outputs)
            return _Product(), factors
        groups = 1 if self.groups == 1 else outputs // self.step
        arguments: dict[str, Any] = {
            "in_channels": inputs * groups,
            "out_channels": outputs,
            "kernel_size": self.kernel,
            "stride": self.stride,
            "padding": self.padding,
            "dilation": self.dilation,
            "groups": groups,
            "bias": self.bias,
        }
        makers: Mapping[int, Any] = _CONVOLUTIONS
        if self.kind == "transposed":
            makers, arguments["output_padding"] = _TRANSPOSED, self.output_padding
        layer: nn.Module = makers[len(self.kernel)](**arguments)
        return layer, (torch.randn(self.size[0], inputs * groups, *self.size[1:]),)

    def to_json(self) -> dict[str, Any]:
        """The fields, in what JSON holds."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()
        }


class _Product(nn.Module):
    """A matrix product of two activations."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right


def layer_shapes(network: PrunableNetwork, batch_size: int) -> list[LayerShape | None]:
    """Shapes of the operations of a network, in the order of ``network.graph.operations``.

    Args:
        network: the network.
        batch_size: examples per run, in place of those of the example input.

    Returns:
        The shapes; None for what has no layer of its own (fused attention).
    """
    modules = dict(network.model.named_modules())
    examples = batch_of(network)
    return [
        _shape(one, modules.get(one.module), batch_size / examples) if one.input_shape else None
        for one in network.graph.operations
    ]


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


def _shape(one: Operation, module: nn.Module | None, scale: float) -> LayerShape:
    """The shape of one operation, with ``scale`` times the batch."""
    batch = max(1, round(one.input_shape[0] * scale))
    common: dict[str, Any] = {
        "inputs": one.fan_in,
        "outputs": len(one.outputs),
        "inputs_shrink": one.groups == 1 and bool((one.inputs >= 0).any()),
        "outputs_shrink": bool((one.outputs >= 0).any()),
        "bias": one.bias is not None,
    }
    if not one.kernel:
        kind = "linear" if one.kind == "linear" else "product"
        return LayerShape(kind=kind, size=(batch, *one.input_shape[1:-1]), **common)
    dims = range(len(one.kernel))
    # what the operation saw, not what the module says: padding may be "same", or done by another operation
    dilation = tuple(module.dilation) if isinstance(module, nn.modules.conv._ConvNd) else (1,) * len(dims)
    reach = [dilation[dim] * (one.kernel[dim] - 1) + 1 for dim in dims]
    small, large = one.output_shape[2:], one.input_shape[2:]
    transposed = one.reads == 0
    if transposed:
        small, large = large, small
    missing = [(small[dim] - 1) * one.stride[dim] + reach[dim] - large[dim] for dim in dims]
    padding = tuple(max(0, -(-amount // 2)) for amount in missing)
    surplus = tuple(2 * padding[dim] - missing[dim] for dim in dims)
    return LayerShape(
        kind="transposed" if transposed else "convolution",
        size=(batch, *one.input_shape[2:]),
        kernel=one.kernel,
        stride=one.stride,
        padding=padding,
        output_padding=tuple(min(surplus[dim], one.stride[dim] - 1) for dim in dims) if transposed else (),
        dilation=dilation,
        groups=one.groups,
        **common,
    )


@dataclass(frozen=True)
class LayerTimes:
    """Seconds of one layer shape over a grid of widths, never falling in either."""

    shape: LayerShape
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    seconds: Floats
    """``(inputs, outputs)``"""


def layer_grid(shape: LayerShape, points: int) -> list[tuple[int, int]]:
    """Pairs of input and output widths to time, at most ``points`` of each."""
    inputs = _spaced(shape.inputs, 1, points) if shape.inputs_shrink else [shape.inputs]
    step = shape.step if shape.groups > 1 else 1
    outputs = _spaced(shape.outputs, step, points) if shape.outputs_shrink else [shape.outputs]
    return [(i, j) for i in inputs for j in outputs]


def _spaced(full: int, step: int, points: int) -> list[int]:
    """About evenly spaced multiples of ``step`` up to ``full``."""
    multiples = np.round(np.linspace(0, full // step, points)).astype(np.int64)
    multiples[1:-1] -= 1  # off the round widths that kernels are made for and plans rarely have
    widths: list[int] = (step * np.unique(np.maximum(multiples, 1))).tolist()
    return widths


def time_layer(
    shape: LayerShape, points: int, settings: LatencySettings, timer: Timer, advance: Callable[[], object]
) -> LayerTimes:
    """Time a layer over its grid.

    Args:
        shape: the layer.
        points: widths per side.
        settings: those of whole networks; a layer is repeated less often.
        timer: gives median seconds.
        advance: called after each width.
    """
    short = replace(
        settings,
        repeats=min(settings.repeats, _REPEATS),
        warmup=min(settings.warmup, _WARMUP),
        time_limit=min(settings.time_limit, _SECONDS),
    )
    seconds: dict[tuple[int, int], float] = {}
    for widths in layer_grid(shape, points):
        layer, inputs = shape.layer(*widths)
        # the input has its final size; only its first dimension may not be cut to the batch
        seconds[widths] = timer({"layer": layer}, inputs, replace(short, batch_size=shape.size[0]))["layer"]
        advance()
    inputs_at, outputs_at = sorted({i for i, _ in seconds}), sorted({j for _, j in seconds})
    grid = np.array([[seconds[i, j] for j in outputs_at] for i in inputs_at])
    # noise, and kernels that like round widths, make some wider layers faster; a prediction that falls where
    # a plan keeps more would lead a bisection astray
    grid = np.maximum.accumulate(np.maximum.accumulate(grid, axis=0), axis=1)
    # all layers get the same number of points, so that they can be interpolated at once; the points added lie
    # above the full width, where no plan goes
    more_in, more_out = points - len(inputs_at), points - len(outputs_at)
    grid = np.pad(grid, ((0, more_in), (0, more_out)), mode="edge")
    inputs_at += [inputs_at[-1] + extra for extra in range(1, more_in + 1)]
    outputs_at += [outputs_at[-1] + extra for extra in range(1, more_out + 1)]
    return LayerTimes(shape, tuple(inputs_at), tuple(outputs_at), grid)


class LayerModel:
    """Times of all layers of a network for any kept counts, and the elements that pass between them.

    Args:
        network: the network.
        batch_size: examples per run.
        times: the layers, by shape.
    """

    def __init__(
        self, network: PrunableNetwork, batch_size: int, times: Mapping[LayerShape, LayerTimes]
    ) -> None:
        self._costs = network.costs
        shapes = layer_shapes(network, batch_size)
        rows = [times[shape] for shape in shapes if shape is not None]
        self._timed = np.flatnonzero([shape is not None for shape in shapes])
        self._inputs = np.array([row.inputs for row in rows], dtype=np.float64)
        self._outputs = np.array([row.outputs for row in rows], dtype=np.float64)
        self._grid = np.array([row.seconds for row in rows], dtype=np.float64)
        self._rows = np.arange(len(rows))
        scale = batch_size / batch_of(network)
        # normalisation, activation and sums pass over what a layer puts out
        self._elements = np.array(
            [
                scale * prod(one.output_shape) / len(one.outputs) if one.output_shape else 0.0
                for one in network.graph.operations
            ]
        )

    def seconds(self, counts: NDArray[np.int64]) -> Floats:
        """Seconds of each operation alone ``(operations,)`` for kept counts ``(groups,)``."""
        widths_in, widths_out = self._costs.widths(counts)
        i, u = self._locate(self._inputs, widths_in[self._timed])
        j, v = self._locate(self._outputs, widths_out[self._timed])
        rows, grid = self._rows, self._grid
        lower = (1 - v) * grid[rows, i, j] + v * grid[rows, i, j + 1]
        upper = (1 - v) * grid[rows, i + 1, j] + v * grid[rows, i + 1, j + 1]
        seconds = np.zeros(len(widths_in))
        seconds[self._timed] = (1 - u) * lower + u * upper
        return seconds

    def elements(self, counts: NDArray[np.int64]) -> Floats:
        """Elements that each operation puts out ``(operations,)``."""
        return self._elements * self._costs.widths(counts)[1]

    def _locate(self, grid: Floats, widths: Floats) -> tuple[NDArray[np.int64], Floats]:
        """Where widths ``(rows,)`` lie on ``grid (rows, points)``.

        Returns:
            The point at or below each width, and the way from there to the next point, 0 to 1.
        """
        index = np.clip((grid <= widths[:, None]).sum(axis=1) - 1, 0, grid.shape[1] - 2)
        lower = grid[self._rows, index]
        way = (widths - lower) / (grid[self._rows, index + 1] - lower)
        return index, np.clip(way, 0.0, 1.0)
