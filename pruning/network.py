"""A network made ready for pruning: the object that everything else holds."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from prunegym.pruning.agreement import Gap, gap_between
from prunegym.pruning.blocks import find_blocks, in_any
from prunegym.pruning.copies import duplicate
from prunegym.pruning.cost import Cost, CostModel
from prunegym.pruning.errors import PruningError, UnsupportedLayerError, unknown_name
from prunegym.pruning.graph import ChannelGraph, ChannelGroup, build_graph, path_and_around
from prunegym.pruning.kinds import cannot_run, check_kind, in_python, warn_of_masks
from prunegym.pruning.memory import peak_memory
from prunegym.pruning.memory_model import MemoryModel
from prunegym.pruning.modes import evaluating
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import masked_network, prune_network
from prunegym.pruning.tracing.trace import trace

CHECK_TOLERANCE = 1e-3
"""Largest difference between a pruned network and its masked twin, as a share of the largest output."""
_SHOWN = 6


class PrunableNetwork:
    """A model with its example input, channel graph and costs.

    Args:
        model: any network; it is traced in eval mode and not changed.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``.
        name: how the network is called in tables and run folders.
        keep: regular expressions; groups made by a layer whose path one matches in full, or that of a module around
            it, are not pruned.
        strict: refuse one that matches nothing; False where it may be meant for another network.
        check: prune a random part of every group once and compare with the masked twin; groups whose pruning
            does not survive (a size hard-coded in ``forward``) are frozen with the reason.

    Raises:
        UnsupportedLayerError: the network has no channel group that can be pruned.
        PruningError: the network does not run on the example input, is compiled, or gives other outputs each time; a
            pattern matches nothing.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        name: str = "network",
        keep: Sequence[str] = (),
        strict: bool = True,
        check: bool = True,
    ) -> None:
        check_kind(model)
        warn_of_masks(model)
        self.model = model = in_python(model)
        self.name = name
        self.keep = tuple(keep)
        self.example_inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        try:
            self._trace = trace(model, self.example_inputs)
        except PruningError:
            raise
        except Exception as fault:
            raise cannot_run(model, self.example_inputs, name, fault) from fault
        self.graph = build_graph(self._trace, self.keep)
        if strict:
            check_keep(self.keep, [self])
        if check and self.graph.groups:
            self._freeze_what_breaks()
        if not self.graph.groups:
            raise self._nothing_to_prune()
        self.costs = CostModel(self.graph, model)
        self._costs: dict[frozenset[str], CostModel] = {frozenset(): self.costs}

    def _nothing_to_prune(self) -> PruningError:
        """Describe a network all of whose groups are frozen; the error is returned, not raised."""
        if not gap_between(*(self._outputs(self.model) for _ in range(2)), smallest=1e-12).relative <= CHECK_TOLERANCE:
            return PruningError(
                f"`network` should give the same outputs each time in evaluation mode. Received {self.name}, whose "
                "outputs differ between two runs. Let it draw no random numbers there: "
                "F.dropout(x, p, training=self.training), for example."
            )
        reasons: dict[str, list[str]] = {}
        for group in self.graph.frozen:
            reasons.setdefault(group.frozen or "", []).append(group.name)
        shown = {reason: ", ".join(names[:3]) + " and others" * (len(names) > 3) for reason, names in reasons.items()}
        listed = "; ".join(f"{names}: {reason}" for reason, names in shown.items())
        if self.graph.unknown_operations:
            listed += f"; operations without a rule: {', '.join(self.graph.unknown_operations)}"
        return UnsupportedLayerError(
            f"`network` should have at least one channel group that can be pruned. Received {self.name}, "
            f"where all {len(self.graph.frozen)} groups are frozen ({listed}). Change what these reasons name, or "
            "leave this network as it is."
        )

    @property
    def full_cost(self) -> Cost:
        """Cost of the unpruned network."""
        return self.costs.full

    def counts(self, plan: PruningPlan) -> NDArray[np.int64]:
        """Channels kept in each group ``(groups,)``.

        Raises:
            PruningError: the plan was made for another network.
        """
        return np.bincount(self.graph.group_of[plan.mask(self.graph)], minlength=len(self.graph.groups))

    @cached_property
    def blocks(self) -> tuple[str, ...]:
        """Paths of the residual blocks that a plan may leave out, in the order in which they run."""
        found = find_blocks(self.model, self.graph, self.example_inputs)
        paths = tuple(path for path in found if not self._keeps(path))
        model, full = without_constants(self.model), np.ones(self.graph.units, dtype=np.bool_)
        if self._failure(model, full, paths) is None:
            return paths
        return tuple(path for path in paths if self._failure(model, full, (path,)) is None)

    def _keeps(self, block: str) -> bool:
        """Whether something in a block was asked to be kept, and so the block."""
        groups = (*self.graph.groups, *self.graph.frozen)
        inside = {path for group in groups for path in group.producers if in_any(path, (block,))}
        around = {one for path in inside for one in path_and_around(path)}
        return any(re.fullmatch(pattern, path) for pattern in self.keep for path in around)

    def blocks_matching(self, patterns: Sequence[str]) -> tuple[str, ...]:
        """Residual blocks whose path matches one of several regular expressions in full.

        Raises:
            PruningError: a pattern matches no block.
        """
        found: dict[str, None] = {}
        for pattern in patterns:
            matching = [path for path in self.blocks if re.fullmatch(pattern, path)]
            if not matching:
                rule = "Only residual blocks with an identity shortcut may go."
                raise unknown_name("--leave-out", pattern, self.blocks, rule)
            found.update(dict.fromkeys(matching))
        return tuple(found)

    def cost(self, plan: PruningPlan) -> Cost:
        """Exact cost of a plan, without building it."""
        return self.costs_without(plan.removed).cost(self.counts(plan))

    def peak_memory(self, plan: PruningPlan) -> int:
        """Peak memory of a plan's activations for one example, bytes, without building it (see ``memory.py``).

        Where blocks are left out the network is built and observed.
        """
        if plan.removed:
            return peak_memory(self.pruned(plan), self.example_inputs).bytes
        return self._memory.bytes(plan.mask(self.graph))

    @cached_property
    def _memory(self) -> MemoryModel:
        return MemoryModel(self.model, self.graph, self.example_inputs)

    def costs_without(self, removed: Collection[str]) -> CostModel:
        """Costs of the plans that leave these blocks out.

        Raises:
            PruningError: the network has no such block.
        """
        key = frozenset(removed)
        if key not in self._costs:
            self._check_blocks(key)
            self._costs[key] = CostModel(self.graph, self.model, key, full=self.costs.full)
        return self._costs[key]

    def _check_blocks(self, removed: Collection[str]) -> None:
        for path in removed:
            if path not in self.blocks:
                raise unknown_name("plan", path, self.blocks, "Only residual blocks with an identity shortcut may go.")

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """The physically smaller network."""
        self._check_blocks(plan.removed)
        return prune_network(self.model, self.graph, plan.mask(self.graph), plan.removed)

    def masked(self, plan: PruningPlan) -> nn.Module:
        """The full-size twin that computes the same outputs with removed channels unread and blocks emptied."""
        self._check_blocks(plan.removed)
        return masked_network(self.model, self.graph, plan.mask(self.graph), plan.removed)

    def check(self, plan: PruningPlan) -> float:
        """Largest difference between the outputs of the pruned network and its masked twin.

        It is a share of the largest output; infinite where one of the two is no number and the other is, and NaN where
        both are none.

        Raises:
            Exception: whatever the pruned network raises when it does not run.
        """
        self._check_blocks(plan.removed)
        gap = self._gap(self.model, plan.mask(self.graph), plan.removed)
        return gap.relative if gap.numbers else float("nan")

    def _gap(self, model: nn.Module, mask: NDArray[np.bool_], removed: Collection[str] = ()) -> Gap:
        small = self._outputs(prune_network(model, self.graph, mask, removed))
        large = self._outputs(masked_network(model, self.graph, mask, removed))
        return gap_between(large, small, smallest=1e-12)

    def _outputs(self, model: nn.Module) -> Any:
        device = next((one.device for one in model.parameters()), torch.device("cpu"))
        with evaluating(model), torch.no_grad():
            return model(*tree_map_only(Tensor, lambda leaf: leaf.to(device), self.example_inputs))

    def _freeze_what_breaks(self) -> None:
        """Find groups that a hard-coded size keeps from being pruned, and freeze them."""
        rng = np.random.default_rng(0)
        model = without_constants(self.model)
        broken: dict[str, str] = {}
        while self.graph.groups:
            part = _random_part(self.graph, rng)
            found = self._culprits(model, part, _families(self.graph.groups))
            if not found:
                return
            broken.update(found)
            self.graph = build_graph(self._trace, self.keep, broken)

    def _culprits(
        self, model: nn.Module, part: NDArray[np.bool_], families: Sequence[Sequence[ChannelGroup]]
    ) -> dict[str, str]:
        """Groups that the network does not survive losing a part of, by bisection, with what happens."""
        groups = [group for family in families for group in family]
        failure = self._failure(model, self._only(part, groups))
        if failure is None:
            return {}
        broken = dict.fromkeys((one.name for one in groups), f"the network breaks when it is pruned: {failure}")
        if len(groups) == 1:
            return broken
        if len(families) == 1:
            # the same layer of each block: what breaks the first and the last is in the code they share
            ends = (groups[0], groups[-1])
            if all(self._failure(model, self._only(part, [one])) is not None for one in ends):
                return broken
            families = [[group] for group in groups]
        middle = len(families) // 2
        found = self._culprits(model, part, families[:middle]) | self._culprits(model, part, families[middle:])
        # where only the combination fails, none of them can be trusted
        return found or dict.fromkeys(broken, "pruning several groups together breaks the network")

    def _only(self, part: NDArray[np.bool_], groups: Sequence[ChannelGroup]) -> NDArray[np.bool_]:
        """The mask that prunes these groups only."""
        mask = np.ones(self.graph.units, dtype=np.bool_)
        for group in groups:
            mask[group.units] = part[group.units]
        return mask

    def _failure(self, model: nn.Module, mask: NDArray[np.bool_], removed: Collection[str] = ()) -> str | None:
        try:
            # NaN on both sides may come from weights that were changed for this check
            difference = self._gap(model, mask, removed).relative
        except Exception as fault:
            return f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}" if str(fault) else type(fault).__name__
        if not difference <= CHECK_TOLERANCE:
            return f"outputs differ from the masked network by {difference:.2g} of their size"
        return None


def _families(groups: Sequence[ChannelGroup]) -> list[list[ChannelGroup]]:
    """Groups whose names differ in numbers only, in the order of their first members."""
    families: dict[str, list[ChannelGroup]] = {}
    for group in groups:
        families.setdefault(re.sub(r"\d+", "", group.name), []).append(group)
    return list(families.values())


def without_constants(model: nn.Module) -> nn.Module:
    """A copy whose constant tensors (zero-initialised scales, fresh statistics) vary, so that they hide no fault."""
    twin = duplicate(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*twin.parameters(), *twin.buffers()]:
            if not tensor.is_floating_point() or tensor.numel() < 2 or bool((tensor != tensor.flatten()[0]).any()):
                continue
            noise = torch.rand(tensor.shape, generator=generator).to(tensor)
            tensor.copy_(0.5 * tensor + 0.2 + 0.6 * noise)
    return twin


def _random_part(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Keep another random share of each group, so that no two sizes agree by chance."""
    mask = np.zeros(graph.units, dtype=np.bool_)
    for group in graph.groups:
        kept = int(rng.integers(max(1, group.size // 4), max(2, group.size)))
        mask[group.start + rng.permutation(group.size)[:kept]] = True
    return mask


def check_keep(keep: Sequence[str], networks: Sequence[PrunableNetwork]) -> None:
    """Make sure that each pattern is about something in at least one of the networks.

    Raises:
        PruningError: One is not: what it was meant to keep would be pruned.
    """
    groups = [group for network in networks for group in (*network.graph.groups, *network.graph.frozen)]
    # of other modules nothing is pruned
    paths = {path for network in networks for path, _ in network.model.named_modules()}
    for pattern in keep:
        if not any(group.matches(pattern) for group in groups) and not any(re.fullmatch(pattern, one) for one in paths):
            some = ", ".join([group.name for group in groups][:_SHOWN]) + (", ..." if len(groups) > _SHOWN else "")
            raise PruningError(
                "`keep` should match the path of a layer that makes channels, or of a module that holds such layers, "
                f"in full. Received {pattern!r}, which matches none ({some}). `prunegym inspect` lists the names."
            )
