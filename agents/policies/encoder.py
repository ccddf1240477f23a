"""The graph network that reads a pruning state: GATv2 over channel nodes, then a transformer over groups.

Plain PyTorch and PyG; nothing here knows about reinforcement learning. No layer's size depends on how many
groups, nodes or edges a network has, so one set of weights reads every network.

Shapes, here and in the policy: ``B`` graphs, ``G`` groups, ``K`` bins of channels per group (a bin is a
node), ``E`` edges, ``N`` real nodes and ``M`` real edges of all graphs together, ``T = 1 + G`` tokens, ``D``
width, ``H`` heads. ``G``, ``K`` and ``E`` include padding, which the masks tell apart.

Local message passing, global attention and MLPs follow Rampášek et al., "Recipe for a General, Powerful,
Scalable Graph Transformer", NeurIPS 2022; here the global attention is between groups, not nodes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import NamedTuple, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch_geometric.nn import GATv2Conv

from prunegym.pruning.errors import PruningError

Observation: TypeAlias = Mapping[str, Tensor]


@dataclass(frozen=True)
class EncoderConfig:
    """Sizes of the encoder; the same for every network that a policy is used on.

    Args:
        node_features: Features per node.
        edge_features: Features per edge.
        group_features: Features per group.
        state_features: Features of the whole state.
        width: Size of every embedding; a multiple of ``heads``.
        heads: Attention heads, of the graph layers, of the pooling and of the transformer.
        gat_layers: Graph attention layers; information travels this many edges.
        transformer_layers: Transformer layers over the groups.

    Raises:
        PruningError: A size is not positive, or ``width`` is not a multiple of ``heads``.
    """

    node_features: int
    edge_features: int
    group_features: int
    state_features: int
    width: int = 64
    heads: int = 4
    gat_layers: int = 2
    transformer_layers: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            least = 0 if field.name.endswith("_layers") else 1
            # bool is an int: a file that says `true` is damaged, not of size one
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise PruningError(f"`{field.name}` should be a whole number of at least {least}. Received {value!r}.")
        if self.width % self.heads:
            raise PruningError(
                f"`width` should be a multiple of `heads` ({self.heads}). Received {self.width}. "
                f"Use {self.heads * max(1, round(self.width / self.heads))}."
            )


class GraphAttention(NamedTuple):
    """Where an encoder looked; padding is 0.

    Args:
        groups: ``(B, G)`` attention that each group receives in the transformer, averaged over layers, heads
            and the real tokens that look; with that of the global token it sums to 1.
        bins: ``(B, G, K)`` share of each bin in its group's token, averaged over heads; sums to 1 per group.
        edges: ``(B, E)`` weight of each edge among those into the same node, averaged over layers and heads.
        between: ``(B, T, T)`` attention that each token pays to each other in the transformer, averaged over layers
            and heads; the first token is the global one. Rows of real tokens sum to 1.
    """

    groups: Tensor
    bins: Tensor
    edges: Tensor
    between: Tensor


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two linear layers with a GELU between them."""
    return nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, outputs))


class GraphLayer(nn.Module):
    """Messages along the edges, then an MLP per node; each with a residual connection and a norm.

    Args:
        config: Sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        # No self-loops: the residual connection already carries a node's own state, and so the attention
        # weights are those of the edges given. Edges are directed; who wants both directions gives both.
        self.conv: nn.Module = GATv2Conv(
            config.width,
            config.width // config.heads,
            heads=config.heads,
            edge_dim=config.edge_features,
            add_self_loops=False,
        )
        self.mlp = mlp(config.width, 2 * config.width, config.width)
        # LayerNorm where GPS has BatchNorm: a node's result must not depend on what else is in the batch.
        self.norm1 = nn.LayerNorm(config.width)
        self.norm2 = nn.LayerNorm(config.width)

    def forward(self, nodes: Tensor, edges: Tensor, edge_features: Tensor) -> tuple[Tensor, Tensor]:
        """Update the nodes.

        Args:
            nodes: ``(N, D)``.
            edges: ``(2, M)`` int64, source and target.
            edge_features: ``(M, F_e)``.

        Returns:
            Nodes ``(N, D)`` and the attention weight of each edge ``(M, H)``.
        """
        messages, (_, weights) = self.conv(nodes, edges, edge_features, return_attention_weights=True)
        nodes = self.norm1(nodes + messages)
        return self.norm2(nodes + self.mlp(nodes)), weights


class BinPooling(nn.Module):
    """One vector per group from its bins: a learned weighted mean, separately per head.

    Args:
        config: Sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.score = nn.Linear(config.width, config.heads, bias=False)  # a softmax does not see a constant
        self.value = nn.Linear(config.width, config.width)

    def forward(self, nodes: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Pool the bins of each group.

        Args:
            nodes: ``(B, G, K, D)``.
            mask: ``(B, G, K)`` bool.

        Returns:
            ``(B, G, D)``, and the weights ``(B, G, K, H)``; 0 for a group without bins.
        """
        score = self.score(nodes)  # (B, G, K, H)
        # the smallest float instead of -inf: a softmax over nothing but -inf is NaN
        score = score.masked_fill(~mask[..., None], torch.finfo(score.dtype).min)
        weights = score.softmax(dim=2) * mask[..., None]  # (B, G, K, H)
        value = self.value(nodes).unflatten(-1, (weights.shape[-1], -1))  # (B, G, K, H, D/H)
        return (weights[..., None] * value).sum(dim=2).flatten(-2), weights  # (B, G, D)


class TransformerBlock(nn.Module):
    """Pre-norm attention between tokens, then an MLP per token.

    Tokens carry no position: a group's depth is one of its features, and the order of groups means nothing.
    The attention is written out, so that rollouts (without gradients) and updates run the same arithmetic and
    the weights are at hand; PyTorch's own layer switches kernels. There are a few hundred tokens at most.

    Args:
        config: Sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(config.width)
        self.queries_keys_values = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)
        self.norm2 = nn.LayerNorm(config.width)
        self.mlp = mlp(config.width, 4 * config.width, config.width)

    def forward(self, tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Update the tokens.

        Args:
            tokens: ``(B, T, D)``.
            mask: ``(B, T)`` bool, at least one per row; no token looks at those outside.

        Returns:
            Tokens ``(B, T, D)`` and weights ``(B, H, T, T)``, the last axis being what is looked at.
        """
        joined = self.queries_keys_values(self.norm1(tokens)).unflatten(-1, (3, self.heads, -1))
        query, key, value = joined.permute(2, 0, 3, 1, 4)  # (B, H, T, D/H) each
        score = query @ key.transpose(-2, -1) / math.sqrt(key.shape[-1])  # (B, H, T, T)
        weights = score.masked_fill(~mask[:, None, None, :], -math.inf).softmax(dim=-1)
        tokens = tokens + self.out((weights @ value).transpose(1, 2).flatten(-2))  # (B, T, D)
        return tokens + self.mlp(self.norm2(tokens)), weights


class GraphEncoder(nn.Module):
    """Reads a batch of observations into one token per group and one global token.

    Args:
        config: Sizes.
    """

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.node_embedding = mlp(config.node_features, width, width)
        self.graph_layers = nn.ModuleList(GraphLayer(config) for _ in range(config.gat_layers))
        self.pooling = BinPooling(config)
        self.group_embedding = mlp(config.group_features, width, width)
        self.join = nn.Linear(2 * width, width)
        self.state_embedding = mlp(config.state_features, width, width)
        self.blocks = nn.ModuleList(TransformerBlock(config) for _ in range(config.transformer_layers))
        self.norm = nn.LayerNorm(width)

    def forward(self, observation: Observation) -> tuple[Tensor, Tensor]:
        """Encode observations.

        Args:
            observation: ``nodes`` ``(B, G, K, F_n)``, ``node_mask`` ``(B, G, K)``, ``edges`` ``(B, 2, E)``
                (source and target as ``group * K + bin``, any dtype), ``edge_features`` ``(B, E, F_e)``,
                ``edge_mask`` ``(B, E)``, ``groups`` ``(B, G, F_g)``, ``group_mask`` ``(B, G)``,
                ``state`` ``(B, F_s)``. More keys are ignored, and edges at nodes outside the mask.

        Returns:
            Group tokens ``(B, G, D)``, 0 for padding, and global tokens ``(B, D)``.

        Raises:
            PruningError: A part is missing, or has another number of features than the encoder.
        """
        self._check(observation)
        pooled, _, _ = self._read_graphs(observation)
        tokens, _ = self._relate_groups(observation, pooled)
        return tokens[:, 1:] * (observation["group_mask"] > 0)[..., None], tokens[:, 0]

    def attention(self, observation: Observation) -> GraphAttention:
        """Where the encoder looks.

        Args:
            observation: As for :meth:`forward`.

        Returns:
            Attention on groups, bins and edges, and between the tokens.

        Raises:
            PruningError: As for :meth:`forward`.
        """
        self._check(observation)
        pooled, bins, edges = self._read_graphs(observation)
        _, weights = self._relate_groups(observation, pooled)
        tokens = 1 + pooled.shape[1]
        between = pooled.new_zeros(pooled.shape[0], tokens, tokens)
        looking = self._token_mask(observation).to(pooled.dtype)  # (B, T)
        if weights:
            # what padding looks at means nothing
            between = torch.stack(weights).mean(dim=(0, 2)) * looking[..., None]
        received = between.sum(dim=1) / looking.sum(dim=1, keepdim=True)  # (B, T)
        return GraphAttention(received[:, 1:], bins.mean(dim=-1), edges, between)

    def _read_graphs(self, observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
        """Pass messages, then pool.

        Returns:
            One vector per group ``(B, G, D)``, weights of bins ``(B, G, K, H)`` and of edges ``(B, E)``.
        """
        node_mask = observation["node_mask"] > 0  # (B, G, K)
        real, edges, real_edges = _flatten_graphs(observation)
        # padding is left out rather than masked: most of a padded batch can be padding
        nodes = self.node_embedding(observation["nodes"].flatten(0, 2)[real])  # (N, D)
        features = observation["edge_features"][real_edges]  # (M, F_e)
        used = features.new_zeros(real_edges.shape)  # (B, E)
        for layer in self.graph_layers:
            nodes, weights = layer(nodes, edges, features)
            used[real_edges] += weights.detach().mean(dim=-1) / len(self.graph_layers)
        dense = nodes.new_zeros(node_mask.numel(), nodes.shape[-1]).index_copy(0, real, nodes)
        pooled, bins = self.pooling(dense.unflatten(0, node_mask.shape), node_mask)
        return pooled, bins, used

    def _relate_groups(self, observation: Observation, pooled: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Let groups and the global token attend to each other: ``(B, T, D)`` and each layer's weights."""
        groups = self.join(torch.cat([pooled, self.group_embedding(observation["groups"])], dim=-1))
        tokens = torch.cat([self.state_embedding(observation["state"])[:, None], groups], dim=1)  # (B, T, D)
        mask = self._token_mask(observation)
        weights = []
        for block in self.blocks:
            tokens, seen = block(tokens, mask)
            weights.append(seen)
        return cast(Tensor, self.norm(tokens)), weights

    @staticmethod
    def _token_mask(observation: Observation) -> Tensor:
        """Which tokens are real, ``(B, T)`` bool: the global one always."""
        return nn.functional.pad(observation["group_mask"] > 0, (1, 0), value=True)

    def _check(self, observation: Observation) -> None:
        """Refuse an observation that this encoder was not made for."""
        sizes = {
            "nodes": self.config.node_features,
            "edge_features": self.config.edge_features,
            "groups": self.config.group_features,
            "state": self.config.state_features,
        }
        missing = sorted({*sizes, "edges", "node_mask", "edge_mask", "group_mask"} - set(observation))
        if missing:
            raise PruningError(
                f"`observation` should have '{missing[0]}', as those of `ChannelPruning-v0` do. "
                f"Received only {sorted(observation)}. Take it from the environment."
            )
        for name, size in sizes.items():
            if observation[name].shape[-1] != size:
                raise PruningError(
                    f"`observation['{name}']` should have {size} features, for which the policy was made. "
                    f"Received {observation[name].shape[-1]}. Use a policy and an environment of one version."
                )


def _flatten_graphs(observation: Observation) -> tuple[Tensor, Tensor, Tensor]:
    """Make one graph of a batch of padded ones, without the padding.

    Returns:
        Positions of the real nodes in ``B * G * K``, ``(N,)``; edges between real nodes, which are numbered
        from 0 to ``N - 1``, ``(2, M)`` int64; which edges these are, ``(B, E)`` bool.
    """
    node_mask = (observation["node_mask"] > 0).flatten()  # (B*G*K,)
    size = observation["node_mask"][0].numel()
    # buffers of stable-baselines3 hold floats; indices are exact up to 2**24
    edges = observation["edges"].long()  # (B, 2, E)
    ends = edges + size * torch.arange(len(edges), device=edges.device)[:, None, None]
    real_edges = (observation["edge_mask"] > 0) & node_mask[ends].all(dim=1)  # (B, E)
    number = node_mask.cumsum(0) - 1  # of each real node among the real ones
    return node_mask.nonzero().squeeze(1), number[ends.transpose(0, 1)[:, real_edges]], real_edges
