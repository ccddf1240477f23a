"""Where the time of a network goes, against clocks that are known."""

from itertools import count

import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.timing.latency import LatencySettings
from prunegym.pruning.timing.module_times import BETWEEN, TimeProfile, compare_module_times, kind_of

SETTINGS = LatencySettings(repeats=3, warmup=1)


class Block(nn.Module):
    """Two modules, one of which runs twice, and a sum between them."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(x + self.relu(self.conv(x)))


@pytest.fixture
def network() -> nn.Sequential:
    """A block within a network."""
    return nn.Sequential(Block(), nn.Flatten())


def ticking(network: nn.Module) -> TimeProfile:
    """Times by a clock that ticks once for each look."""
    ticks = count()
    profiles = compare_module_times({"net": network}, torch.zeros(2, 3, 4, 4), SETTINGS, clock=lambda: next(ticks))
    return profiles["net"]


def test_modules_get_their_own_time_without_those_inside(network: nn.Sequential) -> None:
    """A leaf takes one tick, a block one more than it has calls inside."""
    profile = ticking(network)

    times = {one.module: one.seconds for one in profile.modules}
    assert times == {"0.conv": 1, "0.relu": 2, "0": 4, "1": 1, "": 3}
    assert profile.seconds == sum(times.values()) == 11
    assert profile.kinds == {BETWEEN: 7, "activation": 2, "convolution": 1, "other modules": 1}
    assert profile.repeats == 3


def test_longest_kind_comes_first_and_json_holds_all(network: nn.Sequential) -> None:
    """What the run folder keeps."""
    content = ticking(network).to_json()

    assert next(iter(content["kinds"])) == BETWEEN
    assert content["modules"][0] == {"module": "0.conv", "kind": "convolution", "seconds": 1.0}


def test_real_clock_finds_the_slow_layer(network: nn.Sequential) -> None:
    """A convolution of 3 x 64 channels against one of 3, side by side; both networks stay as they were."""
    wide = nn.Sequential(nn.Conv2d(3, 64, 5, padding=2), nn.Conv2d(64, 64, 5, padding=2), nn.ReLU())

    profiles = compare_module_times({"net": network, "wide": wide}, torch.zeros(1, 3, 32, 32), SETTINGS)

    assert max(profiles["wide"].modules, key=lambda one: one.seconds).module == "1"
    assert profiles["wide"].seconds > 0
    assert not any(module._forward_hooks for model in (network, wide) for module in model.modules())


def test_threads_are_those_asked_for_and_put_back(network: nn.Sequential) -> None:
    """As for the latency of the whole network."""
    before, seen = torch.get_num_threads(), set()

    def clock() -> float:
        seen.add(torch.get_num_threads())
        return 0.0

    compare_module_times({"net": network}, torch.zeros(1, 3, 4, 4), LatencySettings(threads=2), clock=clock)

    assert seen == {2}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("module", "kind"),
    [
        (nn.Conv2d(4, 4, 3), "convolution"),
        (nn.Conv2d(4, 4, 1), "1×1 convolution"),
        (nn.Conv2d(4, 8, 3, groups=4), "depthwise convolution"),
        (nn.Conv2d(4, 8, 3, groups=2), "convolution"),
        (nn.Linear(2, 2), "linear"),
        (nn.BatchNorm2d(2), "normalisation"),
        (nn.LayerNorm(2), "normalisation"),
        (nn.MultiheadAttention(4, 2), "attention"),
        (nn.AdaptiveAvgPool2d(1), "pooling"),
        (nn.GELU(), "activation"),
        (nn.Dropout(), "other modules"),
        (Block(), BETWEEN),
    ],
)
def test_kinds_of_modules(module: nn.Module, kind: str) -> None:
    """What the report sums over."""
    assert kind_of(module) == kind
