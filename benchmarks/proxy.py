"""Which reward? How well cheap scores of a pruned network rank what fine-tuning makes of it.

Allocations from uniform to extreme, all of one cost, are fine-tuned under one fixed schedule and measured on the
selection split. Beside that stand the proxies: accuracy and loss on the reward split right after pruning, with
recalibrated batch normalisation, with compensation too, and after 20 and 100 training steps; the importance kept; and
a regression on the allocation itself. Some allocations are fine-tuned with several seeds, to know the noise.

    python benchmarks/proxy.py --network cifar_resnet20 --weights resnet20.th --data cifar10.npz --budget macs:0.5

Each finished piece is a row of results/proxy.csv; a script that was stopped goes on where it was. The figures drawn
from the rows, Kendall's tau of each proxy with its bootstrap interval, go to proxy_taus.csv and proxy.md.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from allocations import Allocation, allocations
from proxy_table import write_tables
from rows import RESULTS, Table
from tqdm import tqdm

from prunegym.agents.configuration.options import ProblemOptions
from prunegym.agents.setup import build_problem
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.training import TrainingSettings, evaluate_network, train_network, weights_digest

KEYS = ("network", "setup", "budget", "counts", "measure", "seed")


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    network: str
    """Network by name, or path/file.py:function."""
    weights: str | None = None
    """Weights of the network."""
    data: str = "digits"
    """Data by name, file or folder."""
    budget: str = "macs:0.5"
    """The cost that all allocations have."""
    allocations: int = 36
    """How many; fewer than 30 are for trying out."""
    repeated: int = 6
    """How many of them are fine-tuned with every seed."""
    seeds: int = 3
    """Fine-tuning seeds: 0 for all allocations, the others for those that are repeated."""
    epochs: int = 3
    """Passes over the training images: the schedule that decides."""
    learning_rate: float = 0.01
    """Of the fine-tuning, and of the proxies' steps."""
    batch_size: int = 128
    amp: bool = False
    """Fine-tune in bfloat16 where that is safe."""
    steps: tuple[int, ...] = (20, 100)
    """Training steps of the proxies."""
    criterion: str = "taylor"
    reward_examples: int = 2000
    seed: int = 0
    """Of the random allocations."""
    device: str = "auto"
    name: str = "proxy"
    """Of the tables in the folder of results."""
    results: Path = RESULTS
    """Folder of the tables."""
    runs: Path = Path("runs/benchmarks")
    """Where interrupted fine-tunings keep their checkpoints."""
    report: bool = False
    """Only write the tables anew, from the rows that are there."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet, then write what follows from it."""
    table = Table(arguments.results / f"{arguments.name}.csv", KEYS)
    if not arguments.report:
        Proxies(arguments, table).run()
    print(write_tables(table.rows, arguments.results, arguments.name))


class Proxies:
    """The measurements of one network and budget.

    Args:
        arguments: What to run.
        table: Takes a row per finished piece.
    """

    def __init__(self, arguments: Arguments, table: Table) -> None:
        self.arguments = arguments
        self.table = table
        self.options = ProblemOptions(
            data=arguments.data,
            criterion=arguments.criterion,
            reward_examples=arguments.reward_examples,
            recovery_rate=arguments.learning_rate,
            device=arguments.device,
        )
        self.budget = Budget.parse(arguments.budget)
        self.problem: PruningProblem = build_problem(
            arguments.network, arguments.weights, self.options, [self.budget]
        )
        self.setup = self._setup()
        self._scorers: dict[str, Scorer] = {}

    def run(self) -> None:
        """All pieces that are missing: first one of each kind for every allocation, then the repeated ones."""
        arguments = self.arguments
        chosen = allocations(self.problem, self.budget, arguments.allocations, arguments.seed)
        work = [(one, measure, 0) for one in chosen for measure in self.measures]
        again = np.unique(np.linspace(0, len(chosen) - 1, arguments.repeated).round().astype(int)).tolist()
        work += [(chosen[index], "finetuned", seed) for seed in range(1, arguments.seeds) for index in again]
        for allocation, measure, seed in tqdm(work, desc="proxy", unit="piece"):
            key = self._key(allocation, measure, seed)
            if not self.table.has(**key):
                self.table.append({**key, **self._piece(allocation, measure, seed)})

    @property
    def measures(self) -> tuple[str, ...]:
        """Everything that is measured of an allocation, cheapest first."""
        steps = (f"steps {count}" for count in self.arguments.steps)
        return ("pruned", "recalibrated", "compensated", *steps, "importance", "finetuned")

    def _piece(self, allocation: Allocation, measure: str, seed: int) -> dict[str, Any]:
        """One row: score and loss, and the seconds they took."""
        plan = self.problem.plan(allocation.counts)
        started = time.perf_counter()
        if measure == "finetuned":
            score, loss = self._finetuned(plan, allocation, seed)
        elif measure == "importance":
            score, loss = self._importance(plan)
        else:
            found = self._scorer(measure).run(plan)
            score, loss = found.score, found.loss
        seconds = time.perf_counter() - started
        return {
            "allocation": allocation.name,
            "cost": self.problem.limits[self.budget].fraction(allocation.counts),
            "keep": " ".join(f"{ratio:.4f}" for ratio in allocation.counts / self.problem.sizes),
            "score": score,
            "loss": loss,
            "seconds": round(seconds, 3),
            "epochs": self.arguments.epochs,
            "learning_rate": self.arguments.learning_rate,
            "criterion": self.arguments.criterion,
            "reward_examples": self.arguments.reward_examples,
        }

    def _scorer(self, measure: str) -> Scorer:
        """A scorer with the recovery that the measure is named after; statistics are shared."""
        if measure not in self._scorers:
            first = self.problem.scorer
            settings = replace(first.settings, recovery_steps=0)
            if measure == "pruned":
                settings = replace(settings, compensate=False, recovery_examples=0)
            elif measure == "recalibrated":
                settings = replace(settings, compensate=False)
            elif measure != "compensated":
                settings = replace(settings, recovery_steps=int(measure.removeprefix("steps ")))
            scorer = Scorer(first.network, first.task, settings, statistics=first.statistics, device=first.device)
            scorer.unpruned()  # images are prepared now, not in the seconds of the first allocation
            self._scorers[measure] = scorer
        return self._scorers[measure]

    def _importance(self, plan: PruningPlan) -> tuple[float, float]:
        """Share of the Taylor importance that stays, and of the squared kind that goes."""
        scorer = self.problem.scorer
        mask = plan.mask(scorer.network.graph)
        first, squared = scorer.statistics.taylor, scorer.statistics.taylor_squared
        return float(first[mask].sum() / first.sum()), float(squared[~mask].sum() / squared.sum())

    def _finetuned(self, plan: PruningPlan, allocation: Allocation, seed: int) -> tuple[float, float]:
        """Accuracy and loss on the selection split after the last epoch."""
        scorer, arguments = self.problem.scorer, self.arguments
        digest = hashlib.sha256(f"{self.setup} {arguments.budget} {allocation.text}".encode()).hexdigest()[:16]
        checkpoint = arguments.runs / "proxy" / f"{digest}__s{seed}.pt"
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        model = copy.deepcopy(scorer.recovered(plan))
        settings = TrainingSettings(
            epochs=arguments.epochs,
            learning_rate=arguments.learning_rate,
            batch_size=arguments.batch_size,
            amp=arguments.amp,
            seed=seed,
        )
        train_network(model, scorer.task, settings, device=scorer.device, checkpoint=checkpoint)
        measured = evaluate_network(model, scorer.task, "selection", device=scorer.device)
        checkpoint.unlink(missing_ok=True)
        return measured.score, measured.loss

    def _key(self, allocation: Allocation, measure: str, seed: int) -> dict[str, Any]:
        network = self.problem.scorer.network.name
        values = (network, self.setup, str(self.budget), allocation.text, measure, seed)
        return dict(zip(KEYS, values, strict=True))

    def _setup(self) -> str:
        """Digest of everything that rows must share to be compared: weights, data, scoring and schedule."""
        scorer, arguments = self.problem.scorer, self.arguments
        schedule = (arguments.epochs, arguments.learning_rate, arguments.batch_size, arguments.amp)
        shared = [weights_digest(scorer.network.model), scorer.task.fingerprint, schedule, vars(scorer.settings)]
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:10]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
