"""A model made ready for pruning: what is refused, and what breaks is found and frozen."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError, UnsupportedLayerError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

Toys = Callable[[str], PrunableNetwork]


def test_hard_coded_reshape_freezes_its_group_alone(toys: Toys) -> None:
    """The rest of the network is pruned, and the reason quotes what went wrong."""
    graph = toys("hard_coded").graph

    (reason,) = [one.frozen for one in graph.frozen if one.name == "fixed"]

    assert str(reason).startswith("the network breaks when it is pruned: RuntimeError: shape")
    assert {one.name for one in graph.groups} == {"stem", "last"}


def test_without_check_the_hard_coded_group_stays(toys: Toys) -> None:
    """The check can be turned off, for networks that are known to be fine."""
    network = toys("hard_coded")

    graph = PrunableNetwork(network.model, network.example_inputs, check=False).graph

    assert "fixed" in {one.name for one in graph.groups}


class Silent(nn.Module):
    """Computes with a fixed number of channels without ever failing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = F.relu(x) * (x.shape[1] / 8)  # differs once channels are gone
        return self.head(F.relu(self.second(x)).mean((2, 3)))


def test_silent_dependence_on_the_width_is_found() -> None:
    """Nothing raises, but the outputs differ from the masked network's."""
    torch.manual_seed(0)  # with other weights, all that is left may be zero behind the activation
    network = PrunableNetwork(Silent(), torch.randn(2, 3, 4, 4))

    reasons = {one.name: str(one.frozen) for one in network.graph.frozen}

    assert "outputs differ from the masked network" in reasons["first"]


@pytest.mark.parametrize("model", [nn.Linear(4, 3), nn.Identity(), nn.Sequential(nn.Flatten(), nn.Linear(4, 3))])
def test_network_with_nothing_to_prune_is_rejected(model: nn.Module) -> None:
    """A single layer has only inputs and outputs."""
    with pytest.raises(UnsupportedLayerError, match="`network` should have at least one channel group"):
        PrunableNetwork(model, torch.zeros(2, 4))


def test_input_of_a_wrong_shape_is_rejected(toys: Toys) -> None:
    """The message names the shape received and what the network said."""
    model = toys("residual").model

    with pytest.raises(PruningError, match=r"inputs of shape \[\(2, 4, 8, 8\)\], which raised RuntimeError"):
        PrunableNetwork(model, torch.zeros(2, 4, 8, 8))


def test_check_of_a_plan_is_the_difference_to_the_masked_twin(toys: Toys) -> None:
    """Rounding only."""
    network = toys("residual")
    plan = PruningPlan.from_scores(
        network.graph, network.graph.sizes // 2, np.arange(network.graph.units, dtype=np.float64)
    )

    assert network.check(plan) < 1e-5


def test_counts_of_a_plan_for_another_network_are_rejected(toys: Toys) -> None:
    """By a message that names the groups, not by a KeyError."""
    plan = PruningPlan.unpruned(toys("concat").graph)

    with pytest.raises(PruningError, match="`plan` should name exactly the network's 4 prunable groups"):
        toys("residual").cost(plan)


def test_model_is_not_changed(toys: Toys, random_plan: Callable[..., PruningPlan]) -> None:
    """Tracing, checking and pruning leave weights, sizes and modes alone."""
    network = toys("mobile")
    before = {name: tensor.clone() for name, tensor in network.model.state_dict().items()}

    network.pruned(random_plan(network, np.random.default_rng(0)))
    network.masked(random_plan(network, np.random.default_rng(1)))

    after = network.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
