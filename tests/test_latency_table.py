"""Latency tables, made with a timer that counts work instead of measuring time."""

import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.errors import PruningError
from prunegym.pruning.latency import LatencySettings
from prunegym.pruning.latency_table import LatencyTable
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.onnx_export import with_batch
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.zoo import build_network, input_shape_of

Counts = NDArray[np.int64]
NAMES = ("digits_resnet", "digits_vgg", "digits_mobilenet")
#: Seconds per multiply-accumulate, per element that a layer puts out, and per run.
PER_MAC, PER_ELEMENT, PER_RUN = 1e-9, 5e-9, 1e-4


def work(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[float, int]:
    """Multiply-accumulates by torch's own counter, and elements that the layers put out."""
    elements: list[int] = []
    layers = [one for one in model.modules() if isinstance(one, nn.modules.conv._ConvNd | nn.Linear)]
    handles = [one.register_forward_hook(lambda *seen: elements.append(seen[2].numel())) for one in layers]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(*inputs)
    for handle in handles:
        handle.remove()
    return counter.get_total_flops() / 2, sum(elements)


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class WorkTimer:
    """A device on which time is exactly proportional to work."""

    def __call__(
        self, models: Mapping[str, nn.Module], inputs: tuple[Any, ...], settings: LatencySettings
    ) -> dict[str, float]:
        return {name: self.seconds(name, model, inputs, settings) for name, model in models.items()}

    def seconds(
        self, name: str, model: nn.Module, inputs: tuple[Any, ...], settings: LatencySettings
    ) -> float:
        """A layer alone costs its multiply-accumulates; a network its elements and a constant besides."""
        resized = with_batch(inputs, settings.batch_size)
        if name == "layer":
            assert [one.shape for one in resized] == [one.shape for one in inputs]
        macs, elements = work(model, resized)
        return PER_MAC * macs + (0 if name == "layer" else PER_ELEMENT * elements + PER_RUN)


class NoisyTimer:
    """A device that gives any time at all."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def __call__(
        self, models: Mapping[str, nn.Module], inputs: tuple[Any, ...], settings: LatencySettings
    ) -> dict[str, float]:
        return dict(zip(models, self.rng.uniform(1e-4, 1e-2, len(models)).tolist(), strict=True))


class NoisyCount(NoisyTimer):
    """Counts the layers timed."""

    def __init__(self) -> None:
        super().__init__(0)
        self.calls = 0

    def __call__(self, *arguments: Any) -> dict[str, float]:
        self.calls += "layer" in arguments[0]
        return super().__call__(*arguments)


@pytest.fixture
def rng() -> np.random.Generator:
    """Always the same draws."""
    return np.random.default_rng(0)


def prunable(name: str) -> PrunableNetwork:
    """A network of the zoo with two examples."""
    images = torch.randn(2, *input_shape_of(name), generator=torch.Generator().manual_seed(0))
    return PrunableNetwork(build_network(name), images, name=name)


@pytest.fixture(scope="module")
def networks() -> dict[str, PrunableNetwork]:
    """One network of each kind of coupling."""
    return {name: prunable(name) for name in NAMES}


@pytest.fixture(scope="module")
def network(networks: dict[str, PrunableNetwork]) -> PrunableNetwork:
    """The residual one."""
    return networks["digits_resnet"]


def table_of(network: PrunableNetwork, timer: Any = None, **settings: Any) -> LatencyTable:
    """A table made without measuring."""
    return LatencyTable.measure(
        network, LatencySettings(**settings), progress=False, timer=timer or WorkTimer()
    )


def pruned(network: PrunableNetwork, counts: Counts) -> nn.Module:
    """A network with these counts."""
    return network.pruned(PruningPlan.from_scores(network.graph, counts, np.zeros(network.graph.units)))


def random_counts(network: PrunableNetwork, rng: np.random.Generator) -> Counts:
    """Any number of channels in each group."""
    return rng.integers(1, network.graph.sizes, endpoint=True)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_prediction_is_the_sum_over_the_rebuilt_network(
    name: str, batch_size: int, networks: dict[str, PrunableNetwork], rng: np.random.Generator
) -> None:
    """Where time is proportional to work, the table must be exact for every plan."""
    network = networks[name]
    table = table_of(network, batch_size=batch_size)

    for counts in [network.graph.sizes, *(random_counts(network, rng) for _ in range(4))]:
        macs, elements = work(pruned(network, counts), with_batch(network.example_inputs, batch_size))
        expected = PER_MAC * macs + PER_ELEMENT * elements + PER_RUN

        assert table.latency(counts) == pytest.approx(expected, rel=1e-6)


def test_factors_are_found(network: PrunableNetwork) -> None:
    """What layers, elements and the rest cost the unpruned network is told apart."""
    macs, elements = work(network.model, with_batch(network.example_inputs, 1))

    found = table_of(network).calibration

    assert found.layers == pytest.approx(PER_MAC * macs, rel=1e-6)
    assert found.elements == pytest.approx(PER_ELEMENT * elements, rel=1e-6)
    assert found.fixed == pytest.approx(PER_RUN, rel=1e-6)


def test_operations_and_the_fixed_part_add_up(network: PrunableNetwork, rng: np.random.Generator) -> None:
    """The share of each operation is a feature of the graph."""
    table, counts = table_of(network), random_counts(network, rng)

    parts = table.operation_latency(counts)

    assert parts.shape == (len(network.graph.operations),)
    assert parts.sum() + table.calibration.fixed == pytest.approx(table.latency(counts))


@pytest.mark.parametrize("seed", range(5))
def test_unpruned_network_is_predicted_as_measured(network: PrunableNetwork, seed: int) -> None:
    """Whatever the layers alone took."""
    table = table_of(network, NoisyTimer(seed))

    assert table.full == table.calibration.measured["unpruned"]
    assert table.latency(network.graph.sizes) == pytest.approx(table.full, rel=1e-12)
    assert table.latency(network.graph.sizes) <= table.full


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_prediction_never_falls_when_a_group_keeps_more(
    name: str, seed: int, networks: dict[str, PrunableNetwork]
) -> None:
    """Bisection on a budget needs this, and noise does not care."""
    network = networks[name]
    table = table_of(network, NoisyTimer(seed))
    rng = np.random.default_rng(seed)
    for _ in range(20):
        counts = np.ones_like(network.graph.sizes)
        last = table.latency(counts)
        while (open_groups := np.flatnonzero(counts < network.graph.sizes)).size:
            chosen = rng.choice(open_groups, max(1, open_groups.size // 2), replace=False)
            counts[chosen] = rng.integers(counts[chosen] + 1, network.graph.sizes[chosen], endpoint=True)
            latency = table.latency(counts)

            assert last <= latency * (1 + 1e-12)
            last = latency


def test_equal_layers_are_timed_once(networks: dict[str, PrunableNetwork]) -> None:
    """Also when the network is deep: time to measure grows with the kinds of layers only."""
    timers = {}
    for name in ("cifar_resnet20", "cifar_resnet32"):
        deep = PrunableNetwork(build_network(name), torch.zeros(1, 3, 32, 32), check=False)
        timers[name] = NoisyCount()
        table_of(deep, timers[name])

    assert timers["cifar_resnet20"].calls == timers["cifar_resnet32"].calls < 200


def test_measuring_draws_no_random_numbers_of_the_caller(network: PrunableNetwork) -> None:
    """Results must not depend on whether a table was cached."""
    before = torch.get_rng_state()

    table_of(network, NoisyTimer(0))

    assert torch.equal(torch.get_rng_state(), before)


def test_prediction_is_quick() -> None:
    """It is called at every step of every bisection; the bound leaves room for a busy machine."""
    deep = PrunableNetwork(build_network("cifar_resnet56"), torch.zeros(1, 3, 32, 32), check=False)
    table, counts = table_of(deep, NoisyTimer(0)), deep.graph.sizes

    def seconds() -> float:
        start = time.perf_counter()
        table.latency(counts)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(100)) < 1e-3


def test_real_measurement_is_sane(networks: dict[str, PrunableNetwork]) -> None:
    """With real time, so only what must hold on the busiest machine."""
    network = networks["digits_vgg"]
    settings = LatencySettings(threads=1, repeats=5, warmup=1)
    threads = torch.get_num_threads()

    table = LatencyTable.measure(network, settings, progress=False, points=3)

    smallest = table.latency(np.ones_like(network.graph.sizes))
    assert 0 < smallest <= table.full < 10
    assert torch.get_num_threads() == threads


# ---- files --------------------------------------------------------------------------------------


def test_saved_table_predicts_the_same(
    network: PrunableNetwork, tmp_path: Path, rng: np.random.Generator
) -> None:
    """To the last bit."""
    table = table_of(network, NoisyTimer(0))

    table.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json", network)

    assert loaded.full == table.full
    assert loaded.calibration == table.calibration
    for counts in (random_counts(network, rng) for _ in range(10)):
        assert loaded.latency(counts) == table.latency(counts)


def test_cached_table_is_not_measured_again(network: PrunableNetwork, tmp_path: Path) -> None:
    """The folder holds one file for each network, device and settings."""

    def refuse(*_: Any) -> dict[str, float]:
        raise AssertionError("measured again")

    def measure(timer: Any, **settings: Any) -> LatencyTable:
        return LatencyTable.measure(
            network, LatencySettings(**settings), progress=False, cache=tmp_path / "cache", timer=timer
        )

    first = measure(NoisyTimer(0))
    again = measure(refuse)
    other = measure(NoisyTimer(1), batch_size=2)

    assert again.full == first.full != other.full
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_cache_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """With the file to delete."""
    LatencyTable.measure(network, progress=False, cache=tmp_path, timer=NoisyTimer(0))
    (file,) = tmp_path.iterdir()
    file.write_text("{}")

    with pytest.raises(PruningError, match=rf"{file.name}.*Delete it and measure again"):
        LatencyTable.measure(network, progress=False, cache=tmp_path, timer=NoisyTimer(0))


def _set(*path: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit of a stored table."""

    def edit(content: dict[str, Any]) -> None:
        inner: Any = content
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_set("format", value=99), "undamaged latency table of format 1.*format 99"),
        (_set("layers", value=None), "undamaged latency table.*TypeError"),
        (_set("calibration", value={}), "undamaged latency table.*KeyError: 'layers'"),
        (_set("calibration", "fixed", value=-1.0), "undamaged latency table.*calibration"),
        (_set("calibration", "measured", value=3), "undamaged latency table.*AttributeError"),
        (_set("layers", 0, "seconds", value=[[1.0]]), r"undamaged latency table.*times \(1, 1\) over"),
        (_set("layers", 0, "seconds", 0, value=[None] * 5), r"undamaged latency table.*times \(5, 5\) over"),
        (_set("layers", 0, "inputs", value=[3, 2, 1, 4, 5]), "undamaged latency table.*times"),
        (
            _set(
                "layers", 0, value={"shape": {}, "inputs": [1, 2], "outputs": [1, 2], "seconds": [[1, 1]] * 2}
            ),
            "different numbers of widths",
        ),
        (_set("fingerprint", "threads", value=999), "measured on this device.*threads 999 instead of"),
        (_set("fingerprint", "device_name", value="abacus"), "device_name 'abacus' instead of.*new table"),
        (_set("fingerprint", "torch", value="0.1"), "torch '0.1' instead of"),
        (_set("layers", 0, "shape", "stride", value=[7, 7]), "measured for this network.*lacks 1 of"),
    ],
)
def test_unfitting_table_is_refused(
    network: PrunableNetwork, tmp_path: Path, edit: Callable[[dict[str, Any]], None], message: str
) -> None:
    """Damage, another device and another network each have their message."""
    table_of(network, NoisyTimer(0)).save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    edit(content)
    (tmp_path / "table.json").write_text(json.dumps(content))

    with pytest.raises(PruningError, match=message):
        LatencyTable.load(tmp_path / "table.json", network)


def test_table_of_other_settings_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """The message says which."""
    table_of(network, NoisyTimer(0), batch_size=4).save(tmp_path / "table.json")

    with pytest.raises(
        PruningError, match=r"table.json' with batch_size 4 instead of 1\. Measure a new table"
    ):
        LatencyTable.load(tmp_path / "table.json", network)


def test_table_of_another_network_is_refused(networks: dict[str, PrunableNetwork], tmp_path: Path) -> None:
    """The message names a layer that was not measured."""
    table_of(networks["digits_resnet"], NoisyTimer(0)).save(tmp_path / "table.json")

    with pytest.raises(PruningError, match=r"measured for this network.*such as a convolution of \d+ to \d+"):
        LatencyTable.load(tmp_path / "table.json", networks["digits_vgg"])


def test_missing_table_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """As any file that is not there."""
    with pytest.raises(PruningError, match="`cache` should lead to a readable JSON file.*No such file"):
        LatencyTable.load(tmp_path / "table.json", network)


def test_one_point_is_refused(network: PrunableNetwork) -> None:
    """Nothing lies between one point."""
    with pytest.raises(PruningError, match="`points` should be at least 2. Received 1"):
        LatencyTable.measure(network, points=1, progress=False, timer=NoisyTimer(0))


def test_network_without_a_batch_is_refused() -> None:
    """The batch size of the settings could not be put in its place."""

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 2))

        def forward(self, batch: dict[str, Tensor]) -> Tensor:
            out: Tensor = self.layers(batch["x"])
            return out

    network = PrunableNetwork(Wrapped(), ({"x": torch.randn(2, 3)},))

    with pytest.raises(PruningError, match="first tensor has a batch dimension. Received dict"):
        table_of(network, NoisyTimer(0))
