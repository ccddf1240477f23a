"""Depth: which residual blocks may go, and that the network without them is what it should be."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.agents.inspect import inspect_network
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.blocks import RemovedBlock
from prunegym.pruning.budget import Budget
from prunegym.pruning.deployment.saving import load_network, save_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer

Toys = Callable[[str], PrunableNetwork]


class Block(nn.Module):
    """A residual sum of which a part can be varied."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv, self.norm = kind, nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, x: Tensor, factor: float = 1.0) -> Tensor:
        branch = factor * self.norm(self.conv(x))
        if self.kind == "no shortcut":
            return branch
        if self.kind == "scaled shortcut":
            return 0.5 * x + branch
        if self.kind == "shifting activation":
            return torch.tanh(x + branch)
        if self.kind == "constant in the branch":
            return x + branch + 1.0
        return F.relu(x + branch)


class Stack(nn.Module):
    """Two blocks between a stem and a head; the second is called with a further argument."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block("plain"), Block(kind)])
        self.stem, self.head = nn.Conv2d(3, 6, 3), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = self.blocks[1](self.blocks[0](x), factor=2.0)
        return self.head(x.mean((2, 3)))


def network_of(kind: str) -> PrunableNetwork:
    """The toy, traced."""
    return PrunableNetwork(Stack(kind).eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    "kind", ["no shortcut", "scaled shortcut", "shifting activation", "constant in the branch", "plain"]
)
def test_only_blocks_around_an_identity_may_go(kind: str) -> None:
    """Whatever else happens beside the branch would be lost with the block."""
    expected = ("blocks.0", "blocks.1") if kind == "plain" else ("blocks.0",)

    assert network_of(kind).blocks == expected


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("layer1", "layer1"), (r"layer1\.0", "layer1.0"), (r"layer1\.1\.conv1", "layer1.1"), ("layer2.*", "layer2")],
)
def test_what_is_kept_is_not_left_out_with_its_block(keep: str, kept: str) -> None:
    """Whether the block was asked for, something in it or something around it; others may go."""
    model, images = build_network("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32)
    free = PrunableNetwork(model, images).blocks

    assert PrunableNetwork(model, images, keep=[keep]).blocks == tuple(
        one for one in free if one != kept and not one.startswith(f"{kept}.")
    )


@pytest.mark.parametrize(
    ("name", "count"), [("cifar_resnet20", 7), ("cifar_resnet20_conv", 7), ("cifar_mobilenet_v2", 10)]
)
def test_blocks_of_known_networks_are_those_without_projection(name: str, count: int) -> None:
    """ResNet-20 has nine blocks, of which two change the size; MobileNetV2 has ten with a shortcut."""
    network = PrunableNetwork(build_network(name).eval(), torch.randn(2, 3, 32, 32), name=name)

    assert len(network.blocks) == count


def test_network_without_blocks_equals_its_twin_and_costs_what_is_promised(rng: np.random.Generator) -> None:
    """Width and depth at once; counted by PyTorch."""
    network = PrunableNetwork(build_network("cifar_resnet20").eval(), torch.randn(2, 3, 32, 32))
    mask = rng.random(network.graph.units) < 0.6
    mask[[group.start for group in network.graph.groups]] = True
    plan = PruningPlan.from_mask(network.graph, mask).without(network.blocks[1:3])

    smaller = network.pruned(plan).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        smaller(torch.randn(1, 3, 32, 32))

    assert network.check(plan) < 1e-4
    assert counter.get_total_flops() // 2 == network.cost(plan).macs
    assert sum(one.numel() for one in smaller.parameters()) == network.cost(plan).parameters
    assert all(isinstance(smaller.get_submodule(path), RemovedBlock) for path in plan.removed)
    assert type(smaller) is type(network.model)


def test_plan_without_blocks_goes_through_json() -> None:
    """And is another plan than the one with all blocks."""
    network = network_of("plain")
    whole = PruningPlan.unpruned(network.graph)
    plan = whole.without(["blocks.1"])

    assert PruningPlan.from_json(plan.to_json()) == plan != whole
    assert PruningPlan.from_json(whole.to_json()) == whole


def test_plan_that_leaves_out_what_is_no_block_is_rejected() -> None:
    """With the nearest that is one."""
    network = network_of("plain")

    with pytest.raises(PruningError, match=r"`plan` .*blocks\.2.*blocks\.\d"):
        network.pruned(PruningPlan.unpruned(network.graph).without(["blocks.2"]))


def test_json_with_other_things_for_blocks_is_rejected() -> None:
    """A hand-written plan."""
    content = PruningPlan.unpruned(network_of("plain").graph).to_json()

    with pytest.raises(PruningError, match="`plan` should list the paths of the blocks left out"):
        PruningPlan.from_json({**content, "removed": [3]})


def test_network_without_blocks_is_saved_and_loaded(tmp_path: Path) -> None:
    """Into a newly built network, bit by bit."""
    network = network_of("plain")
    plan = PruningPlan.unpruned(network.graph).without(["blocks.0"])
    smaller = network.pruned(plan).eval()

    save_network(tmp_path, network, plan, smaller, source={"constructor": None}, metadata={})
    loaded = load_network(tmp_path, model=Stack("plain"))

    x = torch.randn(3, 3, 8, 8)
    assert torch.equal(loaded(x), smaller(x))


def test_inspection_lists_blocks_with_what_they_cost() -> None:
    """Two equal blocks of 6 x 6 x 9 kernels and their normalisation."""
    network = network_of("plain")
    rows = inspect_network(network).blocks

    assert [row.name for row in rows] == ["blocks.0", "blocks.1"]
    assert rows[0].parameters_share == pytest.approx((6 * 6 * 9 + 6 + 12) / network.full_cost.parameters)
    assert rows[0].macs_share == pytest.approx(6 * 6 * 9 * 36 / network.full_cost.macs)
    assert "Residual blocks that can be left out: 2" in inspect_network(network).to_text()


def test_problem_without_blocks_spends_its_budget_on_the_rest(scorer: Scorer) -> None:
    """Every plan leaves them out, and the widths that remain fill the budget."""
    whole = PruningProblem(scorer, (Budget("macs", 0.5),))
    block = whole.scorer.network.blocks[0]
    shallow = whole.without([block])
    budget = whole.budgets[0]

    wide, deep = (one.plan(one.uniform_counts(one.limits[budget])) for one in (shallow, whole))

    assert wide.removed == (block,)
    assert deep.removed == ()
    network = whole.scorer.network
    assert 0.48 <= network.cost(wide).macs / network.full_cost.macs <= 0.5
    assert sum(wide.counts().values()) > sum(deep.counts().values())
    assert network.check(wide) < 1e-4


def test_pattern_that_matches_no_block_is_rejected() -> None:
    """With those that there are."""
    with pytest.raises(PruningError, match=r"`--leave-out` .*block.0.*identity shortcut"):
        network_of("plain").blocks_matching(["block.0"])
