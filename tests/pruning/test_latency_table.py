"""Latency tables of devices whose times are known: counted work in place of measured time."""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from prunegym.pruning.allocation import knapsack, project
from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network, input_shape_of
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import LatencySettings
from prunegym.pruning.timing.latency_samples import Sample, random_counts
from prunegym.pruning.timing.latency_table import LatencyTable, TableError, fastest_widths
from prunegym.pruning.widths import WidthRules, Widths

Counts = NDArray[np.int64]
NAMES = ("digits_resnet", "digits_vgg", "digits_mobilenet")
#: Seconds per multiply-accumulate, per element that a layer puts out, and per run.
PER_MAC, PER_ELEMENT, PER_RUN = 1e-9, 5e-9, 1e-4
#: How much longer a layer takes whose output width is no multiple of 8.
ODD = 1.5


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads that wait for one another make small networks slow on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pruned(network: PrunableNetwork, counts: Counts) -> nn.Module:
    """A network with these counts."""
    return network.pruned(PruningPlan.from_counts(network.graph, counts))


class Device:
    """A device on which the time of a layer is proportional to its work, by torch's own counter.

    Args:
        network: what is pruned.
        odd: factor on the time of layers whose output width is no multiple of 8.
        batch_size: examples per run.
    """

    def __init__(self, network: PrunableNetwork, odd: float = 1.0, batch_size: int = 1) -> None:
        self.network = network
        self.odd = odd
        self.inputs = with_batch(network.example_inputs, batch_size)
        self.measured = 0

    def __call__(self, counts: Counts) -> Sample:
        """Run the rebuilt network and add up its work."""
        self.measured += 1
        model = pruned(self.network, counts).eval()
        modules = {path: one for path, one in model.named_modules() if path in self._paths}
        elements: dict[str, int] = {}
        handles = [
            module.register_forward_hook(lambda *seen, at=path: elements.update({at: seen[2].numel()}))
            for path, module in modules.items()
        ]
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(*self.inputs)
        for handle in handles:
            handle.remove()
        work = counter.get_flop_counts()
        seconds = np.zeros(len(self._paths))
        for number, path in enumerate(self._paths):
            macs = sum(work[f"{type(model).__name__}.{path}"].values()) / 2
            width = getattr(modules[path], "out_channels", getattr(modules[path], "out_features", 0))
            factor = 1.0 if width % 8 == 0 else self.odd
            seconds[number] = factor * (PER_MAC * macs + PER_ELEMENT * elements[path])
        return Sample(counts, float(seconds.sum()) + PER_RUN, seconds)

    @property
    def _paths(self) -> list[str]:
        return [one.module for one in self.network.graph.operations]


class Noise:
    """A device that takes any time at all."""

    def __init__(self, network: PrunableNetwork, seed: int = 0) -> None:
        self.operations = len(network.graph.operations)
        self.rng = np.random.default_rng(seed)

    def __call__(self, counts: Counts) -> Sample:
        """Draw times."""
        seconds = self.rng.uniform(1e-5, 1e-3, self.operations)
        return Sample(counts, float(seconds.sum()) + 1e-4, seconds)


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


def table_of(network: PrunableNetwork, sampler: Any = None, samples: int = 24, **settings: Any) -> LatencyTable:
    """A table made without measuring."""
    known = LatencySettings(**settings)
    sampler = sampler or Device(network, batch_size=known.batch_size)
    return LatencyTable.measure(network, known, progress=False, samples=samples, sampler=sampler)


@pytest.fixture(scope="module")
def noisy(network: PrunableNetwork) -> LatencyTable:
    """A table of a device that takes any time at all."""
    return table_of(network, Noise(network), samples=6)


@pytest.mark.parametrize("batch_size", [1, 5])
@pytest.mark.parametrize("name", NAMES)
def test_new_plans_are_predicted(name: str, batch_size: int, networks: dict[str, PrunableNetwork]) -> None:
    """Where time is proportional to work, nearly exactly, with the part that no pruning removes."""
    network = networks[name]
    table, rng = table_of(network, batch_size=batch_size), np.random.default_rng(3)
    device = Device(network, batch_size=batch_size)

    for counts in [network.graph.sizes, *(random_counts(network, rng) for _ in range(4))]:
        assert table.prediction(counts) == pytest.approx(device(counts).seconds, rel=0.03)
    assert table.fixed == pytest.approx(PER_RUN, rel=0.1)
    assert table.measured == pytest.approx(device(network.graph.sizes).seconds)


def test_operations_and_the_fixed_part_add_up(network: PrunableNetwork) -> None:
    """The share of each operation can be told."""
    table, counts = table_of(network), random_counts(network, np.random.default_rng(0))

    parts = table.operation_latency(counts)

    assert parts == pytest.approx(Device(network)(counts).operations, rel=0.1)
    assert parts.sum() + table.fixed == pytest.approx(table.prediction(counts))


def test_latency_is_that_of_a_wider_network_where_it_is_faster(networks: dict[str, PrunableNetwork]) -> None:
    """On a device that likes multiples of 8: 23 channels are no cheaper than 24 are."""
    network = networks["digits_vgg"]
    table, device = table_of(network, Device(network, odd=ODD)), Device(network, odd=ODD)
    odd, even = np.array([15, 15, 23, 23, 55]), np.array([16, 16, 24, 24, 56])

    assert device(even).seconds < device(odd).seconds
    assert table.prediction(odd) == pytest.approx(device(odd).seconds, rel=0.1)
    assert table.latency(odd) == pytest.approx(table.latency(even), rel=0.02)
    assert table.latency(even) == pytest.approx(device(even).seconds, rel=0.05)


@pytest.mark.parametrize("share", [0.45, 0.6, 0.8])
def test_plans_for_a_latency_budget_have_the_widths_that_the_device_likes(
    share: float, networks: dict[str, PrunableNetwork]
) -> None:
    """Because these cost nothing more, whoever allocates; and the budget holds for what is predicted too."""
    network = networks["digits_vgg"]
    device, sizes = Device(network, odd=ODD), network.graph.sizes
    table = table_of(network, device)
    limit = apply_budget(Budget("latency", share), network.costs, Widths.free(sizes), table)
    scores = np.random.default_rng(0).random(network.graph.units)

    for counts in (
        project(np.full(len(sizes), 0.5), limit, Widths.free(sizes)),
        knapsack(scores, network.graph.group_of, limit, Widths.free(sizes)),
    ):
        seconds = device(counts).seconds

        assert table.prediction(counts) <= 1.02 * limit.most
        assert 0.9 * share < seconds / table.measured < 1.1 * share
        for group, size in enumerate(sizes.tolist()):
            wider = [np.where(np.arange(len(sizes)) == group, width, counts) for width in range(8, size + 1, 8)]
            assert all(device(one).seconds > 0.95 * seconds for one in wider if one[group] > counts[group])


@pytest.mark.parametrize("name", NAMES)
def test_latency_hardly_ever_falls_when_a_group_keeps_more(name: str, networks: dict[str, PrunableNetwork]) -> None:
    """Though the device likes multiples of 8; and it never exceeds what is predicted at full width."""
    network = networks[name]
    table = table_of(network, Device(network, odd=ODD))
    rng, sizes = np.random.default_rng(0), network.graph.sizes
    for _ in range(100):
        counts = rng.integers(1, sizes, endpoint=True)
        more = rng.integers(counts, sizes, endpoint=True)

        assert table.latency(counts) <= 1.03 * table.latency(more)
    assert table.full == table.prediction(sizes)


@given(seconds=st.lists(st.integers(1, 5).map(float), min_size=1, max_size=12))
def test_fastest_width_is_the_largest_of_the_best_wider_ones(seconds: list[float]) -> None:
    """Against a search over all of them, for a network of one group."""

    class Model:
        def totals(self, counts: Counts) -> NDArray[np.float64]:
            return np.array(seconds)[counts[:, 0] - 1]

    (best,) = fastest_widths(Model(), np.array([len(seconds)]))  # type: ignore[arg-type]

    for width in range(1, len(seconds) + 1):
        wider = range(width, len(seconds) + 1)
        assert best[width] == max(wider, key=lambda one: (-seconds[one - 1], one))


def test_budget_on_a_noisy_table_still_ends_within_the_budget(noisy: LatencyTable, network: PrunableNetwork) -> None:
    """Whatever was measured, with rules on widths too."""
    widths = WidthRules(align=4).apply(network.graph)
    least = noisy.latency(widths.smallest) / noisy.full
    limit = apply_budget(Budget("latency", (1 + least) / 2), network.costs, widths, noisy)

    for seed in range(5):
        counts = project(np.random.default_rng(seed).random(len(network.graph.sizes)), limit, widths)

        assert limit.holds(counts)
        assert widths.allow(counts).all()


def test_error_is_that_of_plans_it_was_not_learned_from(network: PrunableNetwork) -> None:
    """Predicted and measured shares of the unpruned latency, on a device that is a tenth slower when it is pruned."""
    table, device = table_of(network), Device(network)
    full = device(network.graph.sizes).seconds

    def ratio(plan: PruningPlan) -> float:
        return 1.1 * device(network.counts(plan)).seconds / full

    error = table.check(10, progress=False, ratio=ratio)

    assert len(error.errors) == 10
    assert error.errors == pytest.approx([1 / 1.1 - 1] * 10, abs=0.02)
    assert table.error == error
    assert error.describe().startswith("off by 9.")
    assert "95th percentile of 10 random plans" in error.describe()


def test_error_is_summarised_by_its_median_and_95th_percentile() -> None:
    """Of absolute values, against numpy."""
    errors = tuple(np.random.default_rng(0).normal(0, 0.1, 30).tolist())

    found = TableError(errors, 0)

    assert found.median == pytest.approx(np.median(np.abs(errors)))
    assert found.p95 == pytest.approx(np.percentile(np.abs(errors), 95))


def test_measuring_draws_no_random_numbers_of_the_caller(network: PrunableNetwork) -> None:
    """Results must not depend on whether a table was cached."""
    before = torch.get_rng_state()

    table_of(network, Noise(network), samples=6)

    assert torch.equal(torch.get_rng_state(), before)


def test_prediction_is_quick() -> None:
    """It is called at every step of every bisection; the bound leaves room for a busy machine."""
    deep = PrunableNetwork(build_network("cifar_resnet56"), torch.zeros(1, 3, 32, 32), check=False)
    table, counts = table_of(deep, Noise(deep), samples=4), deep.graph.sizes

    def seconds() -> float:
        start = time.perf_counter()
        table.latency(counts)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(100)) < 1e-3


def test_measured_table_knows_that_a_far_smaller_network_is_faster(networks: dict[str, PrunableNetwork]) -> None:
    """With real time, so only what must hold on the busiest machine: a sixtieth of the work takes less."""
    network = networks["digits_vgg"]
    settings = LatencySettings(threads=1, repeats=5, warmup=1, batch_size=256)
    threads = torch.get_num_threads()

    table = LatencyTable.measure(network, settings, progress=False, samples=4, held_out=1)

    assert table.prediction(np.maximum(1, network.graph.sizes // 8)) < 0.6 * table.full
    assert torch.get_num_threads() == threads
    assert table.error is not None
    assert len(table.error.errors) == 1


# ---- files


def test_saved_table_predicts_the_same(noisy: LatencyTable, network: PrunableNetwork, tmp_path: Path) -> None:
    """To the last bit, and its error is kept."""
    noisy.check(3, progress=False, ratio=lambda _: 0.5)

    noisy.save(tmp_path / "table.json")
    loaded = LatencyTable.load(tmp_path / "table.json", network)

    assert (loaded.full, loaded.fixed, loaded.measured) == (noisy.full, noisy.fixed, noisy.measured)
    assert loaded.error == noisy.error
    rng = np.random.default_rng(0)
    for _ in range(5):
        counts = rng.integers(1, network.graph.sizes, endpoint=True)

        assert loaded.prediction(counts) == noisy.prediction(counts)


def test_cached_table_is_not_measured_again(network: PrunableNetwork, tmp_path: Path) -> None:
    """The folder holds one file for each network, device and settings."""

    def refuse(_: Counts) -> Sample:
        raise AssertionError("measured again")

    def measure(sampler: Any, **settings: Any) -> LatencyTable:
        return LatencyTable.measure(
            network, LatencySettings(**settings), progress=False, cache=tmp_path / "cache", samples=4, sampler=sampler
        )

    first = measure(Noise(network, 0))
    again = measure(refuse)
    other = measure(Noise(network, 1), batch_size=2)

    assert again.full == first.full != other.full
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_damaged_cache_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """With the file to delete."""
    LatencyTable.measure(network, progress=False, cache=tmp_path, samples=4, sampler=Noise(network))
    (file,) = tmp_path.iterdir()
    file.write_text("{}")

    with pytest.raises(PruningError, match=rf"{file.name}.*Delete it and measure again"):
        LatencyTable.measure(network, progress=False, cache=tmp_path, samples=4, sampler=Noise(network))


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
        (_set("format", value=99), "undamaged latency table of format 2.*format 99"),
        (_set("samples", value=None), "undamaged latency table.*TypeError"),
        (_set("samples", value=[]), "undamaged latency table.*0 samples"),
        (_set("samples", 0, value={}), "undamaged latency table.*KeyError: 'counts'"),
        (_set("samples", 0, "seconds", value=-1.0), "undamaged latency table.*a sample of"),
        (_set("samples", 0, "operations", 0, value=None), "undamaged latency table.*a sample of"),
        (_set("samples", 1, "counts", value=[1, 2]), "undamaged latency table.*a sample of"),
        (_set("error", value=3), "undamaged latency table.*TypeError"),
        (_set("fingerprint", "threads", value=999), "measured on this device.*threads 999 instead of"),
        (_set("fingerprint", "device_name", value="abacus"), "device_name 'abacus' instead of.*new table"),
        (_set("fingerprint", "torch", value="0.1"), "torch '0.1' instead of"),
    ],
)
def test_unfitting_table_is_refused(
    noisy: LatencyTable,
    network: PrunableNetwork,
    tmp_path: Path,
    edit: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    """Damage, and another device, each have their message."""
    noisy.save(tmp_path / "table.json")
    content = json.loads((tmp_path / "table.json").read_text())
    edit(content)
    (tmp_path / "table.json").write_text(json.dumps(content))

    with pytest.raises(PruningError, match=message):
        LatencyTable.load(tmp_path / "table.json", network)


def test_table_of_other_settings_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """The message says which."""
    table_of(network, Noise(network), samples=4, batch_size=4).save(tmp_path / "table.json")

    with pytest.raises(PruningError, match=r"table.json' with batch_size 4 instead of 1\. Measure a new table"):
        LatencyTable.load(tmp_path / "table.json", network)


def test_table_of_another_network_is_refused(
    noisy: LatencyTable, networks: dict[str, PrunableNetwork], tmp_path: Path
) -> None:
    """Its layers were never measured."""
    noisy.save(tmp_path / "table.json")

    with pytest.raises(PruningError, match=r"measured for this network.*other layers or channel groups"):
        LatencyTable.load(tmp_path / "table.json", networks["digits_vgg"])


def test_missing_table_is_refused(network: PrunableNetwork, tmp_path: Path) -> None:
    """As any file that is not there."""
    with pytest.raises(PruningError, match="`cache` should lead to a readable JSON file.*No such file"):
        LatencyTable.load(tmp_path / "table.json", network)


def test_too_few_samples_are_refused(network: PrunableNetwork) -> None:
    """Nothing can be learned from three networks."""
    with pytest.raises(PruningError, match="`samples` should be at least 4. Received 3"):
        LatencyTable.measure(network, samples=3, progress=False, sampler=Noise(network))


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
        table_of(network, Noise(network), samples=4)
