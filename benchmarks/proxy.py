"""What plans are worth after fine-tuning: allocations from uniform to extreme, all of one cost, under one schedule.

    python benchmarks/proxy.py --network cifar_resnet20 --weights resnet20.th --data cifar10.npz --budget macs:0.35

Each finished fine-tuning is a row of results/proxy.csv, measured on the selection split after the last epoch; a script
that was stopped goes on where it was. Some allocations are fine-tuned with several seeds, to know the noise. Which
cheap score tells beforehand is asked by `taus.py`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from allocations import Allocation, allocations
from rows import RESULTS, Table
from tqdm import tqdm

from prunegym.agents.configuration.options import ProblemOptions
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.setup import build_problem
from prunegym.pruning.budget import Budget
from prunegym.pruning.plan import PruningPlan
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
    """Of the fine-tuning."""
    batch_size: int = 128
    amp: bool = False
    """Fine-tune in bfloat16 where that is safe."""
    criterion: str = "residual_taylor"
    seed: int = 0
    """Of the random allocations."""
    device: str = "auto"
    name: str = "proxy"
    """Of the table in the folder of results."""
    results: Path = RESULTS
    """Folder of the table."""
    runs: Path = Path("runs/benchmarks")
    """Where interrupted fine-tunings keep their checkpoints."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    FineTunings(arguments, Table(arguments.results / f"{arguments.name}.csv", KEYS)).run()


class FineTunings:
    """The fine-tunings of one network and budget.

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
            recovery="compensate",
            device=arguments.device,
        )
        self.budget = Budget.parse(arguments.budget)
        self.problem: PruningProblem = build_problem(arguments.network, arguments.weights, self.options, [self.budget])
        self.setup = self._setup()

    def run(self) -> None:
        """All that are missing: first one for every allocation, then the repeated ones."""
        arguments = self.arguments
        chosen = allocations(self.problem, self.budget, arguments.allocations, arguments.seed)
        work = [(one, 0) for one in chosen]
        again = np.unique(np.linspace(0, len(chosen) - 1, arguments.repeated).round().astype(int)).tolist()
        work += [(chosen[index], seed) for seed in range(1, arguments.seeds) for index in again]
        for allocation, seed in tqdm(work, desc="proxy", unit="fine-tuning"):
            key = self._key(allocation, seed)
            if not self.table.has(**key):
                self.table.append({**key, **self.piece(allocation, seed)})

    def piece(self, allocation: Allocation, seed: int) -> dict[str, Any]:
        """One row: score and loss after fine-tuning, and the seconds it took."""
        started = time.perf_counter()
        score, loss = self._finetuned(self.problem.plan(allocation.counts), allocation, seed)
        return {
            "allocation": allocation.name,
            "cost": self.problem.limits[self.budget].fraction(allocation.counts),
            "keep": " ".join(f"{ratio:.4f}" for ratio in allocation.counts / self.problem.sizes),
            "score": score,
            "loss": loss,
            "seconds": round(time.perf_counter() - started, 3),
            "epochs": self.arguments.epochs,
            "learning_rate": self.arguments.learning_rate,
            "criterion": self.arguments.criterion,
        }

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

    def _key(self, allocation: Allocation, seed: int) -> dict[str, Any]:
        network = self.problem.scorer.network.name
        values = (network, self.setup, str(self.budget), allocation.text, "finetuned", seed)
        return dict(zip(KEYS, values, strict=True))

    def _setup(self) -> str:
        """Digest of everything that rows must share to be compared: weights, data, scoring and schedule."""
        scorer, arguments = self.problem.scorer, self.arguments
        schedule = (arguments.epochs, arguments.learning_rate, arguments.batch_size, arguments.amp)
        shared = [weights_digest(scorer.network.model), scorer.task.fingerprint, schedule, vars(scorer.settings)]
        return hashlib.sha256(json.dumps(shared, sort_keys=True).encode()).hexdigest()[:10]


if __name__ == "__main__":
    main(tyro.cli(Arguments))
