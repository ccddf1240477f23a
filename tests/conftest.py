"""Small networks that each couple channels in another way, and a task on random tensors for them.

Networks and problems are made once per session and shared: tests must not change them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import settings

from helpers.toys import (
    LIVE,
    TOYS,
    ZOO,
    ImitationTask,
    KnownScorer,
    Live,
    PlainImitationTask,
    RandomTask,
    Stopwatch,
    made,
    random_task_for,
    toy_network,
    zoo_network,
)
from prunegym.commands.cli import main
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.allocation import project
from prunegym.pruning.budget import Budget, apply_budget
from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import TrainingSettings, train_network
from prunegym.pruning.widths import Widths

# No deadlines: a busy machine is not an error. The same examples every time: a commit that passed passes again.
# `--hypothesis-profile=thorough` looks longer, and somewhere else each time.
settings.register_profile("prunegym", deadline=None, derandomize=True)
settings.register_profile("thorough", deadline=None, max_examples=1500)
settings.load_profile("prunegym")


@pytest.fixture(scope="session")
def toys() -> Callable[[str], PrunableNetwork]:
    """Toy networks by name; made once."""
    return toy_network


@pytest.fixture(scope="session")
def zoo() -> Callable[[str], PrunableNetwork]:
    """Networks of the zoo by name; made once."""
    return zoo_network


@pytest.fixture(scope="session")
def task_for() -> Callable[[PrunableNetwork], RandomTask]:
    """A task on random tensors for any network."""
    return random_task_for


@pytest.fixture(scope="session", params=sorted(TOYS))
def toy(request: pytest.FixtureRequest) -> PrunableNetwork:
    """Each toy network in turn."""
    return toy_network(request.param)


@pytest.fixture(scope="session", params=ZOO)
def zoo_member(request: pytest.FixtureRequest) -> PrunableNetwork:
    """Each small network of the zoo in turn."""
    return zoo_network(request.param)


@pytest.fixture(scope="session")
def digits() -> ClassificationTask:
    """Handwritten digits."""
    return ClassificationTask(load_data("digits"))


@pytest.fixture(scope="session")
def trained(digits: ClassificationTask) -> PrunableNetwork:
    """A residual network that has learned something of the digits: pruning hurts it, and unevenly."""
    model = build_network("digits_resnet")
    train_network(model, digits, TrainingSettings(epochs=4))
    return PrunableNetwork(model.eval(), torch.zeros(2, 1, 8, 8), name="digits_resnet")


@pytest.fixture(scope="session")
def scorer(trained: PrunableNetwork, digits: ClassificationTask) -> Scorer:
    """Scores plans of the trained network on few examples, in single precision."""
    settings = ScorerSettings(
        precision="float32", statistics_examples=64, recovery_examples=64, examples=150, batch_size=75
    )
    return Scorer(trained, digits, settings)


@pytest.fixture(scope="session")
def problem(scorer: Scorer) -> PruningProblem:
    """The trained network with a budget of each kind."""
    budgets = tuple(map(Budget.parse, ("macs:0.5", "params:0.3", "latency:0.6", "latency:5ms")))
    return PruningProblem(scorer, budgets, Stopwatch(scorer.network.graph.sizes))


@pytest.fixture(scope="session")
def live_problem() -> PruningProblem:
    """Three groups and a budget that the channels which reach the output cost exactly: the best plan scores 1."""
    network = PrunableNetwork(made(Live), torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(1)))
    cost = network.costs.macs(np.array(LIVE))
    settings = ScorerSettings(precision="float32", recovery="none", batch_size=100)
    scorer = Scorer(network, ImitationTask(network), settings)
    return PruningProblem(scorer, (Budget("macs", (cost + 0.5) / network.full_cost.macs),))


@pytest.fixture(scope="session")
def loss_problem(live_problem: PruningProblem) -> PruningProblem:
    """The same toy, budget and best plan, where the loss says what the score says; channels are kept by norm."""
    network = live_problem.scorer.network
    settings = ScorerSettings(criterion="l2", precision="float32", recovery="none", examples=60, batch_size=100)
    return PruningProblem(Scorer(network, PlainImitationTask(network), settings), live_problem.budgets)


@pytest.fixture(scope="session")
def known_scorer(scorer: Scorer) -> Callable[[], KnownScorer]:
    """Makes known objectives of the trained digits network, to keep half of each group, with its real statistics."""

    def make() -> KnownScorer:
        known = KnownScorer(scorer.network, scorer.network.graph.sizes // 2)
        known.statistics = scorer.statistics
        return known

    return make


@pytest.fixture
def known_problem(zoo: Callable[[str], PrunableNetwork]) -> PruningProblem:
    """Twelve groups, half the MACs, and an objective whose best plan is known to be far from uniform."""
    network = zoo("cifar_resnet20")
    sizes, budget = network.graph.sizes, Budget("macs", 0.5)
    widths = Widths.free(sizes)
    asked = np.random.default_rng(7).uniform(0.1, 1.0, len(sizes))
    best = project(asked, apply_budget(budget, network.costs, widths), widths)
    return PruningProblem(KnownScorer(network, best), (budget,))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[Callable[[], Any]]:
    """Makes Ray clusters of two nodes on this machine, one in place of the other; ``second`` is the node to kill."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    made: list[Any] = []
    patch = pytest.MonkeyPatch()
    patch.setenv("RAY_worker_niceness", "0")  # else actors wait for whatever a busy machine does

    def end() -> None:
        ray.shutdown()
        for one in made:
            one.shutdown()
        made.clear()

    def make() -> Any:
        end()
        node = {"num_cpus": 2, "object_store_memory": 100 * 2**20}
        one = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        made.append(one)
        one.second = one.add_node(**node)
        return one

    yield make
    end()
    patch.undo()


@pytest.fixture
def rng() -> np.random.Generator:
    """The same numbers in each test."""
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def random_plan() -> Callable[[PrunableNetwork, np.random.Generator], PruningPlan]:
    """Makes plans that keep any channels, at least one of each group."""

    def make(network: PrunableNetwork, rng: np.random.Generator) -> PruningPlan:
        mask = rng.random(network.graph.units) < rng.uniform(0.2, 0.9)
        for group in network.graph.groups:
            mask[group.start + rng.integers(group.size)] = True
        return PruningPlan.from_mask(network.graph, mask)

    return make


@pytest.fixture(scope="session")
def pruning_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders of `train`, `evaluate`, `prune` and `compare` on digits, by command: little of everything."""
    folders = {name: tmp_path_factory.mktemp("runs") / name for name in ("train", "evaluate", "prune", "compare")}
    few = ["--statistics-examples", "16", "--recovery-examples", "16", "--reward-examples", "32"]
    shared = ["--network", "digits_resnet", "--budget", "macs:0.5", "--device", "cpu", *few]
    size = ["--evaluations", "8", "--update-evaluations", "2", "--rounds", "1"]
    learning = [*size, "--imitation-steps", "1", "--ppo-epochs", "1"]
    searchers = [part for name in ("uniform", "random", "agent") for part in ("--searcher", name)]
    policy = ["--policy", str(folders["train"] / "policy.safetensors")]
    more = {
        "train": learning,
        "evaluate": policy,
        "prune": [*policy, "--epochs", "1"],
        "compare": [*learning, *searchers, "--repeats", "2", "--latency"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunegym.experiments.prune.MEASURED_IN", ("torch",))  # exports take seconds
        for command, folder in folders.items():
            assert main([command, *shared, *more[command], "--out", str(folder)]) == 0
    return folders


@pytest.fixture(scope="session")
def random_images(tmp_path_factory: pytest.TempPathFactory) -> ClassificationTask:
    """Colour images ``(3, 8, 8)`` of four classes, with nothing to learn."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (800, 8, 8, 3)).astype(np.uint8), rng.integers(0, 4, 800)
    path = tmp_path_factory.mktemp("random") / "images.npz"
    np.savez(path, x_train=images[:600], y_train=labels[:600], x_test=images[600:], y_test=labels[600:])
    return ClassificationTask(load_data(str(path)))
