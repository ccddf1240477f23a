"""A small attention network over the layers of a network, which says how wide and how deep it should be.

Its tokens are the channel groups, described by the features that the environment shows of them, and the residual
blocks, described by the mean of the groups inside them. It is trained anew for each network: what it knows of a token
by itself is a logit of its own, and attention adds what follows from the others.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.agents.policies.encoder import EncoderConfig, TransformerBlock, mlp
from prunegym.agents.searching.search import Counts
from prunegym.envs.observation import GROUP_FEATURES, EpisodeState, Observer
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.blocks import inside

CANDIDATES = 8
"""Most widths that a group chooses from, evenly spaced from the least it may keep to the most."""
WIDTH, HEADS = 32, 4
WIDE, DEEP = 4.0, 2.0
"""Logit of all channels of a group, and of a block, before training: most is there, and can move."""


def candidate_counts(problem: PruningProblem) -> list[Counts]:
    """For each group the counts it chooses from, rising."""
    return [
        allowed[np.unique(np.linspace(0, len(allowed) - 1, min(len(allowed), CANDIDATES)).round().astype(np.int64))]
        for allowed in problem.widths.choices()
    ]


class LayerAttention(nn.Module):
    """Logits of the candidate widths of each group, and that each block stays.

    Args:
        tokens: features of groups and blocks ``(G + B, F)``, the groups first.
        counts: candidate widths ``(G, K)``; 0 where a group has fewer.
        sizes: channels of each group ``(G,)``.
    """

    def __init__(self, tokens: Tensor, counts: Tensor, sizes: Tensor) -> None:
        super().__init__()
        blocks = len(tokens) - len(counts)
        self.tokens, self.absent = tokens, counts == 0
        config = EncoderConfig(tokens.shape[1], 1, 1, 1, width=WIDTH, heads=HEADS)
        self.embedding, self.attention = mlp(tokens.shape[1], WIDTH, WIDTH), TransformerBlock(config)
        self.norm = nn.LayerNorm(WIDTH)
        self.widths, self.depth = nn.Linear(WIDTH, counts.shape[1]), nn.Linear(WIDTH, 1)
        for head in (self.widths, self.depth):  # the logits before training are those of WIDE and DEEP alone
            nn.init.zeros_(head.weight)
            nn.init.zeros_(head.bias)
        self.own_widths = nn.Parameter(WIDE * (counts / sizes[:, None]).float())
        self.own_depth = nn.Parameter(torch.full((blocks,), DEEP))

    def forward(self) -> tuple[Tensor, Tensor]:
        """Logits of the widths ``(G, K)``, -inf where there is no candidate, and of the blocks ``(B,)``."""
        everyone = torch.ones(1, len(self.tokens), dtype=torch.bool)
        seen = self.norm(self.attention(self.embedding(self.tokens)[None], everyone)[0][0])  # (G + B, D)
        groups = len(self.absent)
        widths = (self.own_widths + self.widths(seen[:groups])).masked_fill(self.absent, -torch.inf)
        return widths, self.own_depth + self.depth(seen[groups:]).squeeze(-1)


def layer_tokens(problem: PruningProblem, blocks: tuple[str, ...]) -> Tensor:
    """Features of the unpruned network's groups and blocks ``(G + B, F)`` float32.

    The last two columns are 1 for blocks, and the share of the network's MACs in a block.
    """
    network, statistics = problem.scorer.network, problem.scorer.statistics
    graph = network.graph
    observer = Observer(network, statistics)
    episode = EpisodeState.bare(graph, statistics)
    groups = np.asarray(observer.observe(episode, observer.padding)["groups"], dtype=np.float32)
    macs = network.costs.operation_macs(graph.sizes)
    rows = [np.append(one, [0.0, 0.0]) for one in groups]
    for block in blocks:
        parts = [index for index, one in enumerate(graph.groups) if any(inside(path, block) for path in one.producers)]
        mean = groups[parts].mean(0) if parts else np.zeros(len(GROUP_FEATURES))
        own = np.array([inside(one.module, block) for one in graph.operations])
        rows.append(np.append(mean, [1.0, macs[own].sum() / max(macs.sum(), 1.0)]))
    return torch.from_numpy(np.stack(rows)).float()


def gumbel_softmax(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """A soft draw from each row of logits ``(..., K)``; nearly one-hot where the temperature is low.

    Jang et al., "Categorical Reparameterization with Gumbel-Softmax", ICLR 2017. PyTorch's own draws from the global
    generator.
    """
    uniform = torch.rand(logits.shape, generator=generator).clamp(1e-9, 1 - 1e-7)
    return F.softmax((logits - torch.log(-torch.log(uniform))) / temperature, dim=-1)


def width_masks(problem: PruningProblem, candidates: list[Counts]) -> Tensor:
    """Which units each candidate width of their group keeps ``(units, K)`` float32, by the scorer's criterion."""
    graph, scores = problem.scorer.network.graph, problem.scorer.unit_scores
    kept: NDArray[np.float32] = np.zeros((graph.units, max(map(len, candidates))), dtype=np.float32)
    for group, counts in zip(graph.groups, candidates, strict=True):
        rank = np.empty(group.size, dtype=np.int64)
        rank[np.argsort(-scores[group.units], kind="stable")] = np.arange(group.size)
        kept[group.units, : len(counts)] = rank[:, None] < counts
    return torch.from_numpy(kept)
