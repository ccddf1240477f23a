"""Networks that no rule foresees: each prunes what it can, and `inspect` says what is frozen and why."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.agents.inspect import inspect_network
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan


@torch.library.custom_op("prunegym_odd::sorted_rows", mutates_args=())
def sorted_rows(x: Tensor) -> Tensor:
    """An operation of the user's own."""
    return x.sort(-1).values.clone()


class Odd(nn.Module):
    """Two convolutions and a head; what comes between them is up to the subclass."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def between(self, x: Tensor) -> Tensor:
        return x

    def forward(self, x: Tensor) -> Any:
        return self.head(F.relu(self.second(self.between(F.relu(self.first(x))))).mean((2, 3)))


class CustomOperation(Odd):
    def between(self, x: Tensor) -> Tensor:
        result: Tensor = torch.ops.prunegym_odd.sorted_rows(x)
        return result


class HardCodedReshape(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x.reshape(-1, 8, 36).reshape(-1, 8, 6, 6)


class ControlFlowOnValues(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x * 2 if bool(x.mean() > 1e9) else x + 1


class BranchThatReadsAChannel(Odd):
    def between(self, x: Tensor) -> Tensor:
        return x if float(x[:, 3].sum()) > -1e9 else -x


class TwoInputs(Odd):
    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        features = F.relu(self.first(x)) + F.relu(self.first(other))
        return self.head(F.relu(self.second(features)).mean((2, 3)))


class DictOutput(Odd):
    def forward(self, x: Tensor) -> dict[str, Any]:
        features = F.relu(self.first(x))
        return {"map": features, "logits": [self.head(F.relu(self.second(features)).mean((2, 3)))]}


@dataclass
class Found:
    map: Tensor
    logits: Tensor


class FoundTuple(NamedTuple):
    map: Tensor
    logits: Tensor


class FoundDict(dict[str, Tensor]):
    __getattr__ = dict.__getitem__


class DataclassOutput(Odd):
    """PyTorch takes it for a leaf, as it does all that is not registered with it."""

    kind: Callable[..., Any] = Found

    def forward(self, x: Tensor) -> Any:
        features = F.relu(self.first(x))
        return self.kind(map=features, logits=self.head(F.relu(self.second(features)).mean((2, 3))))


class NamedTupleOutput(DataclassOutput):
    kind = FoundTuple


class DictSubclassOutput(DataclassOutput):
    kind = FoundDict


class ObjectOutput(DataclassOutput):
    kind = SimpleNamespace


#: Number of inputs, groups that may be pruned, and why others may not.
EXPECTED: dict[Callable[[], Odd], tuple[int, set[str], dict[str, str]]] = {
    CustomOperation: (1, {"second"}, {"first": "no rule for prunegym_odd::sorted_rows"}),
    HardCodedReshape: (1, {"second"}, {"first": "the network breaks when it is pruned"}),
    # the mean that decides runs over all channels: without some of them, it might decide otherwise
    ControlFlowOnValues: (1, {"second"}, {"first": "reduces over channels"}),
    BranchThatReadsAChannel: (1, {"second"}, {"first": "takes part of the channels"}),
    TwoInputs: (2, {"first", "second"}, {}),
    **dict.fromkeys(
        (DictOutput, DataclassOutput, NamedTupleOutput, DictSubclassOutput, ObjectOutput),
        (1, {"second"}, {"first": "network output"}),
    ),
}


def traced(build: Callable[[], Odd]) -> PrunableNetwork:
    """The network on as many inputs as it takes."""
    torch.manual_seed(0)
    return PrunableNetwork(build().eval(), tuple(torch.randn(2, 3, 8, 8) for _ in range(EXPECTED[build][0])))


@pytest.mark.parametrize("build", EXPECTED, ids=lambda build: build.__name__)
def test_inspection_says_what_is_frozen_and_why(build: Callable[[], Odd]) -> None:
    """In the table for people as well."""
    inspection = inspect_network(traced(build))
    _, prunable, reasons = EXPECTED[build]

    assert {row.name for row in inspection.groups} == prunable
    frozen = {row.name: row.reason for row in inspection.frozen}
    assert set(frozen) == {"first", "second", "head"} - prunable
    for name, reason in reasons.items():
        assert reason in frozen[name]
        assert reason.split(":")[0] in inspection.to_text()


@pytest.mark.parametrize("build", EXPECTED, ids=lambda build: build.__name__)
def test_what_is_not_frozen_can_go(build: Callable[[], Odd]) -> None:
    """Smaller, and the same as the masked twin."""
    network = traced(build)
    mask = np.zeros(network.graph.units, dtype=bool)
    for group in network.graph.groups:
        mask[group.start : group.start + group.size // 2] = True
    plan = PruningPlan.from_mask(network.graph, mask)

    assert network.check(plan) < 1e-5
    assert network.cost(plan).parameters < network.full_cost.parameters
