"""Soft masks: at 0 and 1 they are masks, and the differentiable cost is the cost."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.soft_masks import SoftMasks

Toys = Callable[[str], PrunableNetwork]
NAMES = ("concat", "flattened", "grouped", "mobile", "residual", "sequential", "twice", "two_inputs", "unnormalised")


def outputs_agree(network: PrunableNetwork, plan: PruningPlan) -> None:
    """Those under hard masks with those of the pruned network, and with no others."""
    masks = SoftMasks(network.model, network.graph)
    masks.units[:-1] = torch.from_numpy(plan.mask(network.graph)).float()
    with torch.no_grad(), masks.attached():
        masked = network.model(*network.example_inputs)
    with torch.no_grad():
        pruned, whole = network.pruned(plan)(*network.example_inputs), network.model(*network.example_inputs)

    for ours, theirs, other in zip(tree_leaves(masked), tree_leaves(pruned), tree_leaves(whole), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(ours, other, rtol=1e-4, atol=1e-5)  # hooks are gone, and the masks did something


@pytest.mark.parametrize("name", NAMES)
def test_hard_masks_give_the_outputs_of_the_pruned_network(
    toys: Toys, name: str, random_plan: Callable[..., PruningPlan], rng: np.random.Generator
) -> None:
    """Channels that are read by nobody, and channels that are not there, are the same."""
    outputs_agree(toys(name), random_plan(toys(name), rng))


def test_all_layers_that_read_with_a_tied_weight_are_masked(
    random_plan: Callable[..., PruningPlan], rng: np.random.Generator
) -> None:
    """Also those whose weight is another's."""
    layers = nn.ModuleList([nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1), nn.Conv2d(6, 6, 1), nn.Linear(6, 3)])
    layers[2].weight = layers[1].weight

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = layers

        def forward(self, x: Tensor) -> Tensor:
            x = self.layers[0](x)
            x = self.layers[2](self.layers[1](x).sin())
            return self.layers[3](x.cos().mean((2, 3)))

    network = PrunableNetwork(Tied(), torch.randn(2, 3, 4, 4))
    outputs_agree(network, random_plan(network, rng))


@pytest.mark.parametrize("there", [0.0, 1.0])
def test_blocks_are_blended_with_their_input(zoo: Toys, there: float) -> None:
    """At 0 as without them, at 1 as with them."""
    network = zoo("digits_resnet")
    (block,) = network.blocks
    masks = SoftMasks(network.model, network.graph, [block])
    masks.blocks[block] = torch.tensor(there)
    plan = PruningPlan.unpruned(network.graph).without([] if there else [block])
    with torch.no_grad(), masks.attached():
        masked = network.model(*network.example_inputs)
    with torch.no_grad():
        expected = network.pruned(plan)(*network.example_inputs)

    torch.testing.assert_close(masked, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [*NAMES, "transposed"])
def test_soft_macs_are_the_macs_at_whole_counts(toys: Toys, name: str, rng: np.random.Generator) -> None:
    """And their gradient is what one channel more or less makes, to first order."""
    network = toys(name)
    counts, ones = rng.integers(1, network.graph.sizes + 1), torch.ones(len(network.graph.operations)).double()
    soft = torch.from_numpy(counts).double().requires_grad_()
    total = network.costs.soft_macs(soft, ones)
    (slope,) = torch.autograd.grad(total, soft)

    assert round(float(total.detach())) == network.costs.macs(counts)
    for group in range(len(counts)):
        step = np.zeros(len(counts))
        step[group] = 1e-4
        ends = [float(network.costs.soft_macs(torch.from_numpy(counts + way * step), ones)) for way in (1, -1)]
        assert float(slope[group]) == pytest.approx((ends[0] - ends[1]) / 2e-4, rel=1e-5)
