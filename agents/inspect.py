"""What can be pruned of a network: channel groups, what ties them, what is frozen and why, what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.tables import format_table
from prunegym.pruning.blocks import inside
from prunegym.pruning.budget import LatencyModel
from prunegym.pruning.files import plain
from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.memory import PeakMemory, peak_memory
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency_table import LatencyTable, TableError
from prunegym.pruning.widths import WidthRules

#: Layers shown of a list in the text; JSON has all.
_SHOWN = 2


@dataclass(frozen=True, kw_only=True)
class GroupRow:
    """One prunable channel group."""

    name: str
    channels: int
    made_by: tuple[str, ...]
    """Layers whose output channels these are: they can only be pruned together."""
    read_by: tuple[str, ...]
    """Layers that lose input channels with them."""
    macs_share: float
    """Share of the network's MACs that pruning this group alone can save."""
    parameters_share: float
    """Share of its parameters."""
    smallest: int
    """Fewest channels that it may keep."""
    largest: int
    """Most channels that it may keep."""
    step: int
    """Between these it may keep multiples of this."""
    kept: int | None = None
    """Channels that the plan keeps; 0 where all that make or read them are in blocks that it leaves out."""


@dataclass(frozen=True, kw_only=True)
class BlockRow:
    """One residual block that a plan may leave out."""

    name: str
    macs_share: float
    """Share of the network's MACs that leaving it out saves."""
    parameters_share: float
    """Share of its parameters."""
    left_out: bool | None = None
    """Whether the plan leaves it out."""


@dataclass(frozen=True, kw_only=True)
class PlanCost:
    """What is left of a network by a plan."""

    macs: int
    parameters: int
    macs_share: float
    """Of the unpruned network's."""
    parameters_share: float


@dataclass(frozen=True, kw_only=True)
class FrozenRow:
    """One group that is not pruned."""

    name: str
    channels: int
    reason: str
    made_by: tuple[str, ...] = ()
    """Layers whose output channels these are."""
    read_by: tuple[str, ...] = ()
    """Layers that read them."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """All about pruning one network, before any of it is done."""

    network: str
    macs: int
    """Of the unpruned network, for one example."""
    parameters: int
    memory: PeakMemory
    """Peak memory of its activations for one example, and where it is reached."""
    groups: tuple[GroupRow, ...]
    frozen: tuple[FrozenRow, ...]
    blocks: tuple[BlockRow, ...]
    """Residual blocks that can be left out: depth, beside width."""
    unknown_operations: dict[str, str]
    """Operations without a rule -> where they were met; what passes through them is frozen."""
    layers: tuple[str, ...]
    """Paths of the layers that cost multiply-accumulates, in the order in which they run."""
    reachable: dict[str, float]
    """Smallest budget of each kind: a share of the unpruned network, rounded up so that it can be met."""
    latency_seconds: float | None = None
    """Latency of the unpruned network."""
    latency_measured: bool = False
    """Whether that was measured, or is what a latency model predicts."""
    latency_error: TableError | None = None
    """How far the latency table was off on plans that it was not learned from."""
    width_rules: str = ""
    """Alignment, fewest channels and bounds that shares and budgets are under; empty where there are none."""
    plan: PlanCost | None = None
    """What the plan that was given leaves."""

    def to_json(self) -> dict[str, Any]:
        """The inspection in what JSON holds."""
        content: dict[str, Any] = plain(self)
        return content

    def to_text(self) -> str:
        """The inspection for a terminal."""
        rows = [
            {
                "group": row.name,
                "channels": row.channels,
                "made by": _some(row.made_by),
                "read by": _some(row.read_by),
                "MACs share": row.macs_share,
                "parameters share": row.parameters_share,
                **({"may keep": _allowed(row)} if self.width_rules else {}),
                **({} if row.kept is None else {"kept": row.kept}),
            }
            for row in self.groups
        ]
        least = ", ".join(f"{kind}:{value:g}" for kind, value in self.reachable.items())
        origin = "measured" if self.latency_measured else "predicted"
        latency = "" if self.latency_seconds is None else f", {1e3 * self.latency_seconds:.3g} ms {origin}"
        memory = f"{self.memory.mib:.3g} MiB of activations at most (in {self.memory.module or 'the network'})"
        parts = [
            f"{self.network}: {self.macs:,} MACs, {self.parameters:,} parameters, {memory}{latency}",
            f"Channel groups that can be pruned: {len(self.groups)} (share: what one group alone can save)",
            format_table(rows),
        ]
        if self.plan is not None:
            parts.insert(1, self._plan_text(self.plan))
        if self.frozen:
            frozen = [{"group": row.name, "channels": row.channels, "why": row.reason} for row in self.frozen]
            parts += [f"Frozen groups: {len(self.frozen)}", format_table(frozen)]
        if self.blocks:
            blocks = [
                {
                    "block": row.name,
                    "MACs share": row.macs_share,
                    "parameters share": row.parameters_share,
                    **({} if row.left_out is None else {"plan": "left out" if row.left_out else "stays"}),
                }
                for row in self.blocks
            ]
            parts += [f"Residual blocks that can be left out: {len(self.blocks)}", format_table(blocks)]
        if self.unknown_operations:
            unknown = [{"operation": name, "where": path} for name, path in self.unknown_operations.items()]
            parts += ["Operations without a rule", format_table(unknown)]
        parts.append(f"Smallest budgets within reach: {least}")
        parts += [f"Latency table: {self.latency_error.describe()}"] if self.latency_error else []
        return "\n\n".join(parts)

    def _plan_text(self, plan: PlanCost) -> str:
        gone = [row.name for row in self.blocks if row.left_out]
        blocks = f" It leaves out {len(gone)} of {len(self.blocks)} blocks: {', '.join(gone)}." if gone else ""
        return (
            f"The plan leaves {plan.macs:,} MACs ({plan.macs_share:.1%}) and {plan.parameters:,} parameters "
            f"({plan.parameters_share:.1%}).{blocks}"
        )


def inspect_network(
    network: PrunableNetwork,
    *,
    plan: PruningPlan | None = None,
    latency: LatencyModel | None = None,
    latency_error: TableError | None = None,
    rules: WidthRules | None = None,
) -> Inspection:
    """Describe a network's channel groups and costs.

    Args:
        network: The network, traced.
        plan: Of this network: what it keeps and leaves out is told too.
        latency: Its latency model, for the least latency within reach; a latency table has measured the unpruned one.
        latency_error: How far that is off.
        rules: How wide pruned layers may be; by default any width.

    Raises:
        PruningError: The rules leave a group no width, a bound matches no group, or the plan is of another network.
    """
    graph, costs = network.graph, network.costs
    rules = rules or WidthRules()
    sizes, widths = graph.sizes, rules.apply(graph)
    kept = None if plan is None else _kept(network, plan)
    rows = []
    for index, group in enumerate(graph.groups):
        counts = sizes.copy()
        counts[index] = widths.smallest[index]
        least = costs.cost(counts)
        rows.append(
            GroupRow(
                name=group.name,
                channels=group.size,
                made_by=group.producers,
                read_by=group.consumers,
                macs_share=_saved(least.macs, costs.full.macs),
                parameters_share=_saved(least.parameters, costs.full.parameters),
                smallest=int(widths.smallest[index]),
                largest=int(widths.largest[index]),
                step=int(widths.step[index]),
                kept=None if kept is None else int(kept[index]),
            )
        )
    least = costs.cost(widths.smallest)
    reachable = {
        "macs": _rounded_up(least.macs, costs.full.macs),
        "params": _rounded_up(least.parameters, costs.full.parameters),
    }
    if latency is not None:
        reachable["latency"] = _rounded_up(latency.latency(widths.smallest), latency.full)
    return Inspection(
        network=network.name,
        macs=costs.full.macs,
        parameters=costs.full.parameters,
        memory=peak_memory(network.model, network.example_inputs),
        groups=tuple(rows),
        frozen=tuple(_frozen_row(group) for group in graph.frozen),
        blocks=tuple(_block_row(network, block, plan) for block in network.blocks),
        unknown_operations=dict(graph.unknown_operations),
        layers=tuple(dict.fromkeys(one.module for one in graph.operations)),
        reachable=reachable,
        latency_seconds=_seconds(latency),
        latency_measured=isinstance(latency, LatencyTable),
        latency_error=latency_error,
        width_rules=str(rules),
        plan=None if plan is None else _plan_cost(network, plan),
    )


def _kept(network: PrunableNetwork, plan: PruningPlan) -> NDArray[np.int64]:
    """Channels of each group ``(groups,)`` that are there once the plan is carried out."""
    gone = [_within(group, plan.removed) for group in network.graph.groups]
    return np.where(gone, 0, network.counts(plan))


def _within(group: ChannelGroup, blocks: Sequence[str]) -> bool:
    """Whether all layers that make or read the channels of a group are in these blocks."""
    layers = (*group.producers, *group.consumers)
    return bool(layers) and all(any(inside(layer, block) for block in blocks) for layer in layers)


def _plan_cost(network: PrunableNetwork, plan: PruningPlan) -> PlanCost:
    left, full = network.cost(plan), network.full_cost
    return PlanCost(
        macs=left.macs,
        parameters=left.parameters,
        macs_share=left.macs / max(full.macs, 1),
        parameters_share=left.parameters / max(full.parameters, 1),
    )


def _seconds(latency: LatencyModel | None) -> float | None:
    """Latency of the unpruned network, as measured where it was."""
    if isinstance(latency, LatencyTable):
        return latency.measured
    return None if latency is None else latency.full


def _block_row(network: PrunableNetwork, block: str, plan: PruningPlan | None) -> BlockRow:
    left, full = network.costs_without((block,)).cost(network.graph.sizes), network.full_cost
    return BlockRow(
        name=block,
        macs_share=_saved(left.macs, full.macs),
        parameters_share=_saved(left.parameters, full.parameters),
        left_out=None if plan is None else block in plan.removed,
    )


def _frozen_row(group: ChannelGroup) -> FrozenRow:
    return FrozenRow(
        name=group.name,
        channels=group.size,
        reason=group.frozen or "",
        made_by=group.producers,
        read_by=group.consumers,
    )


def _allowed(row: GroupRow) -> str:
    """The counts that a group may keep, in words."""
    if row.smallest == row.largest:
        return str(row.largest)
    return f"{row.smallest} to {row.largest}" + (f" by {row.step}" if row.step > 1 else "")


def _saved(left: float, full: float) -> float:
    """Share that is gone."""
    return 1 - left / max(full, 1)


def _rounded_up(least: float, full: float) -> float:
    """Share of the least in the full cost, to three decimals, never too small."""
    return float(min(1.0, np.ceil(1000 * least / max(full, 1e-12)) / 1000))


def _some(names: Sequence[str]) -> str:
    """The first few names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
