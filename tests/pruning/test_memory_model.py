"""Peak memory of plans without running them, against observing the rebuilt network."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from prunegym.pruning.memory import peak_memory
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

MakePlan = Callable[[PrunableNetwork, np.random.Generator], PruningPlan]


def test_peak_of_any_plan_is_that_of_the_rebuilt_network(
    toy: PrunableNetwork, random_plan: MakePlan, rng: np.random.Generator
) -> None:
    """Byte by byte, for every toy."""
    for plan in (PruningPlan.unpruned(toy.graph), random_plan(toy, rng), random_plan(toy, rng)):
        assert toy.peak_memory(plan) == peak_memory(toy.pruned(plan), toy.example_inputs).bytes


def test_peak_of_any_plan_of_a_zoo_network_is_that_of_the_rebuilt_network(
    zoo_member: PrunableNetwork, random_plan: MakePlan, rng: np.random.Generator
) -> None:
    """Residual, depthwise and with squeeze and excitation."""
    plan = random_plan(zoo_member, rng)

    assert zoo_member.peak_memory(plan) == peak_memory(zoo_member.pruned(plan), zoo_member.example_inputs).bytes


def test_scores_of_attention_shrink_with_the_heads() -> None:
    """Sixteen tokens, four heads: at the softmax two maps of 4 x 16 x 16 and the values are held."""
    layer = nn.TransformerEncoderLayer(8, 4, 8, batch_first=True).eval()
    network = PrunableNetwork(layer, torch.randn(2, 16, 8))
    heads = next(group for group in network.graph.groups if group.size == 4)
    mask = np.ones(network.graph.units, dtype=bool)
    mask[heads.start + 1 : heads.start + 4] = False
    plan = PruningPlan.from_mask(network.graph, mask)

    assert network.peak_memory(plan) < network.peak_memory(PruningPlan.unpruned(network.graph))


@pytest.mark.parametrize("left_out", [1, 2])
def test_peak_without_blocks_is_observed(zoo: Callable[[str], PrunableNetwork], left_out: int) -> None:
    """Nothing is predicted where the operations themselves are others."""
    network = zoo("cifar_resnet20")
    plan = PruningPlan.unpruned(network.graph).without(network.blocks[:left_out])

    assert network.peak_memory(plan) == peak_memory(network.pruned(plan), network.example_inputs).bytes
