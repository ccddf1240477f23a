"""The observation: what each number means, and that paddings, networks and buffers do not mix."""

import re
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from gymnasium import spaces

from prunegym.envs.actions import action_for
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import (
    EDGE_FEATURES,
    GROUP_DATA_COLUMNS,
    GROUP_FEATURES,
    NEIGHBOURS,
    NODE_DATA_COLUMNS,
    NODE_FEATURES,
    STATE_FEATURES,
    EpisodeState,
    Observation,
    Observer,
    Padding,
    observation_space,
)
from prunegym.pruning.importance.statistics import Statistics, collect_statistics
from prunegym.pruning.network import PrunableNetwork

Toys = Callable[[str], PrunableNetwork]
TaskFor = Callable[[PrunableNetwork], Any]
ZOO = (
    *("digits_resnet", "digits_vgg", "digits_mobilenet", "cifar_resnet20", "cifar_resnet20_conv"),
    *("cifar_vgg16", "cifar_mobilenet_v2", "cifar_efficientnet_b0", "cifar_hybrid"),
)


def episode(network: PrunableNetwork, statistics: Statistics, seed: int = 0) -> EpisodeState:
    """A state in the middle of an episode: about half the units are gone."""
    rng = np.random.default_rng(seed)
    graph = network.graph
    mask = rng.random(graph.units) < 0.5
    for group in graph.groups:
        mask[group.start] = True
    groups = len(graph.groups)
    return EpisodeState(
        mask=mask,
        counts=np.bincount(graph.group_of[mask], minlength=groups),
        statistics=statistics,
        cost_slope=rng.random(groups),
        prior=rng.uniform(-1, 1, groups).astype(np.float32),
        uniform=rng.uniform(-1, 1, groups).astype(np.float32),
        state=rng.random(len(STATE_FEATURES)).astype(np.float32),
    )


def observed(network: PrunableNetwork, task: Any, padding: Padding | None = None) -> Observation:
    """An observation of a network in the middle of an episode."""
    statistics = collect_statistics(network.model, network.graph, task, examples=6, covariances=False)
    observer = Observer(network, statistics)
    return observer.observe(episode(network, statistics), padding or observer.padding)


@pytest.fixture(scope="module")
def zoo_observations(zoo: Toys, task_for: TaskFor) -> dict[str, Observation]:
    """One for each small network of the zoo."""
    return {name: observed(zoo(name), task_for(zoo(name))) for name in ZOO}


@pytest.fixture(scope="module")
def residual(toys: Toys, task_for: TaskFor) -> tuple[PrunableNetwork, Statistics, Observer]:
    """The residual toy with its statistics and observer."""
    network = toys("residual")
    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=20)
    return network, statistics, Observer(network, statistics)


def documented_table() -> dict[str, tuple[str, str, str]]:
    """Shape, minimum and maximum of each key, from the docstring of the environment."""
    rows = re.findall(r"^ *\| `(\w+)` \| `(.+?)` \|.*\| (\S+) \| (.+?) \|$", ChannelPruningEnv.__doc__ or "", re.M)
    return {key: (shape, low, high) for key, shape, low, high in rows}


def test_documented_table_lists_exactly_the_keys_of_the_space() -> None:
    """A table that drifts is worse than none."""
    assert set(documented_table()) == set(observation_space(Padding(3, 5, 2)).spaces)


@pytest.mark.parametrize("key", observation_space(Padding(1, 1, 1)).spaces)
def test_documented_shape_and_bounds_are_those_of_the_space(key: str) -> None:
    """Row by row, for other sizes than those of any network."""
    groups, edges, bins = 7, 31, 5
    space = observation_space(Padding(groups, edges, bins))[key]
    shape, low, high = documented_table()[key]

    names = {"groups": groups, "edges": edges, "bins": bins}
    documented = eval(shape, {"__builtins__": {}}, names)
    bounds = [
        float(eval(bound.replace("Inf", "inf"), {"__builtins__": {}}, {**names, "inf": np.inf}))
        for bound in (low, high)
    ]
    assert isinstance(space, spaces.Box)
    assert space.shape == documented
    assert [float(space.low.min()), float(space.high.max())] == bounds


@pytest.mark.parametrize("name", ZOO)
def test_observation_is_in_its_space_and_finite(zoo_observations: dict[str, Observation], name: str) -> None:
    """For every small network of the zoo."""
    observation = zoo_observations[name]
    groups, bins = observation["node_mask"].shape
    space = observation_space(Padding(groups, observation["edges"].shape[1], bins))

    assert space.contains(observation)
    assert all(np.isfinite(value).all() for value in observation.values())


@pytest.mark.parametrize(
    ("key", "names"), [("nodes", NODE_FEATURES), ("groups", GROUP_FEATURES), ("edge_features", EDGE_FEATURES)]
)
def test_no_feature_is_zero_in_all_networks(
    zoo_observations: dict[str, Observation], key: str, names: tuple[str, ...]
) -> None:
    """A feature that is never anything but 0 says nothing."""
    largest = np.max(
        [np.abs(one[key]).reshape(-1, len(names)).max(axis=0) for one in zoo_observations.values()], axis=0
    )

    assert [name for name, value in zip(names, largest, strict=True) if value == 0] == []


@pytest.mark.parametrize(
    ("key", "names"), [("nodes", NODE_FEATURES), ("groups", GROUP_FEATURES), ("edge_features", EDGE_FEATURES)]
)
def test_no_feature_is_constant(zoo_observations: dict[str, Observation], key: str, names: tuple[str, ...]) -> None:
    """Over the real nodes, groups and edges of all networks."""
    mask = {"nodes": "node_mask", "groups": "group_mask", "edge_features": "edge_mask"}[key]
    rows = np.concatenate([one[key][one[mask] > 0] for one in zoo_observations.values()])

    spread = rows.max(axis=0) - rows.min(axis=0)
    assert [name for name, value in zip(names, spread, strict=True) if value == 0] == []


@pytest.mark.parametrize("name", ZOO)
def test_features_are_of_moderate_size(zoo_observations: dict[str, Observation], name: str) -> None:
    """Networks learn from inputs of order 1, and no per-network scaling makes them so."""
    observation = zoo_observations[name]

    assert max(float(np.abs(observation[key]).max()) for key in ("nodes", "groups", "edge_features")) < 10


def test_larger_padding_adds_only_zeros(toys: Toys, task_for: TaskFor) -> None:
    """Networks of different sizes share one observation space."""
    network = toys("residual")
    small = observed(network, task_for(network))
    groups, bins = small["node_mask"].shape
    edges = small["edges"].shape[1]

    large = observed(network, task_for(network), Padding(groups + 3, edges + 9, bins + 5))

    for key in ("nodes", "node_mask"):
        np.testing.assert_array_equal(large[key][:groups, :bins], small[key])
        assert not large[key][groups:].any()
        assert not large[key][:, bins:].any()
    for key in ("groups", "group_mask", "prior"):
        np.testing.assert_array_equal(large[key][:groups], small[key])
        assert not large[key][groups:].any()
    for key in ("edge_features", "edge_mask"):
        np.testing.assert_array_equal(large[key][:edges], small[key])
        assert not large[key][edges:].any()


def test_edges_point_to_the_same_nodes_in_a_larger_padding(toys: Toys, task_for: TaskFor) -> None:
    """Flat numbers count the padded bins."""
    network = toys("residual")
    small = observed(network, task_for(network))
    groups, bins = small["node_mask"].shape
    edges = small["edges"].shape[1]

    large = observed(network, task_for(network), Padding(groups, edges, bins + 5))

    assert (np.stack(np.divmod(small["edges"], bins)) == np.divmod(large["edges"], bins + 5)).all()


@pytest.mark.parametrize("name", ZOO)
def test_edges_join_real_nodes(zoo_observations: dict[str, Observation], name: str) -> None:
    """No edge to a padding bin, and each has one kind."""
    observation = zoo_observations[name]

    assert (observation["node_mask"].ravel()[observation["edges"]] == 1).all()
    assert (observation["edge_features"][:, 1:].sum(axis=1) == 1).all()


def test_every_forward_edge_has_its_backward_twin(zoo_observations: dict[str, Observation]) -> None:
    """Messages go both ways."""
    observation = zoo_observations["digits_resnet"]
    source, target = observation["edges"]
    _, forward, backward, _ = observation["edge_features"].T.astype(bool)

    assert sorted(zip(source[forward], target[forward], strict=True)) == sorted(
        zip(target[backward], source[backward], strict=True)
    )


def test_strongest_edges_are_those_with_most_kernel_energy(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """Against the energies of a layer's kernels, channel by channel: every group of the toy fits its bins."""
    network, statistics, observer = residual
    weight = network.model.inner.weight.detach().square().sum((2, 3)).numpy()
    stem, inner = network.graph.group("stem"), network.graph.group("inner")

    observation = observer.observe(episode(network, statistics), observer.padding)

    source, target = observation["edges"]
    forward = observation["edge_features"][:, 1] == 1
    for output in range(inner.size):
        node = observer.bin_of[inner.start + output]
        into = {int(one) for one in source[forward & (target == node)] if one in observer.bin_of[stem.units]}
        strongest = np.argsort(-weight[output])[:NEIGHBOURS]
        assert into == {int(observer.bin_of[stem.start + one]) for one in strongest}


def test_kept_features_follow_the_mask(residual: tuple[PrunableNetwork, Statistics, Observer]) -> None:
    """Per bin and per group: what is left, over what there was."""
    network, statistics, observer = residual
    state = episode(network, statistics)

    observation = observer.observe(state, observer.padding)

    kept_nodes = observation["nodes"][..., NODE_FEATURES.index("kept")].ravel()
    np.testing.assert_array_equal(kept_nodes[observer.bin_of], state.mask)
    kept_groups = observation["groups"][:, GROUP_FEATURES.index("kept")]
    np.testing.assert_allclose(kept_groups, state.counts / network.graph.sizes)


def test_bins_hold_channels_of_neighbouring_rank(zoo: Toys, task_for: TaskFor) -> None:
    """Best first: no channel of a bin is worth less than one of the next bin; sizes differ by one at most."""
    network = zoo("cifar_vgg16")
    statistics = collect_statistics(network.model, network.graph, task_for(network), examples=6)
    observer = Observer(network, statistics)

    for index, group in enumerate(network.graph.groups):
        bins = observer.bin_of[group.units] - index * observer.bins
        worth = [statistics.taylor_squared[group.units][bins == k] for k in range(observer.bins)]

        assert all(one.min() >= other.max() for one, other in pairwise(worth))
        assert max(map(len, worth)) - min(map(len, worth)) <= 1


def test_rank_is_that_in_the_group_whatever_is_beside_it(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """From 0 to 1 in groups of 8, 6, 12 and 4 channels."""
    network, statistics, observer = residual

    rank = observer.observe(episode(network, statistics), observer.padding)["nodes"][..., NODE_FEATURES.index("rank")]

    for row, size in zip(rank, network.graph.sizes, strict=True):
        np.testing.assert_allclose(row[:size], np.linspace(0, 1, size), rtol=1e-6)


def test_shares_of_the_bins_of_a_group_add_up(zoo_observations: dict[str, Observation]) -> None:
    """Every channel is in one bin."""
    for observation in zoo_observations.values():
        shares = observation["nodes"][..., NODE_FEATURES.index("share")].sum(axis=1)

        np.testing.assert_allclose(shares, 1.0, rtol=1e-5)


def test_group_geometry_is_that_of_the_layers(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """Width, map, kernel, stride, and who makes and reads the channels, by hand."""
    network, statistics, observer = residual

    rows = observer.observe(episode(network, statistics), observer.padding)["groups"]

    column = {name: rows[:, GROUP_FEATURES.index(name)] for name in GROUP_FEATURES}
    np.testing.assert_allclose(column["log_width"], np.log2([8, 6, 12, 4]) / 10, rtol=1e-6)
    np.testing.assert_allclose(column["log_spatial"], np.log2([8, 8, 4, 2]) / 8, rtol=1e-6)
    np.testing.assert_allclose(column["kernel"], 3 / 7, rtol=1e-6)
    np.testing.assert_allclose(column["stride"], [0.5, 0.5, 1, 1])
    np.testing.assert_allclose(column["depth"], [0, 1 / 3, 2 / 3, 1], rtol=1e-6)
    np.testing.assert_allclose(column["producers"], np.log2([2, 1, 3, 1]) / 4, rtol=1e-6)
    np.testing.assert_allclose(column["consumers"], np.log2([3, 1, 2, 1]) / 4, rtol=1e-6)


def test_slope_is_the_cost_saved_per_channel(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """Times the channels of the group, as a share of the network."""
    network, statistics, observer = residual

    rows = observer.observe(episode(network, statistics), observer.padding)["groups"]

    costs, sizes = network.costs, network.graph.sizes
    for group, size in enumerate(sizes):
        fewer = sizes - np.eye(len(sizes), dtype=np.int64)[group]
        macs, parameters = costs.macs(fewer), costs.parameters(fewer)
        expected = [1 - macs / costs.full.macs, 1 - parameters / costs.full.parameters]
        slopes = rows[group, [GROUP_FEATURES.index("macs_slope"), GROUP_FEATURES.index("params_slope")]]
        np.testing.assert_allclose(slopes, np.array(expected) * size, rtol=1e-5)


def test_similarity_is_the_cosine_with_the_nearest_filter(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """One channel per bin in the toy: the node feature is the channel's."""
    network, statistics, observer = residual
    group = network.graph.group("inner")
    rows = network.model.inner.weight.detach().flatten(1)
    cosine = torch.nn.functional.cosine_similarity(rows[:, None], rows[None], dim=2)
    nearest = (cosine - 2 * torch.eye(len(rows))).max(1).values

    nodes = observer.observe(episode(network, statistics), observer.padding)["nodes"]

    values = nodes[..., NODE_FEATURES.index("similarity")].ravel()[observer.bin_of[group.units]]
    np.testing.assert_allclose(values, nearest, rtol=1e-4, atol=1e-5)


def test_data_columns_are_those_that_change_with_the_data(
    residual: tuple[PrunableNetwork, Statistics, Observer],
) -> None:
    """The ablation `features=structure` zeroes exactly these."""
    network, statistics, observer = residual
    state = episode(network, statistics)
    rng = np.random.default_rng(5)
    fields = ("activation_mean", "activation_variance", "activation_sparsity", "taylor", "taylor_squared")
    other = replace(statistics, **{name: rng.random(network.graph.units) for name in fields})
    knapsack = action_for(rng.random(len(network.graph.groups)))

    before = observer.observe(state, observer.padding)
    after = observer.observe(replace(state, statistics=other, prior=knapsack), observer.padding)

    nodes = (before["nodes"] != after["nodes"]).any(axis=(0, 1))
    groups = (before["groups"] != after["groups"]).any(axis=0)
    assert np.flatnonzero(nodes).tolist() == list(NODE_DATA_COLUMNS)
    assert np.flatnonzero(groups).tolist() == list(GROUP_DATA_COLUMNS)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_size_of_the_loss_does_not_matter(residual: tuple[PrunableNetwork, Statistics, Observer], scale: float) -> None:
    """Taylor features are relative: the same number means the same for a task with other units."""
    network, statistics, observer = residual
    state = episode(network, statistics)
    other = replace(statistics, taylor_squared=statistics.taylor_squared * scale)

    before = observer.observe(state, observer.padding)
    after = observer.observe(replace(state, statistics=other), observer.padding)

    np.testing.assert_allclose(after["nodes"], before["nodes"], atol=1e-3)
    np.testing.assert_allclose(after["groups"], before["groups"], atol=1e-3)


def test_covering_padding_holds_both() -> None:
    """Size by size."""
    assert Padding(3, 50, 16).covering(Padding(5, 40, 8)) == Padding(5, 50, 16)
