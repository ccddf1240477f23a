"""Networks that cannot be pruned are refused with what to do, and what is frozen in others has a reason."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import prunegym
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.task import ClassificationTask

CLASSES = 4
SMALL = {"statistics_examples": 64, "recovery_examples": 64, "reward_examples": 60, "device": "cpu"}


class Convolutions(nn.Module):
    """Two convolutions and a head; subclasses do something to be refused, or to be told of."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 12, 3, padding=1), nn.Conv2d(12, 12, 3, padding=1)
        self.head = nn.Linear(12, CLASSES)

    def maps(self, x: Tensor) -> Tensor:
        return F.relu(self.second(F.relu(self.first(x))))

    def forward(self, x: Tensor) -> Any:
        return self.head(self.maps(x).mean((2, 3)))


class GivesDict(Convolutions):
    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": super().forward(x)}


class OnlyEvaluates(Convolutions):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            raise RuntimeError("for inference only")
        return super().forward(x)


class FixedBatch(Convolutions):
    def forward(self, x: Tensor) -> Any:
        return super().forward(x.view(2, 3, 8, 8))


class DropsAlways(Convolutions):
    def maps(self, x: Tensor) -> Tensor:
        return F.dropout(super().maps(x))


class HoldsGenerator(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.numbers = (number for number in range(3))


class TiesAll(Convolutions):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 2, 3), nn.Linear(2, CLASSES)

    def maps(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return x + x.flip(1)


def lazy() -> nn.Module:
    """Without shapes yet."""
    return nn.Sequential(nn.LazyConv2d(8, 3), nn.Flatten(), nn.LazyLinear(CLASSES))


def scripted() -> nn.Module:
    """Compiled the old way."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.jit.script(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(288, CLASSES)))


#: A recovery that trains.
STEPS = {"recovery": "distill", "recovery_steps": 1}
#: How the network is built, what is asked for, and what is said about it.
REFUSED: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], str]] = {
    "torch.jit": (scripted, {}, "`network` should be made of modules in Python.*Give the module that it was made of"),
    "torch.compile": (lambda: torch.compile(Convolutions()), {}, "compiled by torch.compile. Give its attribute _orig"),
    "lazy": (lazy, {}, "`network` should run on its example input.* Run it once on such inputs"),
    "double": (lambda: Convolutions().double(), {}, r"Inputs are float32 and parameters float64: give model.float\(\)"),
    "random": (DropsAlways, {}, "`network` should give the same outputs each time.* training=self.training"),
    "one layer": (lambda: nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), {}, r"all 1 groups are frozen \(1: network"),
    "generator": (HoldsGenerator, {}, "`network` should be one that copy.deepcopy copies.*Take what is no part of it"),
    "dictionary": (GivesDict, {}, "`--network` should give one output per class.*Received dict.*Wrap the network"),
    "batches": (FixedBatch, {}, "`network` should run on batches of any size.*Received 'images' in batches of 64"),
    "frozen": (lambda: Convolutions().requires_grad_(False), STEPS, "require a gradient.*Unfreeze"),
    "inference": (OnlyEvaluates, STEPS, "`network` should learn in training mode.*for inference only"),
    "tied": (TiesAll, {}, "first: its channels can only go all together"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_network_that_cannot_be_pruned_is_refused(case: str, random_images: ClassificationTask) -> None:
    """With what to do."""
    build, options, message = REFUSED[case]

    with pytest.raises(prunegym.PruningError, match=message):
        prunegym.prune(build(), random_images, "macs:0.5", **SMALL, **options)


class Auxiliary(Convolutions):
    """A second head, which only training uses."""

    def __init__(self) -> None:
        super().__init__()
        self.auxiliary = nn.Linear(12, CLASSES)

    def forward(self, x: Tensor) -> Any:
        middle = F.relu(self.first(x))
        pair = self.head(F.relu(self.second(middle)).mean((2, 3))), self.auxiliary(middle.mean((2, 3)))
        return pair if self.training else pair[0]


def frozen(build: Callable[[], nn.Module]) -> dict[str, str]:
    """Why groups of a network are frozen."""
    return {row.name: row.reason for row in prunegym.inspect(build(), torch.randn(2, 3, 8, 8)).frozen}


def test_classes_of_an_auxiliary_head_stay() -> None:
    """They seem to be of no use to anybody, and cost something."""
    assert frozen(Auxiliary)["auxiliary"] == "nothing reads these channels in evaluation mode"


def test_inputs_of_normalised_weights_stay_and_their_outputs_go() -> None:
    """The norm of a filter is taken over its inputs."""

    def build() -> nn.Module:
        network = Convolutions()
        nn.utils.parametrizations.weight_norm(network.second)
        return network

    assert set(frozen(build)) == {"first", "head"}
    assert "normalises across channels" in frozen(build)["first"]


def test_channels_read_by_a_weight_that_is_computed_stay() -> None:
    """Their masked twin has no weight to set to zero, and the reason says so."""

    class Scaled(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, 0.5 * self.weight, self.bias)

    class Network(Convolutions):
        def __init__(self) -> None:
            super().__init__()
            self.second = Scaled(12, 12, 3)

    assert frozen(Network)["first"] == "convolution in second reads these channels with a weight that is computed"


def test_masks_that_were_left_on_are_told_of() -> None:
    """Before someone wonders why nothing shrinks; without them all can be pruned."""
    network = Convolutions()
    prune.l1_unstructured(network.second, "weight", 0.5)

    with pytest.warns(UserWarning, match=r"^second hold masks of .*: call torch\.nn\.utils\.prune\.remove"):
        masked = PrunableNetwork(network, torch.randn(2, 3, 8, 8))
    prune.remove(network.second, "weight")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        removed = PrunableNetwork(network, torch.randn(2, 3, 8, 8))

    assert "first" not in [group.name for group in masked.graph.groups]
    assert "first" in [group.name for group in removed.graph.groups]


def test_layer_whose_weight_is_computed_is_listed() -> None:
    """Rather than missing."""

    class Computed(Convolutions):
        def __init__(self) -> None:
            super().__init__()
            self.third = nn.Parameter(torch.randn(12, 12, 3, 3))

        def maps(self, x: Tensor) -> Tensor:
            return F.relu(F.conv2d(super().maps(x), torch.linalg.qr(self.third)[0], padding=1))

    assert frozen(Computed)["network"] == (
        "the weight of convolution in the network is computed: no rule for linalg_qr in the network"
    )
