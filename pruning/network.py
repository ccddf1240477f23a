"""A network made ready for pruning: the object that everything else holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from prunegym.pruning.cost import Cost, CostModel
from prunegym.pruning.errors import PruningError, UnsupportedLayerError
from prunegym.pruning.graph import ChannelGraph, build_graph
from prunegym.pruning.modes import evaluating
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.surgery import masked_network, prune_network
from prunegym.pruning.trace import trace

CHECK_TOLERANCE = 1e-3
"""Largest difference between a pruned network and its masked twin, as a share of the largest output."""


class PrunableNetwork:
    """A model with its example input, channel graph and costs.

    Args:
        model: any network; it is traced in eval mode and not changed.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``.
        name: how the network is called in tables and run folders.
        keep: regular expressions; groups made by a layer whose path matches one in full are not pruned.
        check: prune a random half of every group once and compare with the masked twin; groups whose pruning
            does not survive (a size hard-coded in ``forward``) are frozen with the reason.

    Raises:
        UnsupportedLayerError: the network has no channel group that can be pruned.
        PruningError: the network does not run on the example input.
    """

    def __init__(
        self,
        model: nn.Module,
        example_inputs: Tensor | tuple[Any, ...],
        *,
        name: str = "network",
        keep: Sequence[str] = (),
        check: bool = True,
    ) -> None:
        self.model = model
        self.name = name
        self.keep = tuple(keep)
        self.example_inputs = example_inputs if isinstance(example_inputs, tuple) else (example_inputs,)
        try:
            self._trace = trace(model, self.example_inputs)
        except PruningError:
            raise
        except Exception as fault:
            shapes = [tuple(leaf.shape) for leaf in tree_leaves(self.example_inputs) if isinstance(leaf, Tensor)]
            raise PruningError(
                f"`network` should run on its example input. Received {name} on inputs of shape {shapes}, "
                f"which raised {type(fault).__name__}: {fault}. Give the shape that the network takes."
            ) from fault
        self.graph = build_graph(self._trace, self.keep)
        if check and self.graph.groups:
            self._freeze_what_breaks()
        if not self.graph.groups:
            reasons = "; ".join(f"{group.name}: {group.frozen}" for group in self.graph.frozen[:3])
            raise UnsupportedLayerError(
                f"`network` should have at least one channel group that can be pruned. Received {name}, "
                f"where all {len(self.graph.frozen)} groups are frozen ({reasons}). "
                "`prunegym inspect` lists all reasons."
            )
        self.costs = CostModel(self.graph, model)

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

    def cost(self, plan: PruningPlan) -> Cost:
        """Exact cost of a plan, without building it."""
        return self.costs.cost(self.counts(plan))

    def pruned(self, plan: PruningPlan) -> nn.Module:
        """The physically smaller network."""
        return prune_network(self.model, self.graph, plan.mask(self.graph))

    def masked(self, plan: PruningPlan) -> nn.Module:
        """The full-size twin that computes the same outputs with removed channels unread."""
        return masked_network(self.model, self.graph, plan.mask(self.graph))

    def check(self, plan: PruningPlan) -> float:
        """Largest difference between the outputs of the pruned network and its masked twin.

        It is a share of the largest output.

        Raises:
            Exception: whatever the pruned network raises when it does not run.
        """
        return self._difference(plan.mask(self.graph))

    def _difference(self, mask: NDArray[np.bool_]) -> float:
        small = self._outputs(prune_network(self.model, self.graph, mask))
        large = self._outputs(masked_network(self.model, self.graph, mask))
        worst = 0.0
        for a, b in zip(small, large, strict=True):
            if a.shape != b.shape:
                return float("inf")
            scale = max(float(b.abs().max()), 1e-12) if b.numel() else 1.0
            worst = max(worst, float((a - b).abs().max()) / scale if a.numel() else 0.0)
        return worst

    def _outputs(self, model: nn.Module) -> list[Tensor]:
        with evaluating(model), torch.no_grad():
            outputs = model(*tree_map(lambda leaf: leaf, self.example_inputs))
        return [leaf.double() for leaf in tree_leaves(outputs) if isinstance(leaf, Tensor)]

    def _freeze_what_breaks(self) -> None:
        """Find groups that a hard-coded size keeps from being pruned, and freeze them."""
        rng = np.random.default_rng(0)
        broken: dict[str, str] = {}
        while self.graph.groups:
            if self._failure(_random_half(self.graph, rng)) is None:
                return
            found = {}
            for group in self.graph.groups:
                mask = np.ones(self.graph.units, dtype=np.bool_)
                mask[group.units] = _random_half(self.graph, rng)[group.units]
                failure = self._failure(mask)
                if failure is not None:
                    found[group.name] = f"the network breaks when it is pruned: {failure}"
            if not found:  # only the combination fails: nothing can be trusted
                found = {
                    group.name: "pruning several groups together breaks the network" for group in self.graph.groups
                }
            broken.update(found)
            self.graph = build_graph(self._trace, self.keep, broken)

    def _failure(self, mask: NDArray[np.bool_]) -> str | None:
        try:
            difference = self._difference(mask)
        except Exception as fault:
            return f"{type(fault).__name__}: {str(fault).splitlines()[0][:200]}" if str(fault) else type(fault).__name__
        if not difference <= CHECK_TOLERANCE:
            return f"outputs differ from the masked network by {difference:.2g} of their size"
        return None


def _random_half(graph: ChannelGraph, rng: np.random.Generator) -> NDArray[np.bool_]:
    """Keep half of every group (at least one channel), at random."""
    mask = np.zeros(graph.units, dtype=np.bool_)
    for group in graph.groups:
        mask[group.start + rng.permutation(group.size)[: max(1, group.size // 2)]] = True
    return mask
