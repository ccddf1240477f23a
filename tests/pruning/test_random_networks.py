"""Random networks that use every kind of rule, pruned at random: they compute what their masked twins do.

Each network is a stem, a few blocks drawn at random that keep ``(B, C, H, W)``, and a head. Widths are small multiples
of 4, so that groups, heads and halves fit.
"""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan


class Residual(nn.Module):
    """A sum around two convolutions, with an identity or a projection as its shortcut."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        inner = 4 * int(rng.integers(1, 4))
        self.down, self.norm = nn.Conv2d(width, inner, 3, padding=1), nn.BatchNorm2d(inner)
        self.up = nn.Conv2d(inner, width, 1)
        self.shortcut = nn.Conv2d(width, width, 1) if rng.random() < 0.3 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.shortcut(x) + self.up(F.relu(self.norm(self.down(x)))))


class Dense(nn.Module):
    """Grown by concatenation, then brought back to the width."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        growth = 4 * int(rng.integers(1, 3))
        self.first, self.second = nn.Conv2d(width, growth, 1), nn.Conv2d(width + growth, growth, 3, padding=1)
        self.norm = nn.BatchNorm2d(width + growth)
        self.join = nn.Conv2d(width + 2 * growth, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        grown = torch.cat([x, self.first(x)], 1)
        return self.join(F.silu(torch.cat([grown, self.second(F.relu(self.norm(grown)))], 1)))


class Inverted(nn.Module):
    """Expansion, depthwise convolution, squeeze and excitation, projection."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        inner = width * int(rng.integers(1, 3))
        self.expand, self.spatial = nn.Conv2d(width, inner, 1), nn.Conv2d(inner, inner, 3, padding=1, groups=inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 4, 1), nn.Conv2d(4, inner, 1)
        self.project, self.scale = nn.Conv2d(inner, width, 1), nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.spatial(self.expand(x)))
        y = y * self.excite(F.relu(self.squeeze(y.mean((2, 3), keepdim=True)))).sigmoid()
        return x + self.scale * self.project(y)


class Grouped(nn.Module):
    """Grouped convolutions with a channel shuffle between them, and group normalisation."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.groups = int(rng.choice([2, 4]))
        self.first = nn.Conv2d(width, width, 1, groups=self.groups)
        self.norm = nn.GroupNorm(self.groups, width) if rng.random() < 0.5 else nn.BatchNorm2d(width)
        self.mix = nn.Conv2d(width, width, 1) if rng.random() < 0.5 else nn.Identity()
        self.last = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mix(F.relu(self.norm(self.first(x))))
        return self.last(y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2))


class Split(nn.Module):
    """Halves that go different ways (as in ShuffleNet V2), or gate one another."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.gated = bool(rng.random() < 0.5)
        self.widen = nn.Conv2d(width, 2 * width, 1)
        self.branch = nn.Conv2d(width, width, 3, padding=1)
        self.back = nn.Conv2d(width if self.gated else 2 * width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.widen(x).chunk(2, 1)
        return self.back(left * right.sigmoid() if self.gated else torch.cat([left, self.branch(right)], 1))


class Attention(nn.Module):
    """Heads over pixels, from a fused projection or by PyTorch's module, and a two-layer perceptron."""

    def __init__(self, width: int, rng: np.random.Generator) -> None:
        super().__init__()
        self.num_heads = int(rng.choice([2, 4]))
        self.head_dim, self.inner = width // self.num_heads, width
        self.norm = nn.LayerNorm(width) if rng.random() < 0.5 else nn.Identity()
        self.torch_attention = nn.MultiheadAttention(width, self.num_heads, batch_first=True)
        self.fused = bool(rng.random() < 0.5)
        if self.fused:
            del self.torch_attention
            self.qkv, self.proj = nn.Linear(width, 3 * width, bias=bool(rng.random() < 0.5)), nn.Linear(width, width)
        hidden = 4 * int(rng.integers(2, 6))
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        tokens = tokens + self.attend(self.norm(tokens))
        tokens = tokens + self.down(F.gelu(self.up(tokens)))
        return tokens.mT.unflatten(2, x.shape[2:])

    def attend(self, x: Tensor) -> Tensor:
        if not self.fused:
            result: Tensor = self.torch_attention(x, x, x, need_weights=False)[0]
            return result
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(*x.shape[:2], self.inner))


BLOCKS: tuple[Callable[[int, np.random.Generator], nn.Module], ...] = (
    *(Residual, Dense, Inverted, Grouped, Split, Attention),
)


class RandomNetwork(nn.Module):
    """A stem, blocks drawn at random, perhaps one of them twice, and a head."""

    def __init__(self, seed: int, depth: int) -> None:
        super().__init__()
        rng = np.random.default_rng(seed)
        width = 8 * int(rng.integers(1, 3))
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(BLOCKS[index](width, rng) for index in rng.integers(len(BLOCKS), size=depth))
        self.twice = bool(rng.random() < 0.2)
        self.flat = bool(rng.random() < 0.5)
        self.head = nn.Linear(width * 16 if self.flat else width, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        if self.twice:
            x = self.blocks[0](x)
        return self.head(x.flatten(1) if self.flat else x.mean((2, 3)))


def random_network(seed: int, depth: int) -> nn.Module:
    """A random network in double precision and eval mode; its weights depend on the seed alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return RandomNetwork(seed, depth).double().eval()


seeds, depths = st.integers(0, 2**31 - 1), st.integers(1, 4)


def check(seed: int, depth: int) -> None:
    """Prune a random network by a random plan, and compare."""
    inputs = torch.randn(2, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    # without the check after surgery, which would freeze what the rules got wrong
    network = PrunableNetwork(random_network(seed, depth), inputs, check=False)
    rng = np.random.default_rng(seed)
    mask = np.zeros(network.graph.units, dtype=bool)
    for group in network.graph.groups:
        kept = int(rng.integers(1, group.size + 1))
        mask[group.start + rng.permutation(group.size)[:kept]] = True
    plan = PruningPlan.from_mask(network.graph, mask)

    assert network.check(plan) < 1e-9
    smaller = network.pruned(plan)
    assert sum(one.numel() for one in smaller.parameters()) == network.cost(plan).parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        smaller(inputs[:1])
    counted = counter.get_total_flops() // 2
    products = sum(one.kind == "product" for one in network.graph.operations)
    # PyTorch's counter passes over fused attention on the CPU
    assert counted <= network.cost(plan).macs if products else counted == network.cost(plan).macs


@settings(max_examples=40, deadline=None)
@given(seed=seeds, depth=depths)
def test_random_network_equals_its_masked_twin(seed: int, depth: int) -> None:
    """A few of them, in double precision; the slow suite does two thousand."""
    check(seed, depth)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(seed=seeds, depth=depths)
def test_two_thousand_random_networks_equal_their_masked_twins(seed: int, depth: int) -> None:
    """No disagreement in double precision, and costs as promised."""
    check(seed, depth)
