"""Predicted costs against PyTorch's own counter on the rebuilt network, and against hand counts."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.modes import operation_by_operation
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.widths import WidthRules

Toys = Callable[[str], PrunableNetwork]
MakePlan = Callable[[PrunableNetwork, np.random.Generator], PruningPlan]


def counted_macs(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> float:
    """Multiply-accumulates for one example, by PyTorch's counter of floating point operations."""
    known = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops}  # to PyTorch it is for free
    counter = FlopCounterMode(display=False, custom_mapping=known)
    with operation_by_operation(), counter, torch.no_grad():
        model.eval()(*inputs)
    return counter.get_total_flops() / 2 / len(inputs[0])


def attention_flops(query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: Any, **__: Any) -> int:
    """Every query with every key, and every weight with its value."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


def counted_parameters(model: nn.Module) -> int:
    """Learnable parameters."""
    return sum(one.numel() for one in model.parameters())


def test_cost_of_a_toy_plan_is_what_the_rebuilt_network_costs(toy: PrunableNetwork, random_plan: MakePlan) -> None:
    """Exactly, for several plans of every way to couple channels."""
    for seed in range(4):
        plan = random_plan(toy, np.random.default_rng(seed))
        small = toy.pruned(plan)

        assert toy.cost(plan).macs == counted_macs(small, toy.example_inputs)
        assert toy.cost(plan).parameters == counted_parameters(small)


def test_cost_of_a_zoo_plan_is_what_the_rebuilt_network_costs(
    zoo_member: PrunableNetwork, random_plan: MakePlan, rng: np.random.Generator
) -> None:
    """Exactly, for the networks that people prune."""
    plan = random_plan(zoo_member, rng)
    small = zoo_member.pruned(plan)

    assert zoo_member.cost(plan).macs == counted_macs(small, zoo_member.example_inputs)
    assert zoo_member.cost(plan).parameters == counted_parameters(small)


def test_full_cost_is_that_of_the_unpruned_network(zoo_member: PrunableNetwork) -> None:
    """The denominator of every budget."""
    assert zoo_member.full_cost.macs == counted_macs(zoo_member.model, zoo_member.example_inputs)
    assert zoo_member.full_cost.parameters == counted_parameters(zoo_member.model)


def test_macs_of_a_chain_are_those_counted_by_hand(toys: Toys) -> None:
    """3x3 on 8x8 pixels, 3x3 on 4x4 pixels, two linear layers."""
    network = toys("sequential")

    macs = network.costs.macs(np.array([5, 7, 4]))

    assert macs == 64 * 9 * 3 * 5 + 16 * 9 * 5 * 7 + 7 * 4 + 4 * 5


def test_parameters_of_a_chain_are_those_counted_by_hand(toys: Toys) -> None:
    """Weights, scales and shifts of the normalisation, biases of the linear layers."""
    network = toys("sequential")

    parameters = network.costs.parameters(np.array([5, 7, 4]))

    assert parameters == 9 * 3 * 5 + 2 * 5 + 9 * 5 * 7 + 2 * 7 + (7 * 4 + 4) + (4 * 5 + 5)


def test_depthwise_convolution_costs_one_input_per_channel(toys: Toys) -> None:
    """Expansion, depthwise, squeeze, excitation, projection, head."""
    network = toys("mobile")

    macs = network.costs.macs(np.array([6, 2, 5]))

    assert macs == 64 * 3 * 6 + 64 * 9 * 6 + 6 * 2 + 2 * 6 + 64 * 6 * 5 + 5 * 5


def test_operations_add_up_to_the_whole(zoo_member: PrunableNetwork) -> None:
    """The shares of the layers are shares of the same total."""
    costs, sizes = zoo_member.costs, zoo_member.graph.sizes

    assert round(costs.operation_macs(sizes).sum()) == costs.full.macs


def test_widths_are_those_of_the_layers(toys: Toys) -> None:
    """Input and output channels of each operation: what a latency table looks up."""
    network = toys("residual")
    counts = np.array([4, 3, 7, 2])

    inputs, outputs = network.costs.widths(counts)

    named = {one.module: k for k, one in enumerate(network.graph.operations)}
    assert (inputs[named["outer"]], outputs[named["outer"]]) == (3, 4)
    assert (inputs[named["wide"]], outputs[named["wide"]]) == (7, 9)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_cost_grows_with_every_group(toys: Toys, data: st.DataObject) -> None:
    """The projection onto a budget relies on it."""
    network = toys(data.draw(st.sampled_from(["concat", "grouped", "mobile", "residual", "twice"])))
    sizes = network.graph.sizes
    counts = np.array([data.draw(st.integers(1, int(size))) for size in sizes])
    group = data.draw(st.integers(0, len(sizes) - 1))
    more = counts.copy()
    more[group] = min(more[group] + 1, sizes[group])

    assert network.costs.macs(more) >= network.costs.macs(counts)
    assert network.costs.parameters(more) >= network.costs.parameters(counts)


def test_attention_is_counted_and_shrinks_with_its_heads() -> None:
    """Products of activations cost too."""
    network = PrunableNetwork(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), torch.randn(3, 5, 8))

    # by hand, because PyTorch's counter passes over fused attention on the CPU
    layers = 5 * (8 * 24 + 8 * 8 + 2 * 8 * 16)
    products = 2 * 5 * 5 * 8
    assert {one.name: one.size for one in network.graph.groups} == {"linear1": 16, "self_attn": 2}
    assert network.full_cost.macs == layers + products
    one_head = np.array([1 if one.name == "self_attn" else one.size for one in network.graph.groups])
    assert network.costs.macs(one_head) == layers - 5 * (8 * 12 + 4 * 8) + products // 2


class PartlyMixed(nn.Module):
    """One projection makes what attention mixes over positions, and what passes it by."""

    def __init__(self, mixed: int, passed: int) -> None:
        super().__init__()
        self.mixed, self.passed = mixed, passed
        self.stem, self.project = nn.Conv2d(3, 6, 2, 2), nn.Linear(6, mixed + passed)
        self.queries, self.keys, self.head = nn.Linear(6, 4), nn.Linear(6, 4), nn.Linear(mixed + passed, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).flatten(2).mT
        values, others = self.project(x).split([self.mixed, self.passed], -1)
        scores = (self.queries(x) @ self.keys(x).mT).softmax(-1)
        return self.head(F.relu(torch.cat([scores @ values, others], -1))).mean(1)


def test_channels_in_a_product_are_not_grouped_with_those_that_pass_it_by(random_plan: MakePlan) -> None:
    """They are in the same tensors, but cost more."""
    network = PrunableNetwork(PartlyMixed(5, 12).eval(), torch.randn(2, 3, 8, 8))

    # one channel of each part is kept
    assert [one.size for one in network.graph.groups if "project" in one.producers] == [4, 11]
    assert WidthRules(min_channels=2).apply(network.graph).smallest.min() == 2
    for seed in range(4):
        plan = random_plan(network, np.random.default_rng(seed))
        small = network.pruned(plan)
        assert network.cost(plan).macs == counted_macs(small, network.example_inputs)
        assert network.cost(plan).parameters == counted_parameters(small)


def test_batch_size_of_the_example_does_not_matter(toys: Toys) -> None:
    """MACs are for one example."""
    model = toys("flattened").model

    macs = [PrunableNetwork(model, torch.randn(count, 3, 8, 8)).full_cost.macs for count in (1, 2, 5)]

    assert len(set(macs)) == 1


class Constants(nn.Module):
    """Layers on a buffer, on a parameter, and on a parameter that is repeated for each example."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("grid", torch.rand(1, 2, 8, 8))
        self.latents, self.classes = nn.Parameter(torch.randn(4, 6)), nn.Parameter(torch.randn(10, 6))
        self.stem, self.position = nn.Conv2d(3, 6, 3, padding=1), nn.Conv2d(2, 6, 3, padding=1)
        self.inner, self.outer = nn.Conv2d(6, 9, 1), nn.Conv2d(9, 6, 1)
        self.queries, self.prototypes = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x) + self.outer(F.relu(self.inner(self.position(self.grid))))
        x = x.flatten(2).mT
        queries = self.queries(self.latents.expand(len(x), -1, -1))
        x = (queries @ x.mT).softmax(-1) @ x
        return x.mean(1) @ self.prototypes(self.classes).mT


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_what_does_not_depend_on_the_examples_is_counted_once(examples: int, random_plan: MakePlan) -> None:
    """As one forward pass on one example pays for it."""
    # PyTorch's counter takes no views of parameters that learn as the input of a module
    model = Constants().requires_grad_(False).eval()
    network = PrunableNetwork(model, torch.randn(examples, 3, 8, 8))
    plan = random_plan(network, np.random.default_rng(0))

    assert network.full_cost.macs == counted_macs(model, (torch.randn(1, 3, 8, 8),))
    assert network.cost(plan).macs == counted_macs(network.pruned(plan), (torch.randn(1, 3, 8, 8),))
