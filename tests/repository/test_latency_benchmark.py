"""The benchmark of latency: it can be stopped at any time, and its table may get columns."""

import csv
import importlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import Latency, LatencySettings
from prunegym.pruning.timing.latency_samples import Sample
from prunegym.pruning.timing.latency_table import LatencyTable

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
NETWORK = "digits_vgg"
OLD = {"what": "table", "network": NETWORK, "allocation": "", "plans": "30", "median_error": "0.5", "note": "old"}


@pytest.fixture
def script() -> Iterator[ModuleType]:
    """The script, which imports others by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        module = importlib.import_module("latency")
    threads = torch.get_num_threads()
    yield module
    torch.set_num_threads(threads)


class Device:
    """A device whose time is proportional to the channels; notes what it measured, and stops when it is told to."""

    def __init__(self, stop_after: int = 10**9) -> None:
        self.sampled, self.measured = 0, list[PruningPlan]()
        self.stop_after = stop_after

    def make_table(self, network: PrunableNetwork, settings: LatencySettings, **options: Any) -> LatencyTable:
        """What ``LatencyTable.measure`` does."""
        sizes, operations = network.graph.sizes, len(network.graph.operations)

        def sampler(counts: NDArray[np.int64]) -> Sample:
            self.sampled += 1
            seconds = float((counts / sizes).mean())
            return Sample(counts, seconds, np.full(operations, seconds / operations))

        def beside(plan: PruningPlan) -> tuple[Latency, Latency]:
            if len(self.measured) == self.stop_after:
                raise KeyboardInterrupt
            self.measured.append(plan)
            share = float((network.counts(plan) / sizes).mean())
            return Latency.from_samples([1.0] * 5, settings), Latency.from_samples([share] * 5, settings)

        table = LatencyTable.measure(network, settings, sampler=sampler, progress=False, **options)
        vars(table)["beside"] = beside
        return table


def run(script: ModuleType, device: Device, tmp_path: Path) -> list[dict[str, str]]:
    """The script on one network; its rows."""
    settings = LatencySettings(threads=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "RESULTS", tmp_path)
        patch.setattr(script, "LatencyTable", SimpleNamespace(measure=device.make_table))
        files = Latency.from_samples([0.004] * 5, settings), Latency.from_samples([0.002] * 5, settings)
        patch.setattr(script, "measure_files", lambda *_: files)
        script.main(script.Arguments(networks=(NETWORK,), plans=4, samples=8, work=tmp_path / "work"))
    with (tmp_path / "latency.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_stopped_script_goes_on_with_the_held_out_plan_it_was_at(script: ModuleType, tmp_path: Path) -> None:
    """The table and the plans before are not measured again, and the rows are those of a run that was not stopped."""
    first, second, third, whole = Device(stop_after=2), Device(), Device(), Device()
    with pytest.raises(KeyboardInterrupt):
        run(script, first, tmp_path)

    rows = run(script, second, tmp_path)
    again = run(script, third, tmp_path)
    unstopped = run(script, whole, tmp_path / "other")

    assert (first.sampled, second.sampled, third.sampled) == (8, 0, 0)
    assert first.measured + second.measured == whole.measured
    assert not third.measured
    assert again == rows
    assert {one["what"] for one in rows} == {"table", "budget"}
    for one, other in zip(rows, unstopped, strict=True):
        assert {**one, "table_seconds": ""} == {**other, "table_seconds": ""}
    assert not (tmp_path / "work" / NETWORK).exists()


def test_rows_hold_milliseconds_and_old_ones_are_replaced_in_their_place(script: ModuleType, tmp_path: Path) -> None:
    """Rows of networks that are not asked for stay, with nothing in the new columns."""
    kept = {**OLD, "network": "another"}
    with (tmp_path / "latency.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(OLD))
        writer.writeheader()
        writer.writerows([OLD, kept])

    rows = run(script, Device(), tmp_path)

    assert [one["network"] for one in rows] == [NETWORK, "another", *[NETWORK] * len(script.ALLOCATIONS)]
    assert rows[0]["median_error"] != "0.5"
    assert {key: rows[1][key] for key in OLD} == kept
    assert rows[1]["exported_ms"] == ""
    for row in rows[2:]:
        assert (row["exported_unpruned_ms"], row["exported_ms"], row["exported_share"]) == ("4.0", "2.0", "0.5")
        assert float(row["pruned_ms"]) / float(row["unpruned_ms"]) == pytest.approx(float(row["measured_share"]), 1e-3)


def test_networks_have_biases_where_trained_ones_do(script: ModuleType) -> None:
    """Batch normalisation that has seen nothing shifts nothing, and exporters leave its bias out."""
    network = script.calibrated("digits_resnet")

    norms = [one for one in network.model.modules() if isinstance(one, nn.BatchNorm2d)]
    assert norms
    assert all(one.running_mean is not None and bool((one.running_mean != 0).all()) for one in norms)
