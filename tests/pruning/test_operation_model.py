"""Times of operations learned from whole networks, on devices whose times are known."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network, input_shape_of
from prunegym.pruning.timing.latency_samples import draw_counts, random_counts
from prunegym.pruning.timing.operation_model import OperationModel, OperationSizes

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]
Device = Callable[[PrunableNetwork, Counts], Floats]
"""Seconds of each operation of a network with these counts."""


class Branches(nn.Module):
    """A concatenation, and heads of attention: widths that are sums, and work that shrinks with a third number."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(3, 32, 1)
        self.join = nn.Conv2d(48, 16, 1)
        self.qkv, self.project = nn.Linear(16, 3 * 32), nn.Linear(32, 16)
        self.heads = 4
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.join(torch.cat([self.left(x), self.right(x)], dim=1)).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, 8)).permute(2, 0, 3, 1, 4)
        mixed = torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v
        out: Tensor = self.head(self.project(mixed.transpose(1, 2).flatten(2)).mean(dim=1))
        return out


def prunable(name: str) -> PrunableNetwork:
    """A network with two examples."""
    generator = torch.Generator().manual_seed(0)
    if name == "branches":
        return PrunableNetwork(Branches(), torch.randn(2, 3, 6, 6, generator=generator), name=name)
    return PrunableNetwork(build_network(name), torch.randn(2, *input_shape_of(name), generator=generator), name=name)


def plain(network: PrunableNetwork, counts: Counts) -> Floats:
    """A nanosecond for each multiply-accumulate, and a microsecond besides."""
    return 1e-9 * network.costs.operation_macs(counts) + 1e-6


def blocky(network: PrunableNetwork, counts: Counts) -> Floats:
    """Kernels of 16 output channels, and half as fast where the input is no multiple of 4."""
    inputs, outputs = network.costs.widths(counts)
    blocks = np.ceil(outputs / 16) * 16 / outputs
    slow = np.where(inputs % 4 == 0, 1.0, 2.0)
    time: Floats = 1e-9 * network.costs.operation_macs(counts) * blocks * slow + 1e-6
    return time


def learned(network: PrunableNetwork, device: Device, samples: int = 32) -> OperationModel:
    """A model of a device."""
    counts = np.array(list(draw_counts(network, samples, np.random.default_rng(0))))
    return OperationModel(network, 1, counts, np.array([device(network, one) for one in counts]))


@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet", "branches"])
@pytest.mark.parametrize(("device", "tolerance"), [(plain, 0.03), (blocky, 0.15)])
def test_new_plans_are_predicted(name: str, device: Device, tolerance: float) -> None:
    """Nearly exactly where time is proportional to work; kernels that work in blocks are found out."""
    network = prunable(name)
    model, rng = learned(network, device), np.random.default_rng(1)
    errors = []
    for _ in range(20):
        counts = random_counts(network, rng)
        errors.append(model.seconds(counts).sum() / device(network, counts).sum() - 1)

    assert np.median(np.abs(errors)) < tolerance / 3
    assert np.quantile(np.abs(errors), 0.95) < tolerance


def test_totals_of_many_plans_are_those_of_each() -> None:
    """With heads of attention, whose number is a third side."""
    network = prunable("branches")
    model, rng = learned(network, plain, samples=8), np.random.default_rng(1)
    counts = np.array([rng.integers(1, network.graph.sizes, endpoint=True) for _ in range(6)])

    assert model.totals(counts) == pytest.approx([model.seconds(one).sum() for one in counts])


def test_operation_that_no_time_was_taken_of_is_predicted_to_take_none() -> None:
    """Its time was counted with that of another."""
    network = prunable("digits_resnet")

    model = learned(network, lambda one, counts: plain(one, counts) * (np.arange(len(one.graph.operations)) != 3))

    found = model.seconds(network.graph.sizes)
    assert found[3] == 0
    assert (np.delete(found, 3) > 0).all()


@pytest.mark.parametrize("examples", [1, 3])
@pytest.mark.parametrize("name", ["digits_resnet", "digits_mobilenet"])
def test_sizes_are_those_of_a_run_of_the_layers(name: str, examples: int) -> None:
    """Against a run with as many examples, though the network was traced with two."""
    network = prunable(name)
    modules = dict(network.model.named_modules())
    paths = [one.module for one in network.graph.operations]
    seen: dict[str, tuple[int, int]] = {}
    for path in paths:
        modules[path].register_forward_hook(
            lambda _, inputs, output, path=path: seen.update({path: (inputs[0].numel(), output.numel())})
        )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.model.eval()(torch.zeros(examples, *input_shape_of(name)))
    work = counter.get_flop_counts()

    sizes = OperationSizes.of(network.graph.operations, examples=examples, traced=2)

    for number, (one, path) in enumerate(zip(network.graph.operations, paths, strict=True)):
        layer = modules[path]
        macs = sum(work[f"{type(network.model).__name__}.{path}"].values()) / 2
        assert sizes.repeats[number] * one.fan_in * len(one.outputs) == macs
        assert (sizes.pixels_in[number] * len(one.inputs), sizes.pixels_out[number] * len(one.outputs)) == seen[path]
        if isinstance(layer, nn.Conv2d):
            assert sizes.grouped[number] == (layer.groups > 1)
            assert sizes.kernel[number] == layer.kernel_size[0] * layer.kernel_size[1]
            assert sizes.stride[number] == layer.stride[0]
