"""Layers on their own: the shapes they are made in, and their times between the widths that were timed."""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.latency import LatencySettings
from prunegym.pruning.layer_times import LayerModel, layer_grid, layer_shapes, time_layer
from prunegym.pruning.network import PrunableNetwork


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def macs_of(model: nn.Module, inputs: tuple[Any, ...]) -> float:
    """Multiply-accumulates by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(*inputs)
    return float(counter.get_total_flops()) / 2


class Oddities(nn.Module):
    """Layers that are easy to get wrong."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2)
        self.dilated = nn.Conv2d(8, 12, 3, padding="same", dilation=2)
        self.grouped = nn.Conv2d(12, 24, 3, stride=2, padding=1, groups=4, bias=False)
        self.up = nn.ConvTranspose2d(24, 8, 3, stride=2, padding=1, output_padding=1)
        self.tokens = nn.Linear(8, 6)
        self.line = nn.Conv1d(6, 5, 4, padding=1)
        self.query, self.key = nn.Linear(5, 7), nn.Linear(5, 7)
        self.head = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(self.grouped(self.dilated(self.stem(x))))
        x = self.line(self.tokens(x.flatten(2).transpose(1, 2)).transpose(1, 2)).transpose(1, 2)
        x = torch.softmax(self.query(x) @ self.key(x).transpose(1, 2), dim=-1) @ x
        out: Tensor = self.head(x.mean(dim=1))
        return out


@pytest.fixture(scope="module")
def odd() -> PrunableNetwork:
    """A network of oddities, on images of an odd size."""
    return PrunableNetwork(Oddities(), torch.randn(2, 3, 23, 17), name="odd")


@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_layers_made_alone_do_what_they_do_in_the_network(odd: PrunableNetwork, batch_size: int) -> None:
    """At full width they turn the same input size into the same output size, with the same work."""
    operations, shapes = odd.graph.operations, layer_shapes(odd, batch_size)
    macs = odd.costs.operation_macs(odd.graph.sizes)
    for operation, shape, expected in zip(operations, shapes, macs, strict=True):
        assert shape is not None
        layer, inputs = shape.layer(shape.inputs, shape.outputs)
        output = layer(*inputs)

        assert inputs[0].shape[1:] == operation.input_shape[1:], operation.module
        assert output.shape[1:] == operation.output_shape[1:], operation.module
        assert output.shape[0] == operation.output_shape[0] * batch_size // 2, operation.module
        assert macs_of(layer, inputs) == pytest.approx(batch_size * expected), operation.module


def test_grouped_layer_loses_whole_groups(odd: PrunableNetwork) -> None:
    """Half of the outputs means half of the groups, each as large as before."""
    shape = next(one for one in layer_shapes(odd, 1) if one is not None and one.groups > 1)

    layer, (data,) = shape.layer(shape.inputs, shape.outputs // 2)

    assert (shape.inputs, shape.groups, shape.step) == (3, 4, 6)
    assert isinstance(layer, nn.Conv2d)
    assert (layer.groups, layer.in_channels, data.shape[1]) == (2, 6, 6)


def test_fused_attention_has_no_layer_of_its_own() -> None:
    """It is part of what stays."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    network = PrunableNetwork(nn.Sequential(nn.Linear(8, 8), layer), torch.randn(2, 5, 8))

    shapes = layer_shapes(network, 2)

    fused = [one.input_shape == () for one in network.graph.operations]
    assert [shape is None for shape in shapes] == fused
    assert any(fused)


def count_macs(
    models: Mapping[str, nn.Module], inputs: tuple[Any, ...], settings: LatencySettings
) -> dict[str, float]:
    """A timer on a device that makes one multiply-accumulate per second."""
    return {name: macs_of(model, inputs) for name, model in models.items()}


def test_layers_between_the_timed_widths_are_interpolated(odd: PrunableNetwork) -> None:
    """Multiply-accumulates are linear in each width, so nothing is lost between the points."""
    shapes = dict.fromkeys(one for one in layer_shapes(odd, 1) if one is not None)
    times = {one: time_layer(one, 4, LatencySettings(), count_macs, lambda: None) for one in shapes}
    model, rng = LayerModel(odd, 1, times), np.random.default_rng(0)
    for _ in range(5):
        counts = rng.integers(1, odd.graph.sizes, endpoint=True)

        assert model.seconds(counts) == pytest.approx(odd.costs.operation_macs(counts))


def test_timed_widths_end_at_the_full_layer_and_begin_at_the_smallest(odd: PrunableNetwork) -> None:
    """Plans go from one channel, or one group of a grouped convolution, to all."""
    for shape in layer_shapes(odd, 1):
        assert shape is not None
        grid = layer_grid(shape, 5)
        smallest_in = 1 if shape.inputs_shrink else shape.inputs
        smallest_out = (shape.step if shape.groups > 1 else 1) if shape.outputs_shrink else shape.outputs

        assert grid[0] == (smallest_in, smallest_out)
        assert grid[-1] == (shape.inputs, shape.outputs)
        assert len(grid) == len(set(grid)) <= 25


def test_times_never_fall_with_width(odd: PrunableNetwork) -> None:
    """Whatever was measured."""
    rng = np.random.default_rng(0)
    for shape in layer_shapes(odd, 1):
        assert shape is not None
        times = time_layer(
            shape, 5, LatencySettings(), lambda *_: {"layer": float(rng.random())}, lambda: None
        )

        assert times.seconds.shape == (len(times.inputs), len(times.outputs)) == (5, 5)
        assert np.all(np.diff(times.seconds, axis=0) >= 0)
        assert np.all(np.diff(times.seconds, axis=1) >= 0)
