"""What goes together: shuffles, splits, heads, groups of normalisation; and that what is left computes the same."""

from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from prunegym.pruning.attention import HeadwiseAttention
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan


class Between(nn.Module):
    """A convolution, something, and another convolution that reads it."""

    def __init__(self, between: nn.Module, made: int, read: int) -> None:
        super().__init__()
        self.first, self.between, self.head = nn.Conv2d(3, made, 3), between, nn.Conv2d(read, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.between(F.relu(self.first(x)))).mean((2, 3))


class Function(nn.Module):
    """A function as a module, with whole numbers as its attributes."""

    def __init__(self, function: Callable[[Any, Tensor], Tensor], **sizes: Any) -> None:
        super().__init__()
        self.function = function
        for name, size in sizes.items():
            setattr(self, name, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


class Width(IntEnum):
    """A whole number with a name."""

    EIGHT = 8


def pairs(graph: ChannelGraph, weight: str, dim: int = 0) -> list[int]:
    """Unit of each index of a dimension of a tensor."""
    return graph.axes[weight, dim].tolist()


KEPT = "kept so that no part of the channels is empty"
#: What stands between two convolutions, channels made and read, and the unit of each channel made, -1 if kept.
COUPLED: dict[str, tuple[nn.Module, int, int, list[int]]] = {
    "shuffle": (
        Function(lambda _, x: x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)),
        *(8, 8),
        [0, 1, 2, 3] * 2,
    ),
    "halves": (
        Function(lambda _, x: torch.cat([x[:, : x.shape[1] // 2].sin(), x[:, x.shape[1] // 2 :]], 1)),
        *(8, 8),
        [0, 1, 2, 3] * 2,
    ),
    "gate": (Function(lambda _, x: x.chunk(2, 1)[0] * x.chunk(2, 1)[1].sigmoid()), 8, 4, [0, 1, 2, 3] * 2),
    "parts of one width": (
        Function(lambda own, x: torch.cat([x.split(own.width, 1)[0], *x.split(own.width, 1)[1:]], 1), width=2),
        *(8, 8),
        [0, 1] * 4,
    ),
    "parts of several widths": (
        Function(lambda own, x: torch.cat(x.split(own.widths, 1)[::-1], 1), widths=(1, 3, 4)),
        *(8, 8),
        [-1, -1, 0, 1, -1, 2, 3, 4],
    ),
    "slice by attribute": (
        Function(lambda own, x: x[:, : own.used], used=5),
        *(8, 5),
        [-1, 0, 1, 2, 3, -1, 4, 5],
    ),
    "radix sum": (Function(lambda _, x: x.unflatten(1, (2, -1)).softmax(1).sum(1)), 8, 4, [0, 1, 2, 3] * 2),
    "group norm": (nn.GroupNorm(4, 8), 8, 8, [0, 0, 1, 1, 2, 2, 3, 3]),
    "instance norm": (nn.InstanceNorm2d(8, affine=True), 8, 8, list(range(8))),
    "pixel shuffle": (nn.PixelShuffle(2), 8, 2, [0, 0, 0, 0, 1, 1, 1, 1]),
    "pixel unshuffle": (nn.PixelUnshuffle(2), 2, 8, [0, 1]),
    "unfold": (
        Function(lambda _, x: F.unfold(x, 3, padding=1).unflatten(2, x.shape[2:])),
        *(2, 18),
        [0, 1],
    ),
    "stacked": (Function(lambda _, x: torch.stack([x, x.sin()], 1).amax(1)), 8, 8, list(range(8))),
    "repeated": (Function(lambda _, x: x.repeat(1, 2, 1, 1)), 4, 8, [0, 1, 2, 3]),
    "flipped": (Function(lambda _, x: x + x.flip(1)), 4, 4, [0, 1, 1, 0]),
    "unflatten": (
        nn.Sequential(nn.Unflatten(1, (4, 2)), Function(lambda _, x: x.amax(2))),
        *(8, 4),
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
    "unflatten to an open size": (
        nn.Sequential(nn.Unflatten(1, (-1, 2)), Function(lambda _, x: x.amax(2))),
        *(8, 4),
        [0, 0, 1, 1, 2, 2, 3, 3],
    ),
    "enumeration": (
        Function(lambda own, x: x.sin() if own.width.name == own.both[0].name else x, width=Width.EIGHT, both=[*Width]),
        *(8, 8),
        list(range(8)),
    ),
    "grouped, transposed": (nn.ConvTranspose2d(8, 4, 2, groups=2), 8, 4, [0, 0, 0, 0, 1, 1, 1, 1]),
}


@pytest.mark.parametrize("name", COUPLED)
def test_channels_that_go_together_are_one_unit(name: str) -> None:
    """By hand, from what the operation does."""
    between, made, read, units = COUPLED[name]
    network = PrunableNetwork(Between(between, made, read).eval(), torch.randn(2, 3, 8, 8))

    found = np.array(pairs(network.graph, "first.weight"))

    assert all(group.frozen in {"network output", KEPT} for group in network.graph.frozen)
    assert len(set(found.tolist())) == len(set(units))
    assert [found.tolist().index(unit) for unit in found] == [units.index(unit) for unit in units]


@pytest.mark.parametrize("name", COUPLED)
def test_what_is_left_computes_the_same(name: str) -> None:
    """Each unit alone, and all but one."""
    between, made, read, _ = COUPLED[name]
    network = PrunableNetwork(Between(between, made, read).eval().double(), torch.randn(2, 3, 8, 8).double())
    size = network.graph.units

    for mask in [*~np.eye(size, dtype=bool), *(np.eye(size, dtype=bool) if len(network.graph.groups) == 1 else ())]:
        assert network.check(PruningPlan.from_mask(network.graph, mask)) < 1e-9


class FusedAttention(nn.Module):
    """Heads from one projection, as most vision transformers write it."""

    def __init__(self, width: int = 12, heads: int = 3) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.inner = heads, width // heads, width
        self.bias = nn.Parameter(torch.randn(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        scores = (q @ k.mT * self.head_dim**-0.5 + self.bias).softmax(-1)
        return self.proj((scores @ v).transpose(1, 2).reshape(*x.shape[:2], self.inner))


class Tokens(nn.Module):
    """Attention over the pixels of a feature map."""

    def __init__(self, attention: nn.Module, width: int = 12) -> None:
        super().__init__()
        self.stem, self.attention, self.head = nn.Conv2d(3, width, 3, 2), attention, nn.Linear(width, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((x := self.stem(x).flatten(2).mT) + self.attend(x)).mean(1)

    def attend(self, x: Tensor) -> Tensor:
        if isinstance(self.attention, nn.MultiheadAttention):
            return self.attention(x, x.sin(), x)[0]
        return self.attention(x)


ATTENTIONS: dict[str, Callable[[], nn.Module]] = {
    "fused": FusedAttention,
    "torch": lambda: nn.MultiheadAttention(12, 3, batch_first=True),
    "torch, batch second": lambda: nn.MultiheadAttention(12, 3),
    "torch, other keys": lambda: nn.MultiheadAttention(12, 3, kdim=12, vdim=12, bias=False, batch_first=True),
    "torch, encoder layer": lambda: nn.TransformerEncoderLayer(12, 3, 20, batch_first=True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_heads_are_units(name: str) -> None:
    """Three heads, each with its queries, keys, values and the columns that read it."""
    network = PrunableNetwork(Tokens(ATTENTIONS[name]()).eval(), torch.randn(2, 3, 9, 9))

    heads = [group for group in network.graph.groups if "attention" in group.name and group.size == 3]

    assert len(heads) == 1, network.graph.frozen


@pytest.mark.parametrize("name", ATTENTIONS)
@pytest.mark.parametrize("head", [0, 1, 2])
def test_network_without_a_head_computes_what_its_twin_does(name: str, head: int) -> None:
    """Smaller, and the same."""
    network = PrunableNetwork(Tokens(ATTENTIONS[name]()).eval().double(), torch.randn(2, 3, 9, 9).double())
    group = next(group for group in network.graph.groups if "attention" in group.name and group.size == 3)
    mask = np.ones(network.graph.units, dtype=bool)
    mask[group.start + head] = False
    plan = PruningPlan.from_mask(network.graph, mask)

    assert network.check(plan) < 1e-9
    assert sum(one.numel() for one in network.pruned(plan).parameters()) == network.cost(plan).parameters
    assert network.cost(plan).parameters < network.full_cost.parameters


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masks", ["none", "bool", "float", "padding", "both"])
def test_headwise_attention_is_torchs(batch_first: bool, need_weights: bool, masks: str) -> None:
    """Same parameters, same results, with any masks."""
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first).eval()
    x, memory = torch.randn(3, 5, 8), torch.randn(3, 7, 8)
    if not batch_first:
        x, memory = x.transpose(0, 1), memory.transpose(0, 1)
    blocked = torch.zeros(5, 7, dtype=torch.bool)
    blocked[:, 6] = True
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, :3] = True
    options: dict[str, Any] = {"need_weights": need_weights}
    if masks in {"bool", "both"}:
        options["attn_mask"] = blocked
    if masks == "float":
        options["attn_mask"] = torch.randn(6, 5, 7)
    if masks in {"padding", "both"}:
        options["key_padding_mask"] = padding

    expected, weights = module(x, memory, memory, **options)
    module.__class__ = HeadwiseAttention
    found, found_weights = module(x, memory, memory, **options)

    torch.testing.assert_close(found, expected)
    assert (weights is None) == (found_weights is None)
    if weights is not None:
        torch.testing.assert_close(found_weights, weights)


def test_width_under_layer_normalisation_is_frozen_and_heads_are_not() -> None:
    """Its statistics run over all channels of a token."""
    layer = nn.TransformerEncoderLayer(12, 3, 20, batch_first=True)
    graph = PrunableNetwork(Tokens(layer).eval(), torch.randn(2, 3, 9, 9)).graph

    assert {group.name: group.size for group in graph.groups} == {"attention.self_attn": 3, "attention.linear1": 20}
    assert any("normalises across channels" in str(group.frozen) for group in graph.frozen)
