"""NaN never passes for equality, wherever outputs are compared."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from prunegym.pruning.agreement import gap_between
from prunegym.pruning.deployment.export import export_network
from prunegym.pruning.deployment.program import export_program
from prunegym.pruning.deployment.recipe import NO_SOURCE, Blueprint
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan

NAN, INF = math.nan, math.inf


def numbers(*values: float) -> torch.Tensor:
    """A tensor."""
    return torch.tensor(values)


@dataclass(slots=True)
class Packed:
    """A tensor in an attribute, without a ``__dict__``."""

    part: torch.Tensor


class Dictionary(dict[str, torch.Tensor]):
    """Items as attributes; PyTorch takes it for a leaf."""

    __slots__ = ()
    __getattr__ = dict.__getitem__


@pytest.mark.parametrize(
    ("expected", "found", "absolute", "relative", "within"),
    [
        (numbers(1.0, -4.0), numbers(1.0, -3.0), 1.0, 0.25, False),
        (numbers(1.0, -4.0), numbers(1.0, -4.0), 0.0, 0.0, True),
        ({"a": numbers(10.0), "b": [numbers(1.0)]}, {"a": numbers(10.0), "b": [numbers(0.5)]}, 0.5, 0.5, False),
        (numbers(1.0, 2.0), numbers(1.0, NAN), INF, INF, False),
        (numbers(1.0, NAN), numbers(1.0, 2.0), INF, INF, False),
        (numbers(1.0, NAN), numbers(1.0, NAN), 0.0, 0.0, False),
        ((numbers(NAN), numbers(1.0)), (numbers(NAN), numbers(1.0)), 0.0, 0.0, False),
        (numbers(2.0, -INF), numbers(2.0, -INF), 0.0, 0.0, True),
        (numbers(2.0, -INF), numbers(2.0, INF), INF, INF, False),
        (numbers(1.0), numbers(1.0, 1.0), INF, INF, False),
        ((numbers(1.0),), (), INF, INF, False),
        (torch.zeros(0), torch.zeros(0), 0.0, 0.0, True),
        (torch.tensor([True]), torch.tensor([False]), 1.0, 1.0, False),
        (Packed(numbers(2.0)), Packed(numbers(1.0)), 1.0, 0.5, False),
        ([Dictionary(a=numbers(2.0))], [Dictionary(a=numbers(1.0))], 1.0, 0.5, False),
        (SimpleNamespace(a=[numbers(2.0)]), SimpleNamespace(a=[numbers(1.0)]), 1.0, 0.5, False),
        (SimpleNamespace(a=numbers(2.0)), SimpleNamespace(a=numbers(2.0)), 0.0, 0.0, True),
        ({"a": 1, "b": None}, {"a": 1, "b": None}, INF, INF, False),
    ],
)
def test_gap(expected: object, found: object, absolute: float, relative: float, within: bool) -> None:
    """Whatever the order: Python's ``max`` keeps the first of a number and NaN."""
    gap = gap_between(expected, found)

    assert (gap.absolute, gap.relative) == (absolute, relative)
    assert gap.within(1e-3) is within


def test_where_there_is_nothing_to_compare_that_is_said() -> None:
    """It used to pass for equality."""
    assert "without any tensor" in str(gap_between("outputs", "outputs"))


def test_object_that_refers_to_itself_is_looked_into_once() -> None:
    """And the parameters of a module that comes along are no outputs."""
    outputs = SimpleNamespace(part=numbers(2.0), module=nn.Linear(1, 1))
    outputs.itself = outputs

    assert gap_between(outputs, numbers(2.0)).within(1e-3)


class Poisoned(nn.Module):
    """Two outputs, the second of which is NaN where the first layer has lost a channel, or always."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.first, self.head, self.always = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1), always

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.first(x)
        outputs = self.head(x).mean((2, 3))
        poison = NAN if self.always or x.shape[1] < 8 else 1.0
        return outputs, outputs * poison


@pytest.mark.parametrize("always", [False, True])
def test_plan_whose_network_gives_nan_does_not_agree_with_its_twin(always: bool) -> None:
    """The largest of 0 and NaN is 0 in Python: it used to pass."""
    network = PrunableNetwork(Poisoned(always).eval(), torch.randn(2, 3, 4, 4), check=False)
    mask = np.ones(network.graph.units, dtype=bool)
    mask[0] = False

    difference = network.check(PruningPlan.from_mask(network.graph, mask))

    assert math.isnan(difference) if always else math.isinf(difference)


def test_groups_whose_pruning_gives_nan_are_frozen() -> None:
    """As those whose pruning changes what is computed."""
    with pytest.raises(PruningError, match="outputs differ from the masked network"):
        PrunableNetwork(Poisoned().eval(), torch.randn(2, 3, 4, 4))


def write_program(model: nn.Module, folder: Path) -> None:
    """As a program."""
    export_program(model, torch.randn(2, 3, 4, 4), folder / "a.pt2")


def write_half(model: nn.Module, folder: Path) -> None:
    """In half precision."""
    inputs, blueprint = (torch.randn(2, 3, 4, 4),), Blueprint.of_unpruned(model, NO_SOURCE)
    export_network(model, inputs, folder, ["safetensors"], blueprint=blueprint, dtype="float16")


class OnlySingle(nn.Module):
    """NaN in the second output in other types of numbers than float32."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 8, 1)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        outputs = self.first(x).mean((2, 3))
        return outputs, outputs if outputs.dtype == torch.float32 else outputs * NAN


@pytest.mark.parametrize(
    ("write", "model", "message"),
    [
        (write_program, Poisoned(always=True), r"Received outputs that are no numbers \(NaN\). Export a network with"),
        (write_half, OnlySingle(), "in which its outputs are not finite"),
    ],
)
def test_export_refuses_nan(
    write: Callable[[nn.Module, Path], None], model: nn.Module, message: str, tmp_path: Path
) -> None:
    """Also in an output that is not the first."""
    with pytest.raises(PruningError, match=message):
        write(model.eval(), tmp_path)
