"""Latency measured with a clock that the networks under test set forward themselves."""

import time
from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.timing.latency import (
    Clock,
    Latency,
    LatencySettings,
    compare_latency,
    device_fingerprint,
    drifted,
    take_turns_in_sessions,
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


def measured(
    network: nn.Module, images: Tensor, settings: LatencySettings, clock: Clock = time.perf_counter
) -> Latency:
    """One network, measured alone."""
    return compare_latency({"network": network}, images, settings, clock=clock)["network"]


def latency(*samples: float, **settings: Any) -> Latency:
    """A measurement with known runs."""
    return Latency.from_samples(list(samples), LatencySettings(threads=1, **settings))


def test_median_and_quartiles_are_those_of_the_timed_runs() -> None:
    """The first run and the warm-up do not count; a run of seconds is a turn of its own."""
    clock, network, _ = sleeper(100.0, 200.0, 1.0, 2.0, 3.0, 4.0, 5.0)

    found = measured(network, IMAGES, LatencySettings(warmup=1, repeats=5, time_limit=1e9), clock=clock)

    assert (found.lower_quartile, found.median, found.upper_quartile) == (2.0, 3.0, 4.0)
    assert found.samples == (1.0, 2.0, 3.0, 4.0, 5.0)
    assert found.repeats == 5


def test_networks_run_in_turn() -> None:
    """Neighbouring runs share whatever the machine does at that moment."""
    clock, log = FakeClock(), list[Any]()
    networks = {name: Sleeper(clock, [1.0], log, name) for name in ("a", "b", "c")}

    compare_latency(networks, IMAGES, LatencySettings(warmup=2, repeats=3), clock=clock)

    names = [entry[0] for entry in log]
    assert names[len(networks) * FIRST_RUN :] == ["a", "b", "c"] * 5  # a run of a second is a turn of its own


def test_short_runs_make_turns_whose_first_is_not_timed() -> None:
    """It brings the network back into the caches; the median of the others counts."""
    clock, log = FakeClock(), list[Any]()
    network = Sleeper(clock, [0.001, 9.0, 0.002, 0.004, 0.003], log)
    settings = LatencySettings(warmup=0, repeats=1)

    found = measured(network, IMAGES, settings, clock=clock)

    assert found.samples == pytest.approx((0.003,))
    assert len(log) == FIRST_RUN + 4


def test_time_limit_ends_the_repeats_but_leaves_enough_for_quartiles() -> None:
    """A slow network is not run fifty times."""
    clock, network, _ = sleeper(1.0)

    long = measured(network, IMAGES, LatencySettings(repeats=50, time_limit=15), clock=clock)
    short = measured(network, IMAGES, LatencySettings(repeats=50, time_limit=0.1), clock=clock)

    assert (long.repeats, short.repeats) == (20, 10)  # in ten sessions, each with a tenth of the time
    assert (long.sessions, short.sessions) == ((2,) * 10, (1,) * 10)


def test_networks_are_loaded_afresh_for_a_part_of_their_turns() -> None:
    """A network is faster or slower for as long as it lies where it does in memory."""
    loads: dict[str, int] = dict.fromkeys("ab", 0)

    def opener(name: str) -> Callable[[], Callable[[], None]]:
        def load() -> Callable[[], None]:
            loads[name] += 1
            return lambda: log.append(f"{name}{loads[name]}")

        return load

    log: list[str] = []
    measured = take_turns_in_sessions(
        {name: opener(name) for name in "ab"}, LatencySettings(warmup=3, repeats=16), lambda: 0.0
    )

    assert [len(one.samples) for one in measured.values()] == [16, 16]
    assert [one.sessions for one in measured.values()] == [(5, 5, 6)] * 2
    assert list(dict.fromkeys(log)) == ["a1", "b1", "a2", "b2", "a3", "b3"]
    runs_per_turn = 1 + 3  # the first brings the network back into the caches
    assert [log.count(f"a{number}") for number in (1, 2, 3)] == [1 + turns * runs_per_turn for turns in (5, 5, 6)]


def test_threads_are_set_for_the_measurement_only() -> None:
    """The caller's number comes back, and the result says which number was in force."""
    before = torch.get_num_threads()
    clock, network, log = sleeper(1.0)

    found = measured(network, IMAGES, LatencySettings(threads=before + 1, repeats=5), clock=clock)

    assert {entry[3] for entry in log} == {before + 1}
    assert torch.get_num_threads() == before
    assert found.settings.threads == before + 1


def test_threads_are_restored_when_the_network_fails() -> None:
    """An error is no excuse."""
    before = torch.get_num_threads()

    with pytest.raises(PruningError, match="Received network, which raised RuntimeError"):
        measured(nn.Conv2d(5, 1, 1), IMAGES, LatencySettings(threads=before + 1))

    assert torch.get_num_threads() == before


def test_threads_in_force_are_reported_when_none_are_asked_for() -> None:
    """None means torch's number, not an unknown one."""
    clock, network, _ = sleeper(1.0)

    found = measured(network, IMAGES, LatencySettings(repeats=5), clock=clock)

    assert found.settings.threads == torch.get_num_threads()


def test_network_is_left_as_it_was() -> None:
    """Measuring in another type and mode happens on a copy, and draws no random numbers."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout()).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    generator = torch.get_rng_state()

    measured(network, IMAGES, LatencySettings(dtype="bfloat16", repeats=5))

    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(tensor.dtype == state[name].dtype for name, tensor in network.state_dict().items())
    assert network.training
    assert all(module.training for module in network.modules())
    assert torch.equal(torch.get_rng_state(), generator)


def test_batch_size_and_type_are_those_asked_for() -> None:
    """The example input only gives the shape."""
    clock, network, log = sleeper(1.0)
    settings = LatencySettings(batch_size=3, dtype="bfloat16", repeats=5)

    measured(network, torch.zeros(2, 3, 4, 4), settings, clock=clock)

    assert {entry[1:3] for entry in log} == {((3, 3, 4, 4), torch.bfloat16)}
    assert not any(entry[4] for entry in log)  # eval mode


def test_conditions_name_device_runtime_threads_batch_and_type() -> None:
    """A latency without them cannot be compared with anything."""
    found = latency(0.001, 0.002, 0.003, batch_size=4)

    assert found.conditions == f"{found.device_name}, torch {torch.__version__}, 1 thread, batch 4, float32"


def test_summary_holds_the_fingerprint_and_no_single_runs() -> None:
    """What goes into result files."""
    found = latency(0.001, 0.002, 0.003)

    summary = found.to_json()

    assert summary["median_seconds"] == 0.002
    assert summary.items() >= device_fingerprint(found.settings).items()
    assert "samples" not in summary
    assert summary["sessions"] == [3]


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
        (
            {"backend": "onnxruntime", "dtype": "bfloat16"},
            "device cpu and dtype bfloat16. Use float32 on the CPU, or for these backend torch or compile or openvino",
        ),
        ({"backend": "openvino", "device": "cuda"}, "for these backend torch or compile or onnxruntime"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    """One clear error each."""
    with pytest.raises(PruningError, match=message.replace("?", r"\?")):
        LatencySettings(**settings)


def test_drift_is_told_when_it_is_beyond_the_quartiles() -> None:
    """The machine slowed down by half in the middle."""
    quick, slow = (1.0, 1.01, 0.99, 1.0), (1.5, 1.51, 1.49, 1.5)

    found = latency(*quick, *quick, *quick, *slow)

    assert found.drift == pytest.approx(0.5, abs=0.01)
    assert drifted(found.drift) == "the last third of the turns took 50% longer than the first"
    assert found.to_json()["drift"] == found.drift


@pytest.mark.parametrize("samples", [(1.0, 2.0) * 8, (1.0, 1.02) * 4, (1.0, 9.0)])
def test_noise_is_no_drift(samples: tuple[float, ...]) -> None:
    """What goes to and fro, what is small, and what is too short to tell."""
    assert latency(*samples).drift == 0


def test_unknown_device_is_refused() -> None:
    """Torch's own message is passed on."""
    with pytest.raises(PruningError, match="should run on the example inputs.* on abacus in torch. Received network"):
        measured(nn.Identity(), IMAGES, LatencySettings(device="abacus"))


def test_input_of_a_wrong_shape_is_refused() -> None:
    """The failing network is named."""
    networks = {"good": nn.Conv2d(3, 1, 1), "bad": nn.Conv2d(4, 1, 1)}

    with pytest.raises(PruningError, match=r"batch size 1, float32, on cpu in torch. Received bad, which raised"):
        compare_latency(networks, IMAGES)


def test_a_thousand_times_the_work_takes_longer() -> None:
    """Real time, with bounds that no busy machine exceeds."""
    images = torch.zeros(1, 64, 32, 32)
    networks = {"large": nn.Conv2d(64, 256, 3), "small": nn.Conv2d(64, 1, 1)}

    found = compare_latency(networks, images, LatencySettings(threads=1, repeats=15))

    assert found["large"].median > 1.5 * found["small"].median
