"""The channel graph as a padded ``Dict`` observation.

Each prunable group is cut into at most ``bins`` nodes of channels of neighbouring rank. Features are
normalised by fixed rules (logs, shares of the total) that do not depend on the network at hand, so that the
same number means the same on two networks. What does not change during an episode is computed once per
network.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray

from prunegym.pruning.graph import ChannelGraph, Operation
from prunegym.pruning.importance.criteria import Context, filters, unit_scores
from prunegym.pruning.importance.statistics import Statistics
from prunegym.pruning.network import PrunableNetwork

Observation: TypeAlias = dict[str, NDArray[np.generic]]
Floats: TypeAlias = NDArray[np.float64]

OBSERVATION_VERSION = 3
"""Raised whenever a feature changes its meaning: policies trained on another version are refused."""
BINS = 16
NEIGHBOURS = 4
"""Strongest connections kept per node and kind of edge."""

NODE_FEATURES = (
    "weight_norm",  # log of the filter norm over the group's mean
    "bn_scale",  # log of |gamma| over the group's mean
    "activation_mean",  # log1p
    "activation_variance",  # log1p
    "activation_sparsity",  # share of zeros
    "taylor_share",  # log of the share of the network's squared Taylor scores, per channel times channels
    "taylor_rank",  # log of the squared Taylor score over the group's mean
    "similarity",  # cosine with the nearest other filter of the group
    "rank",  # position of the bin in the group, best first, 0 to 1
    "share",  # channels of the bin over channels of the group
    "kept",  # share of the bin's channels that are left
)
NODE_DATA_COLUMNS = (2, 3, 4, 5, 6)

GROUP_FEATURES = (
    "log_width",
    "log_spatial",  # log2 of the side of the feature map, over 8
    "kernel",  # largest kernel among producers, over 7
    "stride",
    "depth",  # position among the groups, 0 to 1
    "producers",  # log2 of the number of layers that make these channels
    "consumers",
    "depthwise",  # 1 if a depthwise convolution is among them
    "macs_share",  # MACs of the layers around, as a share of the network's
    "macs_slope",  # share of MACs saved by giving up the whole group, to first order
    "params_slope",
    "cost_slope",  # the same for the resource of the budget
    "kept",  # channels left over channels
    "taylor_share",  # share of the network's squared Taylor scores, log
    "taylor_q10",
    "taylor_q25",
    "taylor_q50",
    "taylor_q75",
    "taylor_q90",  # quantiles of log Taylor scores over the group's mean
    "norm_q10",
    "norm_q50",
    "norm_q90",
    "sparsity",
    "prior",  # the allocation to start from, by default the knapsack, as an action
    "uniform",  # the uniform allocation, as an action
)
GROUP_DATA_COLUMNS = (13, 14, 15, 16, 17, 18, 22, 23)

EDGE_FEATURES = ("strength", "forward", "backward", "similar")

STATE_FEATURES = (
    "budget",  # share of the cost that may remain at the end
    "log_budget",
    "round_budget",
    "macs",
    "params",
    "latency",  # which resource is budgeted
    "progress",  # rounds done over rounds
    "cost",  # share of the cost that remains now
    "unpruned_score",
    "log_groups",  # log2 of the number of groups, over 8
    "finetuned",  # 1 where training steps come before a score
)

_FLOOR = 1e-6  # of the mean: what is smaller counts as nothing
_TINY = 1e-30  # keeps divisions by a sum of zeros defined


@dataclass(frozen=True)
class Padding:
    """Sizes of the padded observation: large enough for every network that shares it."""

    groups: int
    edges: int
    bins: int = BINS

    def covering(self, other: Padding) -> Padding:
        """The smallest padding that holds both."""
        return Padding(max(self.groups, other.groups), max(self.edges, other.edges), max(self.bins, other.bins))


def observation_space(padding: Padding) -> spaces.Dict:
    """The space of all observations of that size."""

    def box(*shape: int, low: float = -np.inf, high: float = np.inf) -> spaces.Box:
        return spaces.Box(low, high, shape, np.float32)

    groups, bins, edges = padding.groups, padding.bins, padding.edges
    return spaces.Dict(
        {
            "nodes": box(groups, bins, len(NODE_FEATURES)),
            "node_mask": box(groups, bins, low=0, high=1),
            "edges": spaces.Box(0, groups * bins - 1, (2, edges), np.int64),
            "edge_features": box(edges, len(EDGE_FEATURES)),
            "edge_mask": box(edges, low=0, high=1),
            "groups": box(groups, len(GROUP_FEATURES)),
            "group_mask": box(groups, low=0, high=1),
            "prior": box(groups, low=-1, high=1),
            "state": box(len(STATE_FEATURES)),
        }
    )


@dataclass(frozen=True, kw_only=True)
class EpisodeState:
    """What the observation needs to know of the episode."""

    mask: NDArray[np.bool_]
    """Units left ``(units,)``."""
    counts: NDArray[np.int64]
    statistics: Statistics
    cost_slope: Floats
    """Share of the budgeted cost saved by giving up each group, to first order ``(groups,)``."""
    prior: NDArray[np.float32]
    uniform: NDArray[np.float32]
    state: NDArray[np.float32]
    """Global features, see ``STATE_FEATURES``."""

    @classmethod
    def bare(cls, graph: ChannelGraph, statistics: Statistics, mask: NDArray[np.bool_] | None = None) -> EpisodeState:
        """A network without a budget: what is about budget, round and allocations is left blank."""
        mask = np.ones(graph.units, dtype=np.bool_) if mask is None else mask
        blank = np.zeros(len(graph.groups), dtype=np.float32)
        return cls(
            mask=mask,
            counts=np.bincount(graph.group_of[mask], minlength=len(graph.groups)),
            statistics=statistics,
            cost_slope=blank.astype(np.float64),
            prior=blank,
            uniform=blank,
            state=np.zeros(len(STATE_FEATURES), dtype=np.float32),
        )


class Observer:
    """Makes observations of one network.

    Args:
        network: the network.
        statistics: of the unpruned network; they fix which channels share a bin.
        bins: nodes per group at most.
    """

    def __init__(self, network: PrunableNetwork, statistics: Statistics, bins: int = BINS) -> None:
        self.network = network
        graph = network.graph
        context = Context(network.model, graph, statistics)
        self._norms = _relative_log(unit_scores("l2", context), graph.group_of)
        self._scales = _relative_log(unit_scores("bn_scale", context), graph.group_of)
        self._similarity = np.concatenate([_nearest(filters(group, context), group.size) for group in graph.groups])
        self.bins = min(bins, int(graph.sizes.max()))
        self.bin_of = self._bin_units(statistics.taylor_squared)
        self._count = self._per_bin(np.ones(graph.units))
        self.edges, self.edge_features = self._connect()
        self._static = self._group_constants()
        self.padding = Padding(len(graph.groups), self.edges.shape[1], self.bins)

    def observe(self, episode: EpisodeState, padding: Padding) -> Observation:
        """The padded observation of an episode's state."""
        groups, bins, edges = len(self.network.graph.groups), self.bins, self.edges.shape[1]
        result: Observation = {
            key: np.zeros(space.shape or (), dtype=space.dtype) for key, space in observation_space(padding).items()
        }
        result["nodes"][:groups, :bins] = self._nodes(episode)
        result["node_mask"][:groups, :bins] = self._count > 0
        source, target = self.edges
        # flat node numbers count the padded bins
        result["edges"][0, :edges] = source // bins * padding.bins + source % bins
        result["edges"][1, :edges] = target // bins * padding.bins + target % bins
        result["edge_features"][:edges] = self.edge_features
        result["edge_mask"][:edges] = 1
        result["groups"][:groups] = self._groups(episode)
        result["group_mask"][:groups] = 1
        result["prior"][:groups] = episode.prior
        result["state"][:] = episode.state
        return result

    def _bin_units(self, scores: Floats) -> NDArray[np.int64]:
        """Flat bin number of each unit: channels of neighbouring rank share a bin."""
        bin_of = np.zeros(self.network.graph.units, dtype=np.int64)
        for index, group in enumerate(self.network.graph.groups):
            rank = np.empty(group.size, dtype=np.int64)
            rank[np.argsort(-scores[group.units], kind="stable")] = np.arange(group.size)
            bin_of[group.units] = index * self.bins + rank * min(self.bins, group.size) // group.size
        return bin_of

    def _per_bin(self, values: Floats) -> Floats:
        """Sum over the units of each bin ``(groups, bins)``."""
        nodes = len(self.network.graph.groups) * self.bins
        total: Floats = np.bincount(self.bin_of, weights=values, minlength=nodes).astype(np.float64)
        return total.reshape(-1, self.bins)

    def _nodes(self, episode: EpisodeState) -> NDArray[np.float32]:
        graph, statistics = self.network.graph, episode.statistics
        taylor = statistics.taylor_squared
        share = taylor / max(float(taylor.sum()), _TINY) * graph.units
        sizes = graph.sizes.astype(np.float64)
        columns = [
            self._norms,
            self._scales,
            np.log1p(statistics.activation_mean),
            np.log1p(statistics.activation_variance),
            statistics.activation_sparsity,
            np.log(share + 1e-4) / 4,
            _relative_log(taylor, graph.group_of) / 2,
            self._similarity,
            # by the bins of its own group: a wider group beside it changes nothing
            (self.bin_of % self.bins) / np.maximum(np.minimum(sizes, self.bins)[graph.group_of] - 1, 1),
            1 / sizes[graph.group_of] * np.maximum(self._count.ravel()[self.bin_of], 1),
            episode.mask.astype(np.float64),
        ]
        means = [self._per_bin(column) / np.maximum(self._count, 1) for column in columns]
        return np.stack(means, axis=-1).astype(np.float32)

    def _groups(self, episode: EpisodeState) -> NDArray[np.float32]:
        graph = self.network.graph
        taylor = episode.statistics.taylor_squared
        relative = _relative_log(taylor, graph.group_of) / 2
        total = max(float(taylor.sum()), _TINY)
        rows = []
        for index, group in enumerate(graph.groups):
            left = episode.mask[group.units]
            own, norms = relative[group.units][left], self._norms[group.units][left]
            rows.append(
                [
                    *self._static[index],
                    episode.cost_slope[index],
                    episode.counts[index] / group.size,
                    np.log(taylor[group.units].sum() / total * len(graph.groups) + 1e-4) / 4,
                    *np.quantile(own, (0.1, 0.25, 0.5, 0.75, 0.9)),
                    *np.quantile(norms, (0.1, 0.5, 0.9)),
                    episode.statistics.activation_sparsity[group.units][left].mean(),
                    episode.prior[index],
                    episode.uniform[index],
                ]
            )
        return np.asarray(rows, dtype=np.float32)

    def _group_constants(self) -> list[list[float]]:
        """Group features that pruning does not change."""
        graph, costs = self.network.graph, self.network.costs
        macs = costs.operation_macs(graph.sizes)
        rows = []
        for index, group in enumerate(graph.groups):
            made = [one for one in graph.operations if one.module in group.producers]
            around = [k for k, one in enumerate(graph.operations) if one.module in {*group.producers, *group.consumers}]
            side = max((one.output_shape[-1] for one in made if len(one.output_shape) == 4), default=1)
            fewer = graph.sizes.copy()
            fewer[index] -= 1
            rows.append(
                [
                    np.log2(group.size) / 10,
                    np.log2(side) / 8,
                    max((one.kernel[-1] for one in made if one.kernel), default=1) / 7,
                    max((one.stride[-1] for one in made if one.stride), default=1) / 2,
                    index / max(len(graph.groups) - 1, 1),
                    np.log2(max(len(group.producers), 1)) / 4,
                    np.log2(max(len(group.consumers), 1)) / 4,
                    float(any(one.kind == "depthwise" for one in made)),
                    float(macs[around].sum() / max(macs.sum(), 1)),
                    (1 - costs.macs(fewer) / costs.full.macs) * group.size,
                    (1 - costs.parameters(fewer) / costs.full.parameters) * group.size,
                ]
            )
        return rows

    def _connect(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Strongest edges between producer and consumer bins, both ways, and between neighbouring bins."""
        parameters = dict(self.network.model.named_parameters())
        sources: list[NDArray[np.int64]] = []
        targets: list[NDArray[np.int64]] = []
        features: list[NDArray[np.float32]] = []

        def add(source: NDArray[np.int64], target: NDArray[np.int64], strength: Floats, kind: int) -> None:
            row = np.zeros((len(source), len(EDGE_FEATURES)), dtype=np.float32)
            row[:, 0] = np.log(strength + 1e-4) / 4
            row[:, kind] = 1
            sources.append(source)
            targets.append(target)
            features.append(row)

        for one in self.network.graph.operations:
            if one.mixes and one.weight is not None and (one.inputs >= 0).any() and (one.outputs >= 0).any():
                source, target, strength = self._kernel_edges(one, parameters[one.weight].detach())
                add(source, target, strength, 1)
                add(target, source, strength, 2)
        nodes = np.unique(self.bin_of)
        for node in range(len(nodes) - 1):
            if nodes[node] // self.bins == nodes[node + 1] // self.bins:
                pair = nodes[node : node + 2]
                add(pair, pair[::-1], np.ones(2), 3)
        if not sources:
            return np.zeros((2, 1), dtype=np.int64), np.zeros((1, len(EDGE_FEATURES)), dtype=np.float32)
        return np.stack([np.concatenate(sources), np.concatenate(targets)]), np.concatenate(features)

    def _kernel_edges(
        self, one: Operation, weight: torch.Tensor
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats]:
        """The strongest inputs of each output bin of a layer, by the energy of the kernels that tie them."""
        energy = weight.movedim(one.reads, 1).flatten(2).square().sum(2) if weight.ndim > 2 else weight.square()
        if weight.ndim == 2 and one.reads == 0:
            energy = energy.T
        reads, makes = one.inputs >= 0, one.outputs >= 0
        values = energy.double().cpu().numpy()[np.ix_(makes, reads)]
        inputs, columns = np.unique(self.bin_of[one.inputs[reads]], return_inverse=True)
        outputs, rows = np.unique(self.bin_of[one.outputs[makes]], return_inverse=True)
        table = np.zeros((len(outputs), len(inputs)))
        np.add.at(table, (rows[:, None], columns[None, :]), values)
        table /= max(table.sum(), _TINY)
        strongest = np.argsort(-table, axis=1, kind="stable")[:, :NEIGHBOURS]
        target = np.repeat(outputs, strongest.shape[1])
        share = np.take_along_axis(table, strongest, axis=1).ravel() * len(outputs)
        return inputs[strongest.ravel()], target, share


def _relative_log(values: Floats, group_of: NDArray[np.int64]) -> Floats:
    """Log of each value over the mean of its group, within [-4, 4]."""
    if len(values) == 0:
        return values
    mean = np.bincount(group_of, weights=values) / np.maximum(np.bincount(group_of), 1)
    floor = _FLOOR * mean[group_of] + _TINY
    result: Floats = np.clip(np.log((values + floor) / (mean[group_of] + floor)), -4, 4)
    return result


def _nearest(parts: list[torch.Tensor], size: int) -> Floats:
    """Cosine of each filter with the most similar other one of its group ``(size,)``."""
    if not parts or size < 2:
        return np.zeros(size)
    weights = torch.nn.functional.normalize(torch.cat(parts, dim=1).float(), dim=1)
    cosine = weights @ weights.T
    cosine.fill_diagonal_(-1.0)
    result: Floats = cosine.max(1).values.double().numpy()
    return result
