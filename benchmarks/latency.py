"""How far latency tables are off, and whether latency budgets hold on the network that is deployed.

`table`: a latency table is measured, and its predictions are compared with 30 random plans that it was not learned from
(25 to 90 % of the MACs), each measured beside the unpruned network.

`budget`: plans for half the latency (uniform, knapsack, and random keep ratios from three seeds) are brought to the
budget as `prunegym prune` does it, exported as ONNX, and the files of the pruned and the unpruned network are measured
side by side.

Everything runs in ONNX Runtime, one image on one thread. Weights are random; batch normalisation is calibrated on
noise, because exporters leave out the biases of an untrained one, and runtimes then fuse other operations.
Needs a machine with nothing else to do: `taskset -c 1` keeps it on one core.

Finished rows are skipped, rows of networks whose batch normalisation was not calibrated are replaced. A table and
held-out plans that were measured when the script was stopped lie in --work until all rows of their network are written,
and are taken up again at the same commit.

    taskset -c 1 python benchmarks/latency.py
    taskset -c 1 python benchmarks/latency.py --networks mobilenet_v2
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rows import RESULTS, Table, provenance

from prunegym.agents.searching.latency_budget import bring_to_budget
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.setup import bare_network
from prunegym.pruning.budget import Budget
from prunegym.pruning.deployment.onnx_export import export_onnx, with_batch
from prunegym.pruning.files import plain, read_json, write_json
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import recalibrate
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.timing.latency import (
    Latency,
    LatencySettings,
    device_fingerprint,
    ready_to_measure,
    take_turns_in_sessions,
)
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.timing.runtimes import RUNTIMES, session_opener
from prunegym.pruning.timing.speed_up import speed_up

NETWORKS = ("cifar_resnet56", "mobilenet_v2")
BACKEND = "onnxruntime"
ALLOCATIONS = ("uniform", "knapsack", "random 0", "random 1", "random 2")
WEIGHTS = "random, calibrated"
UNPRUNED, PRUNED = "unpruned.onnx", "pruned.onnx"


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    networks: tuple[str, ...] = NETWORKS
    """Networks, with random weights on their own input size."""
    budget: str = "latency:0.5"
    """The budget that plans are brought to."""
    plans: int = 30
    """Held-out plans of the table."""
    samples: int | None = None
    """Networks that the table is learned from; by default as many as `prunegym` takes."""
    repeats: int = 50
    """Turns of each measurement."""
    name: str = "latency"
    """Name of the result table."""
    work: Path = Path("runs/benchmarks/latency")
    """Folder for what was measured of a network until all its rows are written."""


def main(arguments: Arguments) -> None:
    """Measure what the table does not hold yet."""
    torch.set_num_threads(1)
    table = Table(RESULTS / f"{arguments.name}.csv", ("what", "network", "allocation"))
    for name in arguments.networks:
        wanted = [("table", ""), *(("budget", allocation) for allocation in ALLOCATIONS)]
        missing = [
            (what, allocation)
            for what, allocation in wanted
            if not table.has(what=what, network=name, allocation=allocation, weights=WEIGHTS)
        ]
        if not missing:
            continue
        work = Work(name, arguments)
        for what, allocation in missing:
            if what == "table":
                table_row(table, work, arguments.plans)
            else:
                budget_row(table, work, Budget.parse(arguments.budget), allocation)
        shutil.rmtree(work.folder)
    for row in table.rows:
        print({key: value for key, value in row.items() if value and key not in ("torch", "sb3", "cpu", "commit")})


def calibrated(name: str) -> PrunableNetwork:
    """A network with random weights whose batch normalisation has seen noise."""
    network = bare_network(name, None, {}, seed=0)
    shape = network.example_inputs[0].shape[1:]
    recalibrate(network.model, [torch.randn(8, *shape, generator=torch.Generator().manual_seed(1))])
    return network


class Work:
    """What was measured of one network, on the disk after every piece."""

    def __init__(self, name: str, arguments: Arguments) -> None:
        self.name = name
        self.network = calibrated(name)
        self.folder = arguments.work / name
        self._file = self.folder / "measured.json"
        settings = LatencySettings(backend=BACKEND, threads=1, repeats=arguments.repeats)
        known = (provenance()["commit"], device_fingerprint(settings), arguments.samples, arguments.repeats)
        conditions = plain([*known, arguments.plans])
        self._kept: dict[str, Any] = read_json(self._file) if self._file.exists() else {}
        if self._kept.get("conditions") != conditions:  # another commit, runtime or machine
            shutil.rmtree(self.folder, ignore_errors=True)
            self._kept = {"conditions": conditions, "ratios": []}
        started = time.perf_counter()
        tables = self.folder / "tables"
        self.table = LatencyTable.measure(self.network, settings, samples=arguments.samples, cache=tables)
        self._kept.setdefault("seconds", time.perf_counter() - started)
        self._save()

    @property
    def seconds(self) -> float:
        """What the table took."""
        return float(self._kept["seconds"])

    def ratios(self) -> Iterator[float | None]:
        """Latency of held-out plans that is known, as shares of the unpruned network's, then None."""
        yield from list(self._kept["ratios"])
        while True:
            yield None

    def keep(self, ratio: float) -> None:
        """Add the latency of one more held-out plan."""
        self._kept["ratios"].append(ratio)
        self._save()

    def exported(self, name: str, model: torch.nn.Module) -> bytes:
        """The file that `prunegym export` writes; that of the unpruned network is written once."""
        path = self.folder / name
        if name != UNPRUNED or not path.exists():
            export_onnx(model, with_batch(self.network.example_inputs, 1), path)
        return path.read_bytes()

    def _save(self) -> None:
        write_json(self._file, self._kept)


def table_row(table: Table, work: Work, plans: int) -> None:
    """The error of a table on held-out plans."""
    known, measured = work.table, work.ratios()

    def ratio(plan: PruningPlan) -> float:
        found = next(measured)
        if found is None:
            found = 1 / speed_up(*known.beside(plan)).ratio
            work.keep(found)
        return found

    error = known.check(plans, ratio=ratio)
    add(
        table,
        what="table",
        network=work.name,
        plans=plans,
        samples=len(known.samples),
        table_seconds=round(work.seconds, 1),
        median_error=round(error.median, 4),
        p95_error=round(error.p95, 4),
        worst_error=round(max(map(abs, error.errors)), 4),
        bias=round(float(np.median(error.errors)), 4),
        unpruned_ms=milliseconds(known.measured),
        seed=error.seed,
    )


def budget_row(table: Table, work: Work, budget: Budget, allocation: str) -> None:
    """One plan brought to the budget, and what its exported file takes."""
    known, network = work.table, work.network
    problem = problem_of(known, budget)
    plan, report = bring_to_budget(problem, budget, allocate(problem, budget, allocation), known.beside)
    before, after = measure_files(work, network.pruned(plan))
    found = speed_up(before, after)
    add(
        table,
        what="budget",
        network=work.name,
        allocation=allocation,
        budget=str(budget),
        plans=report.plans,
        table_share=round(report.table, 4),
        measured_share=round(report.measured, 4),
        exported_share=round(1 / found.ratio, 4),
        exported_low=round(1 / found.high, 4),
        exported_high=round(1 / found.low, 4),
        off_budget=round(1 / found.ratio / report.asked - 1, 4),
        macs_share=round(network.cost(plan).macs / network.full_cost.macs, 4),
        unpruned_ms=milliseconds(report.unpruned_seconds),
        pruned_ms=milliseconds(report.seconds),
        exported_unpruned_ms=milliseconds(before.median),
        exported_ms=milliseconds(after.median),
        drift=round(found.drift, 4),
    )


def milliseconds(seconds: float) -> float:
    """To the microsecond."""
    return round(1e3 * seconds, 3)


def problem_of(known: LatencyTable, budget: Budget) -> PruningProblem:
    """A pruning problem on random images, which the knapsack needs for its gradients."""
    network = known.network
    few = ScorerSettings(statistics_examples=4, recovery_examples=4, examples=4, batch_size=2, precision="float32")
    scorer = Scorer(network, RandomImages(network.example_inputs[0].shape[1:]), few)
    return PruningProblem(scorer, (budget,), known)


def allocate(problem: PruningProblem, budget: Budget, allocation: str) -> PruningPlan:
    """A plan within the budget of the table."""
    limit = problem.limits[budget]
    if allocation == "uniform":
        return problem.plan(problem.uniform_counts(limit))
    if allocation == "knapsack":
        return problem.plan(problem.knapsack_counts(limit))
    rng = np.random.default_rng(int(allocation.removeprefix("random ")))
    return problem.plan(problem.project(rng.uniform(0.1, 1.0, len(problem.sizes)), limit))


def measure_files(work: Work, pruned: torch.nn.Module) -> tuple[Latency, Latency]:
    """Measure the exported files of the unpruned and the pruned network side by side, as the search measures."""
    example = with_batch(work.network.example_inputs, 1)
    with ready_to_measure(work.table.settings) as ready:
        files = {name: work.exported(name, one) for name, one in ((UNPRUNED, work.network.model), (PRUNED, pruned))}
        openers = {name: session_opener(data, example, ready) for name, data in files.items()}
        measured = take_turns_in_sessions(openers, ready)
    return measured[UNPRUNED], measured[PRUNED]


class RandomImages(ClassificationTask):
    """A few random images: what a network takes does not depend on what they show.

    Args:
        shape: of one image.
        classes: outputs of the network, at least.
    """

    def __init__(self, shape: tuple[int, ...], classes: int = 10) -> None:
        object.__setattr__(self, "label_smoothing", 0.0)
        object.__setattr__(self, "shape", tuple(shape))
        object.__setattr__(self, "classes", classes)

    @property
    def name(self) -> str:
        """Not a data set."""
        return "random"

    @property
    def fingerprint(self) -> str:
        """Always the same images."""
        return "random"

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_options: Any) -> Iterator[Any]:
        """Two images a batch, whatever is asked."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            classes = torch.randint(0, self.classes, (2,), generator=generator)
            yield torch.randn(2, *self.shape, generator=generator), classes

    def _check_shape(self, outputs: torch.Tensor) -> None:
        """Any head will do."""


COLUMNS = (
    *("what", "network", "allocation", "budget", "plans", "samples", "table_seconds", "median_error", "p95_error"),
    *("worst_error", "bias", "table_share", "measured_share", "exported_share", "exported_low", "exported_high"),
    *("off_budget", "macs_share", "unpruned_ms", "pruned_ms", "exported_unpruned_ms", "exported_ms", "drift", "seed"),
    *("weights", "runtime"),
)


def add(table: Table, **row: object) -> None:
    """Write a row; columns of the other measurement stay empty."""
    row["weights"] = WEIGHTS
    row["runtime"] = f"{BACKEND} {RUNTIMES[BACKEND].version}, 1 thread, batch 1, float32"
    table.replace({column: row.get(column, "") for column in COLUMNS})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
