"""The encoder reads graphs, not paddings or orders."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from prunegym.agents.policies.encoder import BinPooling, EncoderConfig, GraphEncoder, TransformerBlock
from prunegym.pruning.errors import PruningError

CONFIG = EncoderConfig(node_features=5, edge_features=3, group_features=4, state_features=2, width=16, heads=2)
GROUPS, BINS, EDGES = 4, 3, 20


@pytest.fixture
def encoder() -> GraphEncoder:
    """A small one, always the same."""
    torch.manual_seed(0)
    return GraphEncoder(CONFIG).eval()


def graph(seed: int = 0, groups: int = GROUPS, bins: int = BINS, edges: int = EDGES) -> dict[str, Tensor]:
    """A random graph without padding, as a batch of one; all but the first group lack their last bin."""
    generator = torch.Generator().manual_seed(seed)
    node_mask = torch.ones(1, groups, bins)
    node_mask[:, 1:, -1] = 0
    real = node_mask.flatten().nonzero().squeeze(1)
    ends = real[torch.randint(len(real), (1, 2, edges), generator=generator)]
    return {
        "nodes": torch.randn(1, groups, bins, CONFIG.node_features, generator=generator),
        "node_mask": node_mask,
        "edges": ends.float(),  # as buffers of stable-baselines3 hold them
        "edge_features": torch.randn(1, edges, CONFIG.edge_features, generator=generator),
        "edge_mask": torch.ones(1, edges),
        "groups": torch.randn(1, groups, CONFIG.group_features, generator=generator),
        "group_mask": torch.ones(1, groups),
        "state": torch.randn(1, CONFIG.state_features, generator=generator),
    }


def padded(observation: dict[str, Tensor], groups: int, bins: int, edges: int) -> dict[str, Tensor]:
    """The same graph in larger arrays, with rubbish outside the masks."""
    _, old_groups, old_bins, _ = observation["nodes"].shape
    old_edges = observation["edges"].shape[-1]
    rubbish = torch.Generator().manual_seed(99)
    result = {
        "nodes": 9 * torch.randn(1, groups, bins, CONFIG.node_features, generator=rubbish),
        "node_mask": torch.zeros(1, groups, bins),
        "edges": torch.randint(groups * bins, (1, 2, edges), generator=rubbish).float(),
        "edge_features": 9 * torch.randn(1, edges, CONFIG.edge_features, generator=rubbish),
        "edge_mask": torch.zeros(1, edges),
        "groups": 9 * torch.randn(1, groups, CONFIG.group_features, generator=rubbish),
        "group_mask": torch.zeros(1, groups),
        "state": observation["state"],
    }
    for name in ("nodes", "node_mask"):
        result[name][:, :old_groups, :old_bins] = observation[name]
    for name in ("groups", "group_mask"):
        result[name][:, :old_groups] = observation[name]
    for name in ("edge_features", "edge_mask"):
        result[name][:, :old_edges] = observation[name]
    group, place = observation["edges"] // old_bins, observation["edges"] % old_bins
    result["edges"][:, :, :old_edges] = group * bins + place
    return result


def test_padding_changes_nothing(encoder: GraphEncoder) -> None:
    """Networks of different sizes share one observation space."""
    small, large = graph(), padded(graph(), groups=7, bins=5, edges=33)

    tokens, whole = encoder(small)
    padded_tokens, padded_whole = encoder(large)

    torch.testing.assert_close(padded_tokens[:, :GROUPS], tokens, atol=1e-6, rtol=0)
    torch.testing.assert_close(padded_whole, whole, atol=1e-6, rtol=0)
    assert (padded_tokens[:, GROUPS:] == 0).all()


def test_graphs_of_one_batch_do_not_mix(encoder: GraphEncoder) -> None:
    """Two networks side by side are read as each alone."""
    small, large = graph(1), graph(2, groups=6, bins=4, edges=31)
    sizes = {"groups": 6, "bins": 4, "edges": 31}

    batch = {name: torch.cat([value, large[name]]) for name, value in padded(small, **sizes).items()}
    tokens, whole = encoder(batch)

    torch.testing.assert_close(tokens[:1, :GROUPS], encoder(small)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(tokens[1:], encoder(large)[0], atol=1e-6, rtol=0)
    torch.testing.assert_close(whole, torch.cat([encoder(small)[1], encoder(large)[1]]), atol=1e-6, rtol=0)


def test_order_of_groups_means_nothing(encoder: GraphEncoder) -> None:
    """Permuted groups give permuted tokens and the same global token."""
    observation = graph()
    order = torch.tensor([2, 0, 3, 1])  # new place -> old group
    permuted = dict(observation)
    for name in ("nodes", "node_mask", "groups", "group_mask"):
        permuted[name] = observation[name][:, order]
    ends = observation["edges"].long()
    permuted["edges"] = order.argsort()[ends // BINS] * BINS + ends % BINS

    tokens, whole = encoder(observation)
    permuted_tokens, permuted_whole = encoder(permuted)

    torch.testing.assert_close(permuted_tokens, tokens[:, order], atol=1e-6, rtol=0)
    torch.testing.assert_close(permuted_whole, whole, atol=1e-6, rtol=0)


def test_encoding_twice_gives_the_same_bits(encoder: GraphEncoder) -> None:
    """With gradients, as in updates, or without, as in rollouts."""
    with torch.no_grad():
        rollout = encoder(graph())
    update = encoder(graph())

    assert all(torch.equal(one, other) for one, other in zip(rollout, update, strict=True))


def test_edges_carry_information_to_their_targets_only() -> None:
    """Without transformer, a group hears of another one through edges alone."""
    encoder = GraphEncoder(EncoderConfig(5, 3, 4, 2, width=16, heads=2, gat_layers=1, transformer_layers=0)).eval()
    observation = graph()
    observation["edges"] = torch.tensor([0, BINS]).expand(EDGES, 2).T[None]  # group 0, bin 0 -> group 1, bin 0
    changed = {**observation, "nodes": observation["nodes"].clone()}
    changed["nodes"][0, 0, 0] += 1

    difference = (encoder(changed)[0] - encoder(observation)[0]).abs().amax(dim=-1)[0]

    assert (difference[:2] > 1e-4).all()
    assert (difference[2:] == 0).all()


@pytest.mark.parametrize("name", ["nodes", "edge_features", "groups", "state"])
def test_every_part_has_an_influence(encoder: GraphEncoder, name: str) -> None:
    """Nothing of the observation is left unread."""
    observation = graph()
    observation[name].requires_grad_()

    sum(part.square().sum() for part in encoder(observation)[0]).backward()

    assert observation[name].grad is not None
    assert observation[name].grad.abs().flatten(0, -2).sum(dim=0).gt(0).all()


def test_every_parameter_is_trained(encoder: GraphEncoder) -> None:
    """A parameter without gradient is dead weight."""
    tokens, whole = encoder(graph())
    (tokens.square().sum() + whole.cos().sum()).backward()

    assert [name for name, value in encoder.named_parameters() if value.grad is None] == []


def test_edges_at_missing_nodes_do_not_exist(encoder: GraphEncoder) -> None:
    """A careless edge must not shift the numbering of the others."""
    observation = graph()
    extra = torch.tensor([[0.0, 2 * BINS - 1], [2 * BINS - 1, 0.0]])[None]  # last bin of group 1: masked
    careless = {
        **observation,
        "edges": torch.cat([extra, observation["edges"]], dim=2),
        "edge_features": torch.cat([torch.ones(1, 2, 3), observation["edge_features"]], dim=1),
        "edge_mask": torch.ones(1, EDGES + 2),
    }

    torch.testing.assert_close(encoder(careless), encoder(observation), atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["node_mask", "edge_mask", "group_mask"])
def test_empty_graphs_give_finite_tokens(encoder: GraphEncoder, name: str) -> None:
    """No nodes, no edges, no groups: nothing divides by zero, gradients included."""
    observation = graph()
    observation[name] = torch.zeros_like(observation[name])

    tokens, whole = encoder(observation)
    (tokens.sum() + whole.square().sum()).backward()

    assert tokens.isfinite().all()
    assert whole.isfinite().all()
    assert all(value.grad is None or value.grad.isfinite().all() for value in encoder.parameters())


def test_attention_adds_up(encoder: GraphEncoder) -> None:
    """Weights are shares: of a group's bins, of the edges into a node, of what all tokens look at."""
    large = padded(graph(), groups=7, bins=5, edges=33)

    groups, bins, edges, between = encoder.attention(large)

    into = torch.zeros(7 * 5).index_add(0, large["edges"][0, 1].long(), edges[0])
    targets = large["edges"][0, 1, :EDGES].long().unique()
    torch.testing.assert_close(bins.sum(dim=2), large["group_mask"])
    torch.testing.assert_close(into[targets], torch.ones(len(targets)))
    assert 0 < groups.sum() < 1  # the rest goes to the global token
    looking = torch.cat([torch.ones(1, 1), large["group_mask"]], dim=1)
    torch.testing.assert_close(between.sum(dim=2), looking)
    torch.testing.assert_close(between.sum(dim=1)[:, 1:] / looking.sum(), groups)
    assert (groups[:, GROUPS:] == 0).all()
    assert (bins[large["node_mask"] == 0] == 0).all()
    assert (edges[:, EDGES:] == 0).all()


def test_transformer_block_agrees_with_torch() -> None:
    """The attention that is written out is the usual one."""
    torch.manual_seed(0)
    ours = TransformerBlock(CONFIG)
    theirs = nn.TransformerEncoderLayer(16, 2, 64, 0.0, "gelu", batch_first=True, norm_first=True)
    source, target = ours.state_dict(), theirs.state_dict()
    names = {"self_attn.in_proj_": "queries_keys_values.", "self_attn.out_proj.": "out."}
    names |= {"linear1.": "mlp.0.", "linear2.": "mlp.2.", "norm1.": "norm1.", "norm2.": "norm2."}
    for name, other in names.items():
        for part in ("weight", "bias"):
            target[name + part].copy_(source[other + part])
    tokens = torch.randn(3, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 1, 0], [1, 0, 0, 0, 0]]).bool()

    result, weights = ours(tokens, mask)

    torch.testing.assert_close(result[mask], theirs(tokens, src_key_padding_mask=~mask)[mask])
    torch.testing.assert_close(weights.sum(dim=-1), torch.ones(3, 2, 5))


def test_pooling_agrees_with_a_loop() -> None:
    """A softmax over the real bins of a group, for each head on its share of the width."""
    torch.manual_seed(0)
    pooling = BinPooling(CONFIG)
    nodes, mask = torch.randn(1, 2, 3, 16), torch.tensor([[[1, 1, 0], [1, 1, 1]]]).bool()

    pooled, _ = pooling(nodes, mask)

    for group in range(2):
        real = nodes[0, group][mask[0, group]]
        weights, values = pooling.score(real).softmax(dim=0), pooling.value(real)
        by_head = [weights[:, head] @ values[:, 8 * head : 8 * head + 8] for head in range(2)]
        torch.testing.assert_close(pooled[0, group], torch.cat(by_head))


def test_missing_part_is_named(encoder: GraphEncoder) -> None:
    """Observations of other environments are refused."""
    observation = graph()
    del observation["edge_mask"]

    with pytest.raises(PruningError, match="should have 'edge_mask'"):
        encoder(observation)


def test_other_number_of_features_is_refused(encoder: GraphEncoder) -> None:
    """A policy of another version reads other features."""
    observation = graph()
    observation["groups"] = observation["groups"][..., :3]

    with pytest.raises(PruningError, match=r"`observation\['groups'\]` should have 4 features.*Received 3"):
        encoder(observation)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"width": 30, "heads": 4}, "`width` should be a multiple of `heads` .4.. Received 30. Use 32"),
        ({"width": 0}, "`width` should be a whole number of at least 1. Received 0"),
        ({"heads": True}, "`heads` should be a whole number of at least 1. Received True"),
        ({"gat_layers": -1}, "`gat_layers` should be a whole number of at least 0. Received -1"),
        ({"node_features": 2.5}, "`node_features` should be a whole number"),
    ],
)
def test_impossible_sizes_are_refused(changed: dict[str, int], message: str) -> None:
    """Sizes also come from files."""
    sizes = {"node_features": 1, "edge_features": 1, "group_features": 1, "state_features": 1}

    with pytest.raises(PruningError, match=message):
        EncoderConfig(**{**sizes, **changed})


def test_no_layers_is_allowed() -> None:
    """Ablations: pooling alone."""
    encoder = GraphEncoder(EncoderConfig(5, 3, 4, 2, width=16, heads=2, gat_layers=0, transformer_layers=0))

    groups, _, edges, _ = encoder.attention(graph())

    assert np.array_equal(groups.detach().numpy(), np.zeros((1, GROUPS)))
    assert np.array_equal(edges.detach().numpy(), np.zeros((1, EDGES)))
