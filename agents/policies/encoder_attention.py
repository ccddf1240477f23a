"""The criterion `encoder_attention`: channels that the encoder of a trained policy attends to stay."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from prunegym.agents.policies.policy import PruningPolicy
from prunegym.envs.observation import EpisodeState, Observer
from prunegym.pruning.graph import ChannelGroup
from prunegym.pruning.importance.criteria import ENCODER_ATTENTION, Context, Scores
from prunegym.pruning.network import PrunableNetwork


class EncoderAttention:
    """Scores channels by the attention with which a policy's encoder pools the nodes of a group.

    A node stands for channels of neighbouring rank, and each of them gets the attention of its node. Among the
    channels of one node, and of nodes of equal attention, the Taylor score decides. The attention is formed
    from nodes and edges alone, before the encoder reads budget, round and prior, so that these are left blank:
    the scores do not depend on the budget. An untrained policy attends to something, too, but nothing that means
    anything.

    Args:
        agent: the policy.
        network: the network that is pruned. Its nodes are those of the environment: cut by the statistics of
            the unpruned network, which must therefore be the first to be scored.
    """

    def __init__(self, agent: PruningPolicy, network: PrunableNetwork) -> None:
        self._agent = agent
        self._network = network
        self._observer: Observer | None = None

    def __call__(self, group: ChannelGroup, context: Context) -> Scores:
        """Scores of a group's channels ``(group.size,)``, as every criterion gives them."""
        return context.once(ENCODER_ATTENTION, lambda: self._unit_scores(context))[group.units].copy()

    def _unit_scores(self, context: Context) -> Scores:
        statistics = context.data(ENCODER_ATTENTION)
        graph = context.graph
        if self._observer is None:
            self._observer = Observer(self._network, statistics)
        episode = EpisodeState.bare(graph, statistics, context.mask)
        attention = self._agent.attention(self._observer.observe(episode, self._observer.padding))
        per_unit = attention.bins[0].double().cpu().numpy().ravel()[self._observer.bin_of]
        scores = np.zeros(graph.units)
        for group in graph.groups:
            scores[group.units] = with_ties_broken(per_unit[group.units], statistics.taylor[group.units])
        return scores


def with_ties_broken(values: NDArray[np.float64], by: NDArray[np.float64]) -> Scores:
    """Values with equal ones set apart in the order of ``by``, and no other order changed.

    Args:
        values: non-negative ``(n,)``.
        by: ``(n,)``.

    Returns:
        ``values`` plus less than half of the smallest step between two of them.
    """
    distinct = np.unique(values)
    step = np.diff(distinct).min() if len(distinct) > 1 else 1.0
    rank = np.empty(len(by))
    rank[np.argsort(by, kind="stable")] = np.arange(len(by))
    scores: Scores = values + rank / len(by) * step / 2
    return scores
