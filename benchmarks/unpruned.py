"""What pruning starts from: accuracy and cost of the unpruned networks, in float32.

    python benchmarks/unpruned.py --data cifar10.npz --resnet20 cifar10_resnet20.th --resnet56 cifar10_resnet56.th \
        --vgg16-half vgg/model.safetensors

Finished rows are skipped.
"""

from __future__ import annotations

import tyro
from base_networks import BaseNetworks
from rows import RESULTS, Table

from prunegym.agents.configuration.config import EvaluateConfig
from prunegym.experiments.evaluate import measure_unpruned
from prunegym.experiments.setup import build_model, build_prunable, build_task


def main(arguments: BaseNetworks) -> None:
    """Measure what the table does not hold yet."""
    table = Table(RESULTS / "unpruned.csv", ("network",))
    task = build_task(EvaluateConfig(network=tuple(arguments.weights), data=arguments.data))
    for name, file in arguments.weights.items():
        if file is not None and not table.has(network=name):
            network = build_prunable(build_model(name, file, task.data, seed=0), task, name=name)
            table.append(measure_unpruned(network, task))
    for row in table.rows:
        print(row["network"], f"selection {row['selection_score']}, test {row['test_score']}, {row['macs']} MACs")


if __name__ == "__main__":
    main(tyro.cli(BaseNetworks))
