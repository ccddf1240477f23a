"""What pruning starts from: accuracy and cost of the unpruned networks, in float32.

    python benchmarks/unpruned.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th \
        --vgg16-half vgg/model.safetensors

Finished rows are skipped.
"""

from __future__ import annotations

from dataclasses import dataclass

import tyro
from rows import RESULTS, Table

from prunegym.agents.configuration.config import EvaluateConfig
from prunegym.agents.evaluate import measure_unpruned
from prunegym.agents.setup import build_model, build_prunable, build_task


@dataclass(frozen=True)
class Arguments:
    """What to measure."""

    data: str
    """CIFAR-10 as an .npz file."""
    resnet20: str | None = None
    """Weights of cifar_resnet20; without them it is left out, and so on."""
    resnet56: str | None = None
    vgg16_half: str | None = None


def main(arguments: Arguments) -> None:
    """Measure what the table does not hold yet."""
    table = Table(RESULTS / "unpruned.csv", ("network",))
    weights = {
        "cifar_resnet20": arguments.resnet20,
        "cifar_resnet56": arguments.resnet56,
        "cifar_vgg16_half": arguments.vgg16_half,
    }
    task = build_task(EvaluateConfig(network=tuple(weights), data=arguments.data))
    for name, file in weights.items():
        if file is not None and not table.has(network=name):
            network = build_prunable(build_model(name, file, task.data, seed=0), task, name=name)
            table.append(measure_unpruned(network, task))
    for row in table.rows:
        print(row["network"], f"selection {row['selection_score']}, test {row['test_score']}, {row['macs']} MACs")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
