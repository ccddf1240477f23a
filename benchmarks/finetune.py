"""`prunegym prune` to 50 % MACs by several searchers, under one fine-tuning schedule and seed.

Each searcher's row holds the test accuracies right after pruning, after recovery and after fine-tuning (last epoch),
MACs and parameters, and the speed-up measured side by side in torch and in ONNX Runtime.

    python benchmarks/finetune.py --data cifar10.npz --weights cifar10_resnet20.th --policy A/policy.safetensors
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from rows import RESULTS, Table


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of the network."""
    policy: Path
    """Policy file."""
    network: str = "cifar_resnet20"
    budget: str = "macs:0.5"
    epochs: int = 10
    seed: int = 0
    searchers: tuple[str, ...] = ("policy", "uniform")
    runs: Path = Path("runs/benchmarks")
    """Where the run folders go; a run that was stopped goes on."""


def main(arguments: Arguments) -> None:
    """Run what the table does not hold yet."""
    table = Table(RESULTS / "finetune.csv", ("network", "budget", "searcher", "seed"))
    for searcher in arguments.searchers:
        key = {"network": arguments.network, "budget": arguments.budget, "searcher": searcher, "seed": arguments.seed}
        if not table.has(**key):
            table.append({**key, **one(arguments, searcher)})
    for row in table.rows:
        print({name: row[name] for name in ("searcher", "after_pruning", "after_recovery", "after_finetuning")})


def one(arguments: Arguments, searcher: str) -> dict[str, object]:
    """Prune once through the command line, as a user would."""
    budget = arguments.budget.replace(":", "")
    out = arguments.runs / f"finetune__{arguments.network}__{searcher}__{budget}__s{arguments.seed}"
    command = [sys.executable, "-m", "prunegym", "prune", "--network", arguments.network]
    command += ["--weights", arguments.weights, "--data", arguments.data, "--budget", arguments.budget]
    command += ["--searcher", searcher, "--epochs", str(arguments.epochs), "--amp", "--json"]
    command += ["--seed", str(arguments.seed), "--out", str(out), "--latency-threads", "1"]
    if searcher == "policy":
        command += ["--policy", str(arguments.policy)]
    result = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    latency = {row["backend"]: row for row in result["latency"]}
    return {
        "epochs": arguments.epochs,
        **result["test_scores"],
        "macs_before": result["macs"]["before"],
        "macs": result["macs"]["after"],
        "parameters_before": result["parameters"]["before"],
        "parameters": result["parameters"]["after"],
        **{f"speed_up_{name}": round(row.get("speed_up", 0.0), 3) for name, row in latency.items()},
        **{f"statement_{name}": row["sentence"] for name, row in latency.items()},
    }


if __name__ == "__main__":
    main(tyro.cli(Arguments))
