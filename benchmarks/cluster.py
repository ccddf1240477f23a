"""Evaluations per second with more workers: processes of this machine, and actors of a Ray cluster.

Each row plays episodes of one round with random actions, so that every step of a worker scores one plan that was not
scored before; the first step, which prepares the images, is not counted. Workers have one thread each. Without an
address, a cluster of two nodes is started on this machine: what it shows is the price of going through Ray, and that
work spreads, not what more machines would bring.

    python benchmarks/cluster.py --data cifar10.npz --weights cifar10_resnet20.th --workers 1 2
    python benchmarks/cluster.py --data cifar10.npz --weights cifar10_resnet20.th --workers 1 8 32 --address auto
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import tyro
from rows import RESULTS, Table
from stable_baselines3.common.vec_env import SubprocVecEnv, VecEnv

from prunegym.agents.configuration.config import TrainConfig
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.cluster import connected
from prunegym.envs.setting import PruningProblem
from prunegym.envs.vector import RayVecEnv
from prunegym.experiments.setup import build_problem


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str = "digits"
    """Data set, or CIFAR-10 as an .npz file."""
    network: str = "cifar_resnet20"
    weights: str | None = None
    budget: str = "macs:0.5"
    workers: tuple[int, ...] = (1, 2)
    """Numbers of workers; the first is what the others are compared with."""
    evaluations: int = 60
    """Plans that are scored for a row, at least."""
    address: str | None = None
    """Of a Ray cluster; by default two nodes on this machine."""
    name: str = "cluster"
    """Of the file in results/."""


def main(arguments: Arguments) -> None:
    """Measure what the table does not hold yet."""
    table = Table(RESULTS / f"{arguments.name}.csv", ("where", "network", "data", "workers"))
    data = arguments.data.rpartition("/")[2]
    missing = [
        (where, workers)
        for where in ("processes", "actors")
        for workers in arguments.workers
        if not table.has(where=where, network=arguments.network, data=data, workers=workers)
    ]
    if missing:
        options = {"data": arguments.data, "budget": (arguments.budget,), "device": "cpu", "rounds": 1}
        config = TrainConfig(network=(arguments.network,), **options)
        problem = build_problem(arguments.network, arguments.weights, config, config.budgets)
        with cluster(arguments) if any(where == "actors" for where, _ in missing) else nullcontext((0, "")) as known:
            for where, workers in missing:
                rate, evaluations = measured(made(where, problem, workers), arguments.evaluations)
                table.append(
                    {
                        "where": where,
                        "network": arguments.network,
                        "data": data,
                        "workers": workers,
                        "nodes": known[0] if where == "actors" else 1,
                        "evaluations": evaluations,
                        "evaluations_per_second": round(rate, 3),
                    }
                )
    report(table, arguments)


@contextmanager
def cluster(arguments: Arguments) -> Iterator[tuple[int, str]]:
    """Be connected to the cluster asked for; gives its number of nodes and its address."""
    if arguments.address is not None:
        with connected(arguments.address) as ray:
            yield sum(node["Alive"] for node in ray.nodes()), arguments.address
        return
    from ray.cluster_utils import Cluster

    node = {"num_cpus": max(1, -(-max(arguments.workers) // 2)), "object_store_memory": 300 * 2**20}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        nodes.add_node(**node)
        with connected(nodes.address):
            yield 2, nodes.address
    finally:
        nodes.shutdown()


def made(where: str, problem: PruningProblem, workers: int) -> VecEnv:
    """Environments side by side."""
    if where == "actors":
        return RayVecEnv([problem] * workers, partial(ChannelPruningEnv, rounds=1))
    return SubprocVecEnv([partial(alone, problem)] * workers)


def alone(problem: PruningProblem) -> ChannelPruningEnv:
    """An environment in a process of one thread."""
    torch.set_num_threads(1)
    return ChannelPruningEnv(problem, rounds=1)


def measured(envs: VecEnv, evaluations: int) -> tuple[float, int]:
    """Evaluations per second, and how many were made."""
    rng = np.random.default_rng(0)
    shape = (envs.num_envs, *envs.action_space.shape)
    try:
        envs.seed(0)
        envs.reset()
        envs.step(rng.uniform(-1, 1, shape).astype(np.float32))
        steps = -(-evaluations // envs.num_envs)
        started = time.perf_counter()
        for _ in range(steps):
            envs.step(rng.uniform(-1, 1, shape).astype(np.float32))
        return steps * envs.num_envs / (time.perf_counter() - started), steps * envs.num_envs
    finally:
        envs.close()


def report(table: Table, arguments: Arguments) -> None:
    """Print the rates, and how many times that of the least number of workers they are."""
    first = str(arguments.workers[0])
    rates = {(row["where"], row["workers"]): float(row["evaluations_per_second"]) for row in table.rows}
    for (where, workers), rate in rates.items():
        print(f"{where:10} {workers:>4} workers {rate:8.2f} evaluations/s {rate / rates[where, first]:6.2f} x")


if __name__ == "__main__":
    main(tyro.cli(Arguments))
