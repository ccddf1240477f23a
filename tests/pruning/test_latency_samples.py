"""Networks that latency tables are learned from: which are drawn, and what is measured of them."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.timing.latency import LatencySettings
from prunegym.pruning.timing.latency_samples import RealSampler, draw_counts, random_counts, without_watching
from prunegym.pruning.timing.operation_profiles import Profile


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def network() -> PrunableNetwork:
    """A small network."""
    images = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return PrunableNetwork(build_network("digits_vgg"), images, name="digits_vgg")


def test_networks_are_drawn_from_unpruned_to_very_small(network: PrunableNetwork) -> None:
    """The first two show both ends; a searcher may come to any of the others."""
    drawn = list(draw_counts(network, 12, np.random.default_rng(0)))

    shares = [network.costs.macs(one) / network.full_cost.macs for one in drawn]
    assert (drawn[0] == network.graph.sizes).all()
    assert shares[1] < 0.05
    assert all(0.15 < share <= 0.95 for share in shares[2:])
    assert len({tuple(one.tolist()) for one in drawn}) > 8
    assert any((one % 16 == 0).all() for one in drawn[2:])
    assert any((one % 2 != 0).any() for one in drawn[2:])


def test_share_of_macs_is_within_the_bounds(network: PrunableNetwork) -> None:
    """As near to the drawn share as one more channel allows."""
    rng = np.random.default_rng(0)
    shares = [
        network.costs.macs(random_counts(network, rng, macs=(0.4, 0.5))) / network.full_cost.macs for _ in range(10)
    ]

    assert 0.37 < min(shares) < max(shares) <= 0.5


def test_sample_holds_the_whole_and_its_parts(network: PrunableNetwork) -> None:
    """With real time, so only what must hold on the busiest machine."""
    sampler = RealSampler(network, LatencySettings(threads=1))
    samples = [sampler(counts) for counts in (network.graph.sizes, np.maximum(1, network.graph.sizes // 4))]

    for one in samples:
        assert 0 < one.seconds < 10
        assert one.operations.shape == (len(network.graph.operations),)
        assert (one.operations > 0).all()
        assert one.operations.sum() <= one.seconds * (1 + 1e-9)


@given(
    seconds=st.lists(st.floats(1e-7, 1.0), min_size=2, max_size=6),
    whole=st.floats(1e-6, 2.0),
    events=st.integers(1, 5),
)
def test_cost_of_watching_is_taken_away_and_nothing_becomes_negative(
    seconds: list[float], whole: float, events: int
) -> None:
    """What is left adds up to no more than the network takes when nobody watches."""
    profile = Profile(np.array(seconds), np.full(len(seconds), events))

    found = without_watching(profile, whole)

    assert (found > 0).all()
    assert found.sum() == pytest.approx(min(whole, sum(seconds)), rel=1e-6)


def test_cost_of_watching_is_shared_by_the_moments_at_which_time_was_taken() -> None:
    """Two microseconds each, seven times, on operations of 100 microseconds."""
    profile = Profile(np.array([102e-6, 104e-6, 108e-6]), np.array([1, 2, 4]))

    assert without_watching(profile, 300e-6) == pytest.approx([100e-6] * 3)
