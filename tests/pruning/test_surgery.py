"""The smaller network computes what the masked one computes."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import masked_network, prune_network

Toys = Callable[[str], PrunableNetwork]
MakePlan = Callable[[PrunableNetwork, np.random.Generator], PruningPlan]
TOYS = (
    *("concat", "dict_output", "flattened", "grouped", "hard_coded", "mobile", "registered", "residual"),
    *("sequential", "transposed", "twice", "two_inputs", "unnormalised"),
)


def outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """All output tensors, in eval mode."""
    with torch.no_grad():
        return [leaf for leaf in tree_leaves(model.eval()(*inputs)) if isinstance(leaf, Tensor)]


def difference(network: PrunableNetwork, plan: PruningPlan, dtype: torch.dtype) -> float:
    """Largest difference between rebuilt and masked network in a precision, over the largest output or 1."""
    model = copy.deepcopy(network.model).to(dtype)
    inputs = tuple(one[:1].to(dtype) for one in network.example_inputs)
    mask = plan.mask(network.graph)
    small = outputs(prune_network(model, network.graph, mask), inputs)
    large = outputs(masked_network(model, network.graph, mask), inputs)
    scale = max(1.0, *(float(one.abs().max()) for one in large))
    return max(float((a - b).abs().max()) for a, b in zip(small, large, strict=True)) / scale


@pytest.mark.parametrize("name", TOYS)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_pruned_network_equals_its_masked_twin(toys: Toys, random_plan: MakePlan, name: str, seed: int) -> None:
    """Any plan, to the precision of the numbers."""
    network = toys(name)
    plan = random_plan(network, np.random.default_rng(seed))

    assert difference(network, plan, torch.float32) < 1e-4
    assert difference(network, plan, torch.float64) < 1e-9


def test_pruned_zoo_network_equals_its_masked_twin(
    zoo_member: PrunableNetwork, random_plan: MakePlan, rng: np.random.Generator
) -> None:
    """One plan for each network of the zoo."""
    plan = random_plan(zoo_member, rng)

    assert difference(zoo_member, plan, torch.float32) < 1e-4


@pytest.mark.parametrize("name", ["digits_resnet", "digits_vgg", "digits_mobilenet", "cifar_resnet20"])
def test_pruned_zoo_network_equals_its_masked_twin_in_double_precision(
    zoo: Toys, random_plan: MakePlan, name: str
) -> None:
    """What was rounding in single precision disappears."""
    network = zoo(name)
    plan = random_plan(network, np.random.default_rng(1))

    assert difference(network, plan, torch.float64) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["cifar_resnet20", "cifar_resnet20_conv", "cifar_mobilenet_v2", "cifar_efficientnet_b0"]
)
@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_any_plan_of_a_zoo_network_equals_its_masked_twin(
    zoo: Toys, random_plan: MakePlan, name: str, seed: int
) -> None:
    """Many plans of the networks with the most couplings."""
    network = zoo(name)
    plan = random_plan(network, np.random.default_rng(seed))

    assert difference(network, plan, torch.float32) < 1e-4
    assert difference(network, plan, torch.float64) < 1e-9


def test_masked_twin_differs_from_the_unpruned_network(toy: PrunableNetwork) -> None:
    """Equality above would be worth nothing if masking did nothing."""
    plan = PruningPlan.from_counts(toy.graph, toy.graph.sizes // 3)

    before, after = outputs(toy.model, toy.example_inputs), outputs(toy.masked(plan), toy.example_inputs)

    assert max(float((a - b).abs().max()) for a, b in zip(before, after, strict=True)) > 1e-3


def test_smallest_plan_runs(toy: PrunableNetwork) -> None:
    """One channel of each group: dimensions of size 1 are where squeezing and broadcasting go wrong."""
    ones = np.ones(len(toy.graph.groups), dtype=np.int64)
    plan = PruningPlan.from_counts(toy.graph, ones)

    assert difference(toy, plan, torch.float64) < 1e-9


def test_unpruned_plan_changes_no_bit(toy: PrunableNetwork) -> None:
    """Everything kept, everything the same."""
    copied = toy.pruned(PruningPlan.unpruned(toy.graph))

    same = zip(outputs(copied, toy.example_inputs), outputs(toy.model, toy.example_inputs), strict=True)
    assert all(torch.equal(a, b) for a, b in same)


def test_nothing_is_shared_with_the_original(toy: PrunableNetwork, random_plan: MakePlan) -> None:
    """Fine-tuning the smaller network must not train the large one."""
    small = toy.pruned(random_plan(toy, np.random.default_rng(0)))

    ours = {tensor.data_ptr() for tensor in toy.model.state_dict().values()}
    assert not ours & {tensor.data_ptr() for tensor in small.state_dict().values()}


def test_size_attributes_agree_with_the_tensors(toy: PrunableNetwork, random_plan: MakePlan) -> None:
    """What a layer says of itself is what it holds: exporters read the attributes."""
    small = toy.pruned(random_plan(toy, np.random.default_rng(1)))

    for module in small.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)
        elif isinstance(module, nn.ConvTranspose2d):
            assert module.weight.shape[:2] == (module.in_channels, module.out_channels // module.groups)
        elif isinstance(module, nn.Conv2d):
            assert module.weight.shape[:2] == (module.out_channels, module.in_channels // module.groups)
        elif isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.weight.shape == (module.num_features,)


def test_widths_are_those_of_the_plan(toys: Toys, random_plan: MakePlan) -> None:
    """A plan that was asked for is the plan that is built."""
    network = toys("residual")
    plan = random_plan(network, np.random.default_rng(2))
    counts = plan.counts()

    small = network.pruned(plan)

    assert small.stem.out_channels == small.outer.out_channels == counts["stem"]
    assert small.inner.out_channels == counts["inner"]
    assert small.down.out_channels == counts["down"]
    assert small.wide.out_channels == counts["down"] + counts["wide"]
    assert sum(small.shortcut.channel_padding) == counts["wide"]


def test_kept_filters_are_the_original_ones(toys: Toys) -> None:
    """The channels named in the plan, in their order."""
    network = toys("sequential")
    mask = np.ones(network.graph.units, dtype=np.bool_)
    mask[[0, 3, 9]] = False

    small = network.pruned(PruningPlan.from_mask(network.graph, mask))

    first = [1, 2, 4, 5, 6, 7]
    second = [0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]
    assert torch.equal(small[0].weight, network.model[0].weight[first])
    assert torch.equal(small[1].running_var, network.model[1].running_var[first])
    assert torch.equal(small[4].weight, network.model[4].weight[second][:, first])


def test_groups_attribute_follows_the_kept_groups(toys: Toys) -> None:
    """A grouped convolution loses whole groups."""
    network = toys("grouped")
    mask = np.ones(network.graph.units, dtype=np.bool_)
    mask[[0, 2]] = False

    small = network.pruned(PruningPlan.from_mask(network.graph, mask))

    assert (small.grouped.groups, small.grouped.in_channels, small.grouped.out_channels) == (2, 6, 4)


def test_tied_parameters_stay_tied() -> None:
    """Two names for one tensor are still one tensor afterwards."""
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6), nn.Linear(6, 3))
    model[4].weight = model[2].weight
    network = PrunableNetwork(model, torch.randn(2, 4))
    mask = np.ones(network.graph.units, dtype=np.bool_)
    mask[0] = False

    small = network.pruned(PruningPlan.from_mask(network.graph, mask))

    assert small[4].weight is small[2].weight
    assert small[2].weight.shape == (5, 5)


def test_training_modes_and_gradient_switches_are_kept(toys: Toys) -> None:
    """A frozen stem stays frozen; what was in training mode still is."""
    model = copy.deepcopy(toys("sequential").model).train()
    model[1].eval()
    model[0].weight.requires_grad_(False)
    network = PrunableNetwork(model, torch.randn(2, 3, 8, 8))

    small = network.pruned(PruningPlan.from_scores(network.graph, network.graph.sizes // 2, -np.arange(30.0)))

    assert [small.training, small[0].training, small[1].training] == [True, True, False]
    assert [one.requires_grad for one in small.parameters()] == [one.requires_grad for one in model.parameters()]
