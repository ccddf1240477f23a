"""Which cheap score ranks plans by what the user ends with: after full reconstruction, and after fine-tuning.

The plans are those of `proxy.py`, from uniform to extreme, all of one cost; their accuracies after fine-tuning are its
rows. Beside those stand scores of each recovery and measure, with the seconds that they take.

    python benchmarks/taus.py --network cifar_resnet20 --weights cifar10_resnet20.th --data cifar10.npz

Each finished plan is a row of results/taus.csv; a script that was stopped goes on where it was. Kendall's taus, of all
plans and of the better half, go to results/taus.md.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray
from rows import RESULTS, Table
from scipy.stats import kendalltau
from tqdm import tqdm

from prunegym.agents.configuration.options import ProblemOptions
from prunegym.agents.tables import markdown_table
from prunegym.experiments.setup import build_problem
from prunegym.pruning.budget import Budget
from prunegym.pruning.files import replacing
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer
from prunegym.pruning.training import evaluate_network

KEYS = ("network", "budget", "counts")
SCORES = {
    "none": {"recovery": "none"},
    "bn": {"recovery": "bn"},
    "compensate": {"recovery": "compensate"},
    "compensate, divergence": {"recovery": "compensate", "measure": "divergence"},
    "reconstruct": {"recovery": "reconstruct"},
    "reconstruct, divergence": {"recovery": "reconstruct", "measure": "divergence"},
    "distill 20 steps": {"recovery": "distill"},
    "distill 20 steps, divergence": {"recovery": "distill", "measure": "divergence"},
}
"""Scores as searches see them: the cheap form, on the reward images."""
WHOLE = {"full reconstruct": "reconstruct", "full reconstruct, divergence": "reconstruct, divergence"}
"""Scores of the full form, on twice the images."""
TRUTHS = {"reconstructed": "after full reconstruction", "finetuned": "after fine-tuning"}
RESAMPLES = 1000


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    network: str = "cifar_resnet20"
    weights: str | None = None
    data: str = "digits"
    budget: str = "macs:0.35"
    plans: int = 30
    """How many of the plans."""
    examples: int = 1000
    """Reward images of a score."""
    results: Path = RESULTS
    report: bool = False
    """Only write the tables anew, from the rows that are there."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet, then write what follows from it."""
    table = Table(arguments.results / "taus.csv", KEYS)
    if not arguments.report:
        measure(arguments, table)
    text = report(table.rows)
    with replacing(arguments.results / "taus.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(text)


def measure(arguments: Arguments, table: Table) -> None:
    """Score every plan in every way."""
    tuned = finetuned_plans(arguments)
    budget = Budget.parse(arguments.budget)
    options = ProblemOptions(data=arguments.data, reward_examples=arguments.examples)
    problem = build_problem(arguments.network, arguments.weights, options, [budget])
    first = problem.scorer
    scorers = {
        name: Scorer(
            first.network, first.task, replace(first.settings, scored=None, **settings), statistics=first.statistics
        )
        for name, settings in SCORES.items()
    }
    for counts, finetuned in tqdm(list(tuned.items())[: arguments.plans], unit="plan"):
        key = dict(zip(KEYS, (arguments.network, arguments.budget, counts), strict=True))
        if table.has(**key):
            continue
        plan = problem.plan(np.array([int(one) for one in counts.split()]))
        row: dict[str, Any] = {"finetuned": finetuned, "reconstructed": _selection(first, plan)}
        for name, scorer in scorers.items():
            row[name], row[f"{name} seconds"] = timed(lambda s=scorer, p=plan: s.run(p).score)  # type: ignore[misc]
        for name, kind in WHOLE.items():
            scorer, examples = scorers[kind], 2 * arguments.examples
            row[name], row[f"{name} seconds"] = timed(
                lambda s=scorer, p=plan, e=examples: s.run(p, examples=e).score  # type: ignore[misc]
            )
        table.append({**key, **row})


def finetuned_plans(arguments: Arguments) -> dict[str, float]:
    """Accuracy after fine-tuning with the first seed, by counts, from the rows of `proxy.py`."""
    rows = Table(RESULTS / "proxy.csv", ()).rows
    mine = [row for row in rows if (row["network"], row["budget"]) == (arguments.network, arguments.budget)]
    return {row["counts"]: float(row["score"]) for row in mine if row["measure"] == "finetuned" and row["seed"] == "0"}


def _selection(scorer: Scorer, plan: PruningPlan) -> float:
    model = scorer.recovered(plan)
    return float(evaluate_network(model, scorer.task, "selection", device=scorer.device).score)


def timed(work: Callable[[], float]) -> tuple[float, float]:
    """What it gives, and the seconds of processor time that it takes."""
    started = time.process_time()
    value = work()
    return value, round(time.process_time() - started, 3)


def report(rows: list[dict[str, str]]) -> str:
    """Taus of every score, network and truth."""
    parts = ["# Which score ranks plans by what the user ends with"]
    for network, budget in dict.fromkeys((row["network"], row["budget"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["budget"]) == (network, budget)]
        parts.append(f"## {network}, {budget}: {len(mine)} plans")
        parts.append(markdown_table(tau_rows(mine)))
    return "\n\n".join(parts) + "\n"


def tau_rows(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """One row for each score: taus with bootstrap intervals over plans, all and the better half, and its price."""
    found = []
    base = np.mean([float(row["compensate seconds"]) for row in rows])
    for name in (*SCORES, *WHOLE):
        values = np.array([float(row[name]) for row in rows])
        one = {"score": name, "price": f"{np.mean([float(row[f'{name} seconds']) for row in rows]) / base:.2f}"}
        for truth, label in TRUTHS.items():
            target = np.array([float(row[truth]) for row in rows])
            half = target >= np.median(target)
            one[label] = with_interval(values, target)
            one[f"{label}, better half"] = with_interval(values[half], target[half])
        found.append(one)
    return found


def with_interval(values: NDArray[np.float64], target: NDArray[np.float64]) -> str:
    """Kendall's tau with its 95 % bootstrap interval over plans; a dash where all values are the same."""
    if np.ptp(values) == 0:
        return "–"
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES):
        index = rng.integers(len(target), size=len(target))
        tau = kendalltau(values[index], target[index]).statistic
        if np.isfinite(tau):
            drawn.append(tau)
    low, high = np.quantile(drawn, [0.025, 0.975])
    return f"{kendalltau(values, target).statistic:.2f} ({low:.2f} to {high:.2f})"


if __name__ == "__main__":
    main(tyro.cli(Arguments))
