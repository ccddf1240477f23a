from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prunegym.agents.inspect import Inspection, inspect_network
from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency_samples import Sample
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.widths import WidthRules, Widths
from prunegym.reporting.inspection import inspection_page

Toys = Callable[[str], PrunableNetwork]


class TenthPerGroup:
    """A latency model: a tenth of a second, and a tenth more per channel."""

    full = 10.0

    def latency(self, counts: np.ndarray) -> float:
        return 0.1 + 0.1 * float(counts.sum())


@pytest.fixture
def residual(toys: Toys) -> Inspection:
    """The network with three kinds of shortcuts."""
    return inspect_network(toys("residual"))


def test_groups_tell_which_layers_are_coupled(residual: Inspection) -> None:
    """What a shortcut joins stands in one row."""
    stem = next(row for row in residual.groups if row.name == "stem")

    assert stem.channels == 8
    assert set(stem.made_by) == {"stem", "outer"}
    assert set(stem.read_by) == {"inner", "down", "project"}


def test_shares_are_what_pruning_a_group_alone_saves(toys: Toys) -> None:
    """Against the cost of a plan that keeps one channel of that group and all others."""
    network = toys("sequential")
    inspection = inspect_network(network)
    for index, row in enumerate(inspection.groups):
        counts = network.graph.sizes
        counts[index] = 1

        assert row.macs_share == pytest.approx(1 - network.costs.macs(counts) / inspection.macs)
        assert row.parameters_share == pytest.approx(1 - network.costs.parameters(counts) / inspection.parameters)


def test_frozen_groups_come_with_their_reason(toys: Toys) -> None:
    """Why something is not pruned is half of the answer."""
    inspection = inspect_network(toys("hard_coded"))

    reasons = {row.name: row.reason for row in inspection.frozen}
    assert "output" in reasons["head"]
    assert "break" in reasons["fixed"]
    assert reasons["fixed"] in inspection.to_text()


def test_kept_layers_are_frozen_by_request() -> None:
    """`--keep` shows up with the pattern."""
    model = build_network("digits_vgg")
    network = PrunableNetwork(model, torch.randn(2, 1, 8, 8), keep=["features.0"])

    reasons = {row.name: row.reason for row in inspect_network(network).frozen}
    assert reasons["features.0"] == "kept by request (features.0)"


@pytest.mark.parametrize("kind", ["macs", "params"])
def test_reachable_budget_can_be_asked_for_and_less_cannot(toys: Toys, kind: str) -> None:
    """The printed number is rounded, and to the safe side."""
    network = toys("sequential")
    least = inspect_network(network).reachable[kind]
    widths = Widths.free(network.graph.sizes)

    assert apply_budget(Budget(kind, least), network.costs, widths).holds(widths.smallest)
    with pytest.raises(InfeasibleBudgetError, match="Ask for"):
        apply_budget(Budget(kind, least - 0.001), network.costs, widths)


def test_rules_of_widths_change_what_is_within_reach(toys: Toys) -> None:
    """Shares and budgets are those that the rules allow, and the text says what each group may keep."""
    network = toys("sequential")
    free, ruled = inspect_network(network), inspect_network(network, rules=WidthRules(align=4))

    assert [(row.smallest, row.largest, row.step) for row in ruled.groups] == [(4, 8, 4), (4, 12, 4), (4, 10, 4)]
    assert all(one.macs_share < other.macs_share for one, other in zip(ruled.groups, free.groups, strict=True))
    assert ruled.reachable["macs"] == pytest.approx(
        network.costs.macs(np.array([4, 4, 4])) / network.full_cost.macs, abs=1e-3
    )
    assert "4 to 12 by 4" in ruled.to_text()
    assert "may keep" not in free.to_text()


def test_plan_is_told_of_groups_blocks_and_cost() -> None:
    """What it keeps, what it leaves out, and the cost of the network that is left, as PyTorch counts it."""
    torch.manual_seed(0)
    network = PrunableNetwork(build_network("cifar_resnet20"), torch.randn(1, 3, 32, 32), name="cifar_resnet20")
    graph, block = network.graph, network.blocks[-1]
    mask = np.arange(graph.units) % 3 > 0
    plan = PruningPlan.from_mask(graph, mask).without([block])
    smaller = network.pruned(plan)

    found = inspect_network(network, plan=plan)

    assert found.plan is not None
    assert found.plan.parameters == sum(one.numel() for one in smaller.parameters())
    assert found.plan.macs == PrunableNetwork(smaller, torch.randn(1, 3, 32, 32)).full_cost.macs
    assert [row.name for row in found.blocks if row.left_out] == [block]
    assert {row.name: row.kept for row in found.groups} == {
        group.name: 0 if group.name.startswith(block) else mask[group.units].sum() for group in graph.groups
    }
    text = found.to_text()
    assert f"It leaves out 1 of {len(network.blocks)} blocks: {block}." in text
    assert f"({found.plan.macs_share:.1%})" in text
    assert "left out" in inspection_page(found.to_json()).render()


def test_plan_of_another_network_is_refused(toys: Toys) -> None:
    """Its groups have other names."""
    network, other = toys("residual"), toys("sequential")
    plan = PruningPlan.from_mask(other.graph, np.ones(other.graph.units, dtype=np.bool_))

    with pytest.raises(PruningError, match="`plan` should name exactly the network's"):
        inspect_network(network, plan=plan)


def test_latency_is_told_where_it_is_known(toys: Toys) -> None:
    """By a formula, and the least within reach."""
    network = toys("sequential")
    model = TenthPerGroup()

    inspection = inspect_network(network, latency=model)

    assert inspection.latency_seconds == 10.0
    assert inspection.reachable["latency"] == pytest.approx(0.01 * (1 + len(network.graph.groups)), abs=1e-3)
    assert "1e+04 ms predicted" in inspection.to_text()
    assert "predicted, unpruned; down to" in inspection_page(inspection.to_json()).render()


def test_latency_of_the_unpruned_network_is_the_measured_one(toys: Toys) -> None:
    """A table of a device that was slow while the unpruned network ran predicts less than it measured."""
    network = toys("sequential")
    operations = np.full(len(network.graph.operations), 1e-3)

    def sampler(counts: NDArray[np.int64]) -> Sample:
        slow = 2.0 if (counts == network.graph.sizes).all() else 1.0
        return Sample(counts, slow * float(operations.sum()), operations)

    table = LatencyTable.measure(network, progress=False, samples=8, sampler=sampler)

    inspection = inspect_network(network, latency=table)

    assert table.full < 0.9 * table.measured
    assert inspection.latency_seconds == table.measured
    assert f"{1e3 * table.measured:.3g} ms measured" in inspection.to_text()
    assert "measured, unpruned; down to" in inspection_page(inspection.to_json()).render()


def test_peak_memory_of_the_unpruned_network_is_told(toys: Toys) -> None:
    """With the place: here batch normalisation holds 8 channels twice, on 8 x 8 pixels."""
    inspection = inspect_network(toys("sequential"))

    assert inspection.to_json()["memory"]["bytes"] == 2 * 8 * 8 * 8 * 4
    assert "0.00391 MiB of activations at most (in 1)" in inspection.to_text()


def test_text_and_json_hold_every_group(residual: Inspection) -> None:
    """Nothing is told to people only, or to programs only."""
    text, content = residual.to_text(), residual.to_json()

    assert [row["name"] for row in content["groups"]] == [row.name for row in residual.groups]
    assert all(row.name in text for row in (*residual.groups, *residual.frozen))
    assert f"{residual.macs:,} MACs" in text


def test_unknown_operations_are_listed(toys: Toys) -> None:
    """What has no rule is named, with the place where it was met."""
    inspection = replace(inspect_network(toys("sequential")), unknown_operations={"aten.fft": "body.mixer"})

    assert "aten.fft" in inspection.to_text()
    assert "body.mixer" in inspection.to_text()
