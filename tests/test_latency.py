"""Latency measured with a clock that the networks under test set forward themselves."""

import sys
from collections.abc import Iterator
from itertools import cycle, pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.latency import (
    Latency,
    LatencySettings,
    compare_latency,
    device_fingerprint,
    measure_latency,
    speed_up,
)

IMAGES = torch.zeros(1, 3, 4, 4)
#: One timed run that shows that a network works comes before the warm-up.
FIRST_RUN = 1


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class FakeClock:
    """A clock that stands still unless it is set forward."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class Sleeper(nn.Module):
    """Takes given times, one after another, and notes what it saw."""

    def __init__(self, clock: FakeClock, seconds: list[float], log: list[Any], name: str = "sleeper") -> None:
        super().__init__()
        self.clock, self.log, self.name = clock, log, name
        self.seconds = cycle(seconds)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Sleeper":
        return self  # what runs is a copy, and the test looks at this one

    def forward(self, x: Tensor) -> Tensor:
        self.clock.now += next(self.seconds)
        self.log.append((self.name, tuple(x.shape), x.dtype, torch.get_num_threads(), self.training))
        return x


def sleeper(*seconds: float) -> tuple[FakeClock, Sleeper, list[Any]]:
    """A clock, a network that takes these times in turn, and its log."""
    clock, log = FakeClock(), list[Any]()
    return clock, Sleeper(clock, list(seconds), log), log


def latency(*samples: float, **settings: Any) -> Latency:
    """A measurement with known runs."""
    return Latency.from_samples(list(samples), LatencySettings(threads=1, **settings))


def test_median_and_quartiles_are_those_of_the_timed_runs() -> None:
    """The first run and the warm-up do not count."""
    clock, network, _ = sleeper(100.0, 200.0, 1.0, 2.0, 3.0, 4.0, 5.0)

    found = measure_latency(
        network, IMAGES, LatencySettings(warmup=1, repeats=5, time_limit=1e9), clock=clock
    )

    assert (found.lower_quartile, found.median, found.upper_quartile) == (2.0, 3.0, 4.0)
    assert found.samples == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert found.repeats == 5


def test_networks_run_in_turn() -> None:
    """Neighbouring runs share whatever the machine does at that moment."""
    clock, log = FakeClock(), list[Any]()
    networks = {name: Sleeper(clock, [1.0], log, name) for name in ("a", "b", "c")}

    compare_latency(networks, IMAGES, LatencySettings(warmup=2, repeats=3), clock=clock)

    names = [entry[0] for entry in log]
    assert names[len(networks) * FIRST_RUN :] == ["a", "b", "c"] * 5


def test_ratio_survives_drift() -> None:
    """Both networks become slower together; the ratio of neighbouring runs does not change."""
    clock, log = FakeClock(), list[Any]()
    drift = [1.0 + 0.2 * step for step in range(20)]
    networks = {
        "before": Sleeper(clock, [2.0 * factor for factor in drift], log),
        "after": Sleeper(clock, drift, log),
    }

    found = compare_latency(networks, IMAGES, LatencySettings(warmup=0, repeats=20), clock=clock)
    ratio, sentence = speed_up(found["before"], found["after"])

    assert ratio == pytest.approx(2.0)
    assert sentence.startswith("2 times as fast as before (quartiles 2 to 2, ")


def test_time_limit_ends_the_repeats_but_leaves_enough_for_quartiles() -> None:
    """A slow network is not run fifty times."""
    clock, network, _ = sleeper(1.0)

    long = measure_latency(network, IMAGES, LatencySettings(repeats=50, time_limit=9.5), clock=clock)
    short = measure_latency(network, IMAGES, LatencySettings(repeats=50, time_limit=0.1), clock=clock)

    assert (long.repeats, short.repeats) == (10, 5)


def test_threads_are_set_for_the_measurement_only() -> None:
    """The caller's number comes back, and the result says which number was in force."""
    before = torch.get_num_threads()
    clock, network, log = sleeper(1.0)

    found = measure_latency(network, IMAGES, LatencySettings(threads=before + 1, repeats=5), clock=clock)

    assert {entry[3] for entry in log} == {before + 1}
    assert torch.get_num_threads() == before
    assert found.settings.threads == before + 1


def test_threads_are_restored_when_the_network_fails() -> None:
    """An error is no excuse."""
    before = torch.get_num_threads()

    with pytest.raises(PruningError, match="Received network, which raised RuntimeError"):
        measure_latency(nn.Conv2d(5, 1, 1), IMAGES, LatencySettings(threads=before + 1))

    assert torch.get_num_threads() == before


def test_threads_in_force_are_reported_when_none_are_asked_for() -> None:
    """None means torch's number, not an unknown one."""
    clock, network, _ = sleeper(1.0)

    found = measure_latency(network, IMAGES, LatencySettings(repeats=5), clock=clock)

    assert found.settings.threads == torch.get_num_threads()


def test_network_is_left_as_it_was() -> None:
    """Measuring in another type and mode happens on a copy, and draws no random numbers."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()

    measure_latency(network, IMAGES, LatencySettings(dtype="bfloat16", repeats=5))

    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(tensor.dtype == state[name].dtype for name, tensor in network.state_dict().items())
    assert network.training
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_batch_size_and_type_are_those_asked_for() -> None:
    """The example input only gives the shape."""
    clock, network, log = sleeper(1.0)
    settings = LatencySettings(batch_size=3, dtype="bfloat16", repeats=5)

    measure_latency(network, torch.zeros(2, 3, 4, 4), settings, clock=clock)

    assert {entry[1:3] for entry in log} == {((3, 3, 4, 4), torch.bfloat16)}
    assert not any(entry[4] for entry in log)  # eval mode


@pytest.mark.parametrize(
    ("after", "claim"),
    [
        ((1.0, 1.1, 0.9, 1.0, 1.0), "times as fast as before"),
        ((1.0, 3.0, 1.0, 3.0, 2.0), "No measurable speed-up"),
        ((2.0, 2.0, 2.0, 2.0, 2.0), "No measurable speed-up: 1 times as fast"),
        ((4.0, 4.1, 3.9, 4.0, 4.0), "Slower than before: 0.5 times as fast"),
    ],
)
def test_speed_up_claims_only_what_the_quartiles_show(after: tuple[float, ...], claim: str) -> None:
    """A difference within the noise is none."""
    _, sentence = speed_up(latency(2.0, 2.0, 2.0, 2.0, 2.0), latency(*after))

    assert claim in sentence
    assert "5 paired runs" in sentence
    assert "1 thread, batch 1, float32" in sentence


@pytest.mark.parametrize("other", [latency(1.0, 1.0), latency(1.0, 1.0, 1.0, batch_size=2)])
def test_speed_up_of_separate_measurements_is_refused(other: Latency) -> None:
    """A ratio between different moments or settings means nothing."""
    with pytest.raises(
        PruningError, match=r"`after` should be measured side by side with `before`.*compare_latency"
    ):
        speed_up(latency(1.0, 1.0, 1.0), other)


def test_description_names_value_spread_and_conditions() -> None:
    """A latency without them cannot be compared with anything."""
    found = latency(0.001, 0.002, 0.003, batch_size=4)

    assert found.describe().startswith("2 ms (quartiles 1.5 to 2.5, 3 runs; ")
    assert found.device_name in found.describe()
    assert f"torch {torch.__version__}, 1 thread, batch 4, float32)" in found.describe()


def test_summary_holds_the_fingerprint_and_no_single_runs() -> None:
    """What goes into result files."""
    found = latency(0.001, 0.002, 0.003)

    summary = found.to_json()

    assert summary["median_seconds"] == 0.002
    assert summary.items() >= device_fingerprint(found.settings).items()
    assert "samples" not in summary


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "`batch_size` should be at least 1. Received 0"),
        ({"threads": 0}, "`threads` should be at least 1. Received 0"),
        ({"repeats": 0}, "`repeats` should be at least 1. Received 0"),
        ({"warmup": -1}, "`warmup` should be at least 0. Received -1"),
        ({"time_limit": 0.0}, "`time_limit` should be above 0 seconds. Received 0.0"),
        ({"backend": "onnxruntim"}, "Received 'onnxruntim'. Did you mean 'onnxruntime'?"),
        ({"dtype": "float23"}, "Received 'float23'. Did you mean 'float32'?"),
        ({"backend": "onnxruntime", "dtype": "bfloat16"}, "Use backend torch for these"),
        ({"backend": "onnxruntime", "device": "cuda"}, "Use backend torch for these"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """One clear error each."""
    with pytest.raises(PruningError, match=message.replace("?", r"\?")):
        LatencySettings(**settings)


def test_unknown_device_is_refused() -> None:
    """Torch's own message is passed on."""
    with pytest.raises(PruningError, match="should run on the example inputs.* on abacus. Received network"):
        measure_latency(nn.Identity(), IMAGES, LatencySettings(device="abacus"))


def test_input_of_a_wrong_shape_is_refused() -> None:
    """The failing network is named."""
    networks = {"good": nn.Conv2d(3, 1, 1), "bad": nn.Conv2d(4, 1, 1)}

    with pytest.raises(PruningError, match=r"batch size 1, float32, on cpu. Received bad, which raised"):
        compare_latency(networks, IMAGES)


@pytest.mark.parametrize("package", ["onnx", "onnxruntime", "onnxscript"])
def test_absent_onnx_is_reported_with_the_command_that_installs_it(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is an optional extra."""
    monkeypatch.setitem(sys.modules, package, None)

    with pytest.raises(PruningError, match=rf"needs the package {package}\b.*pip install 'prunegym\[onnx\]'"):
        measure_latency(nn.Conv2d(3, 1, 1), IMAGES, LatencySettings(backend="onnxruntime"))


def test_onnx_runtime_measures_a_whole_network() -> None:
    """With real time, so only that there is some."""
    pytest.importorskip("onnxruntime")
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())

    found = measure_latency(network, IMAGES, LatencySettings(backend="onnxruntime", threads=1, repeats=5))

    assert 0 < found.median < 10
    assert "onnxruntime" in found.describe()
    assert network.training


def test_a_thousand_times_the_work_takes_longer() -> None:
    """Real time, with bounds that no busy machine exceeds."""
    images = torch.zeros(1, 64, 32, 32)
    networks = {"large": nn.Conv2d(64, 256, 3), "small": nn.Conv2d(64, 1, 1)}

    found = compare_latency(networks, images, LatencySettings(threads=1, repeats=15))
    ratio, sentence = speed_up(found["large"], found["small"])

    assert ratio > 1.5
    assert "times as fast as before" in sentence
    assert all(
        a <= b for a, b in pairwise([0.0, found["small"].lower_quartile, found["small"].upper_quartile])
    )
