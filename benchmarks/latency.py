"""How far latency tables are off, and whether latency budgets hold on the network that is deployed.

`table`: a latency table is measured, and its predictions are compared with 30 random plans that it was not learned from
(25 to 90 % of the MACs), each measured beside the unpruned network.

`budget`: plans for half the latency (uniform, knapsack, and random keep ratios from three seeds) are brought to the
budget as `prunegym prune` does it, exported as ONNX, and the files of the pruned and the unpruned network are measured
side by side.

Everything runs in ONNX Runtime, one image on one thread; weights are random, because they do not change the time.
Needs a machine with nothing else to do: `taskset -c 1` keeps it on one core.

    taskset -c 1 python benchmarks/latency.py
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import tyro
from rows import RESULTS, Table

from prunegym.agents.latency_budget import bring_to_budget
from prunegym.agents.setup import bare_network
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.export import export_onnx
from prunegym.pruning.latency import Latency, LatencySettings, ready_to_measure, take_turns
from prunegym.pruning.latency_table import LatencyTable
from prunegym.pruning.onnx_export import open_session, session_feeds, with_batch
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.runtimes import RUNTIMES
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.speed_up import SpeedUp, speed_up
from prunegym.pruning.task import ClassificationTask

NETWORKS = ("cifar_resnet56", "mobilenet_v2")
BACKEND = "onnxruntime"
ALLOCATIONS = ("uniform", "knapsack", "random 0", "random 1", "random 2")


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


def main(arguments: Arguments) -> None:
    """Measure what the table does not hold yet."""
    torch.set_num_threads(1)
    table = Table(RESULTS / f"{arguments.name}.csv", ("what", "network", "allocation"))
    for name in arguments.networks:
        wanted = [("table", ""), *(("budget", allocation) for allocation in ALLOCATIONS)]
        missing = [one for one in wanted if not table.has(what=one[0], network=name, allocation=one[1])]
        if not missing:
            continue
        network = bare_network(name, None, None, seed=0)
        settings = LatencySettings(backend=BACKEND, threads=1, repeats=arguments.repeats)
        started = time.perf_counter()
        # measured afresh, and not kept: a script that was stopped would mix two states of the machine
        known = LatencyTable.measure(network, settings, samples=arguments.samples)
        seconds = time.perf_counter() - started
        for what, allocation in missing:
            if what == "table":
                table_row(table, name, known, seconds, arguments.plans)
            else:
                budget_row(table, name, known, Budget.parse(arguments.budget), allocation)
    for row in table.rows:
        print({key: value for key, value in row.items() if value and key not in ("torch", "sb3", "cpu", "commit")})


def table_row(table: Table, name: str, known: LatencyTable, seconds: float, plans: int) -> None:
    """The error of a table on held-out plans."""
    error = known.check(plans)
    add(
        table,
        what="table",
        network=name,
        plans=plans,
        samples=len(known.samples),
        table_seconds=round(seconds, 1),
        median_error=round(error.median, 4),
        p95_error=round(error.p95, 4),
        worst_error=round(max(map(abs, error.errors)), 4),
        bias=round(float(np.median(error.errors)), 4),
        unpruned_ms=round(1e3 * known.measured, 3),
        seed=error.seed,
    )


def budget_row(table: Table, name: str, known: LatencyTable, budget: Budget, allocation: str) -> None:
    """One plan brought to the budget, and what its exported file takes."""
    problem = problem_of(known, budget)
    plan, report = bring_to_budget(problem, budget, allocate(problem, budget, allocation), known.beside)
    found = exported_speed_up(problem, plan, known.settings)
    network = problem.scorer.network
    add(
        table,
        what="budget",
        network=name,
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
        unpruned_ms=round(1e3 * report.unpruned_seconds, 3),
        drift=round(found.drift, 4),
    )


def problem_of(known: LatencyTable, budget: Budget) -> PruningProblem:
    """A pruning problem on random images, which the knapsack needs for its gradients."""
    network = known.network
    few = ScorerSettings(statistics_examples=4, recalibration_examples=4, examples=4, batch_size=2, precision="float32")
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


def exported_speed_up(problem: PruningProblem, plan: PruningPlan, settings: LatencySettings) -> SpeedUp:
    """Write both networks as `prunegym prune --onnx` does, and measure the files side by side."""
    network = problem.scorer.network
    example = with_batch(network.example_inputs, 1)
    with TemporaryDirectory() as folder, ready_to_measure(settings) as ready:
        runs = {}
        for name, model in (("before", network.model), ("after", network.pruned(plan))):
            path = Path(folder) / f"{name}.onnx"
            export_onnx(model, example, path)
            session = open_session(path.read_bytes(), 1)
            feeds = session_feeds(session, example)
            runs[name] = lambda session=session, feeds=feeds: session.run(None, feeds)
        samples = take_turns(runs, ready)
    return speed_up(*(Latency.from_samples(times, ready) for times in samples.values()))


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
    *("off_budget", "macs_share", "unpruned_ms", "drift", "seed", "runtime"),
)


def add(table: Table, **row: object) -> None:
    """Write a row; columns of the other measurement stay empty."""
    row["runtime"] = f"{BACKEND} {RUNTIMES[BACKEND].version}, 1 thread, batch 1, float32"
    table.append({column: row.get(column, "") for column in COLUMNS})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
