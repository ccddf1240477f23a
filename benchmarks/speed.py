"""What one evaluation costs, beside what it must cost; and what the policy costs.

`evaluation`: prune to 50 % MACs, compensate and recalibrate on 512 images, score 1,000 images, beside (a) the forward
passes alone of the already pruned network over the same images in the same precision, (b) a deep copy pruned by
torch_pruning and evaluated in float32, on the same network with 1x1 shortcuts because torch_pruning cannot do the
others, (c) the same with reconstruction in the cheap form of scores, and (d) a whole reconstruction, with what the
unpruned network computes. All are timed in turn, in one process; ratios are of medians.

`share`: share of a training run's time that is not spent in evaluations (policy, observation, updates).

`policy`: one pass of the policy on networks of ImageNet size, with the memory it took.

    python benchmarks/speed.py --data cifar10.npz --weights cifar10_resnet20.th --large-weights cifar10_resnet56.th \
        --wide-weights vgg/model.safetensors
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch
import tyro
from gymnasium import spaces
from rows import RESULTS, Table

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.policies.policy import PruningPolicy
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.training.loop import TIMING, train
from prunegym.envs.channel_pruning import ChannelPruningEnv
from prunegym.envs.observation import Observation
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.setup import assemble_problem, build_problem, build_task
from prunegym.pruning.budget import Budget
from prunegym.pruning.datasets.data import load_data
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.networks.zoo import build_network
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.recovery import recalibrating
from prunegym.pruning.scoring import Scorer, ScorerSettings
from prunegym.pruning.task import ClassificationTask
from prunegym.pruning.training import evaluate_network

BUDGET = "macs:0.5"
RECALIBRATION, SCORED = 512, 1000


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of ResNet-20."""
    large_weights: str
    """Weights of ResNet-56."""
    wide_weights: str
    """Weights of the half-width VGG-16."""
    repeats: int = 15
    """Timings of each contestant, taken in turn."""
    evaluations: int = 44
    """Evaluations of the training runs whose share is measured."""


def main(arguments: Arguments) -> None:
    """Measure what the table does not hold yet."""
    table = Table(RESULTS / "speed.csv", ("what", "network"))
    task = ClassificationTask(load_data(arguments.data))
    networks = {
        "cifar_resnet20": arguments.weights,
        "cifar_resnet20_conv": None,
        "cifar_resnet56": arguments.large_weights,
        "cifar_vgg16_half": arguments.wide_weights,
    }
    for network, weights in networks.items():
        if not table.has(what="evaluation", network=network):
            evaluation(table, network, weights, task, arguments.repeats)
    for network in ("resnet50", "vgg19"):
        if not table.has(what="policy", network=network):
            policy_pass(table, network)
    for network, weights in (("cifar_resnet20", arguments.weights), ("cifar_resnet56", arguments.large_weights)):
        for rounds in (1, 3):
            if not table.has(what=f"share, {rounds} rounds", network=network):
                share(table, network, weights, arguments, rounds)
    for row in table.rows:
        print({key: value for key, value in row.items() if value and key not in ("torch", "sb3", "cpu", "commit")})


def evaluation(table: Table, name: str, weights: str | None, task: ClassificationTask, repeats: int) -> None:
    """Time one evaluation beside its forward passes, and beside deep copy + torch_pruning + float32."""
    model = build_network(name, num_classes=10, weights=weights)
    network = PrunableNetwork(model, torch.randn(2, 3, 32, 32), name=name)
    settings = ScorerSettings(recovery="compensate", recovery_examples=RECALIBRATION, examples=SCORED)
    problem = PruningProblem(Scorer(network, task, settings), (Budget.parse(BUDGET),))
    limit = problem.limits[problem.budgets[0]]
    counts = problem.uniform_counts(limit)
    plan = problem.plan(counts)
    fitted = Scorer(network, task, replace(settings, recovery="reconstruct"), statistics=problem.scorer.statistics)
    contestants = {
        "evaluation": lambda: problem.scorer.run(plan),
        "forward": forward_passes(problem, plan),
        "reconstruct": lambda: fitted.run(plan),
        "full_reconstruct": lambda: full_reconstruction(fitted, plan),
    }
    ratio = float((counts / problem.sizes).mean())
    if name.endswith("_conv"):
        contestants["torch_pruning"] = torch_pruning_evaluation(model, task, 1 - ratio)
    seconds = in_turn(contestants, repeats)
    row = {f"{key}_seconds": round(median(values), 4) for key, values in seconds.items()}
    other = median(seconds["torch_pruning"]) / median(seconds["evaluation"]) if "torch_pruning" in seconds else None
    add(
        table,
        what="evaluation",
        network=name,
        **row,
        reconstruct_ratio=round(median(seconds["reconstruct"]) / median(seconds["evaluation"]), 4),
        overhead=round(median(seconds["evaluation"]) / median(seconds["forward"]) - 1, 4),
        times_faster=None if other is None else round(other, 3),
        repeats=repeats,
        precision="bfloat16" if problem.scorer.form.half else "float32",
    )


def full_reconstruction(scorer: Scorer, plan: PruningPlan) -> None:
    """All that a recovered network costs, what the unpruned network computes included."""
    scorer.forget_targets()
    scorer.recovered(plan)


def forward_passes(problem: PruningProblem, plan: PruningPlan) -> Callable[[], object]:
    """The same passes over the same images in the same precision, with nothing else."""
    scorer = problem.scorer
    measuring, folded = scorer.candidate(plan)

    def run() -> None:
        with torch.no_grad(), recalibrating(measuring):
            for inputs, _ in scorer.batches("calibration", RECALIBRATION):
                measuring(inputs)
        with torch.inference_mode():
            for inputs, _ in scorer.batches("reward", SCORED):
                folded(inputs)

    return run


def torch_pruning_evaluation(model: torch.nn.Module, task: ClassificationTask, ratio: float) -> Callable[[], object]:
    """Deep copy, torch_pruning's magnitude pruner, recalibration and evaluation in float32."""
    import torch_pruning

    example = torch.randn(2, 3, 32, 32)
    calibration = [inputs for inputs, _ in task.batches("calibration", batch_size=250, limit=RECALIBRATION)]

    def run() -> None:
        smaller = copy.deepcopy(model).eval()
        pruner = torch_pruning.pruner.MetaPruner(
            smaller,
            example,
            importance=torch_pruning.importance.MagnitudeImportance(p=1),
            pruning_ratio=ratio,
            ignored_layers=[smaller.linear],
        )
        pruner.step()
        with torch.no_grad(), recalibrating(smaller):
            for inputs in calibration:
                smaller(inputs)
        evaluate_network(smaller, task, "reward", batch_size=250, limit=SCORED)

    return run


def in_turn(contestants: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each contestant, run one after the other so that a drift of the machine meets all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for repeat in range(repeats + 2):
        for name, run in contestants.items():
            started = time.perf_counter()
            run()
            if repeat >= 2:  # the first two warm up
                seconds[name].append(time.perf_counter() - started)
    return seconds


def share(table: Table, name: str, weights: str, arguments: Arguments, rounds: int) -> None:
    """Train for a while and say where the time went."""
    with TemporaryDirectory() as folder:
        config = TrainConfig(
            network=(name,),
            weights=(weights,),
            data=arguments.data,
            budget=(BUDGET,),
            evaluations=arguments.evaluations,
            rounds=rounds,
            tensorboard=False,
        )
        problem = build_problem(name, weights, config, config.budgets, task=build_task(config))
        clock = Clock(problem)
        out = Path(folder) / "run"
        run = RunFolder.create(out, network=name, searcher="ppo", budget=BUDGET, seed=0, config=config)
        result = train([problem], config, run, progress=False)
        updates = float(run.read_rows(TIMING)[-1]["update_seconds"] or 0)
    add(
        table,
        what=f"share, {rounds} rounds",
        network=name,
        total_seconds=round(result.seconds, 2),
        scoring_seconds=round(clock.scoring, 2),
        looking_seconds=round(clock.looking, 2),
        update_seconds=round(updates, 2),
        share=round(1 - (clock.scoring + clock.looking) / result.seconds, 4),
        evaluations=result.evaluations,
    )


class Clock:
    """Adds up the time spent in candidate networks: scoring, and the looks between rounds."""

    def __init__(self, problem: PruningProblem) -> None:
        self.scoring = self.looking = 0.0
        scorer = problem.scorer
        score, look = scorer.score, scorer.look

        def timed_score(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = score(*args, **kwargs)
            self.scoring += time.perf_counter() - started
            return result

        def timed_look(*args: object, **kwargs: object) -> object:
            started = time.perf_counter()
            result = look(*args, **kwargs)
            self.looking += time.perf_counter() - started
            return result

        scorer.score, scorer.look = timed_score, timed_look


def policy_pass(table: Table, name: str) -> None:
    """One pass of an untrained policy on a torchvision network at 224 x 224."""
    model = build_network(name, num_classes=1000)
    network = PrunableNetwork(model, torch.randn(2, 3, 224, 224), name=name, check=False)
    problem = assemble_problem(network, RandomImages(), [Budget.parse(BUDGET)], settings=_tiny())
    env = ChannelPruningEnv(problem, rounds=1)
    observation, _ = env.reset()
    # in a process of its own: the passes of the network have set this one's peak memory already
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        seconds, rise = pool.submit(time_policy, env.observation_space, env.action_space, observation).result()
    add(
        table,
        what="policy",
        network=name,
        policy_seconds=round(seconds, 4),
        memory_mib=round(rise, 1),
        groups=len(network.graph.groups),
        edges=env.padding.edges,
    )


def time_policy(observations: spaces.Dict, actions: spaces.Box, observation: Observation) -> tuple[float, float]:
    """Median seconds of a pass, and how far policy and passes raised the peak memory of this process in MiB."""
    before = peak_memory()
    policy = PruningPolicy(observations, actions, lambda _: 1e-3)
    seconds = in_turn({"policy": lambda: policy.act(observation)}, 10)["policy"]
    return median(seconds), peak_memory() - before


def peak_memory() -> float:
    """Peak resident memory in MiB, from Linux; `getrusage` would hand on the peak of the parent process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def _tiny() -> ScorerSettings:
    return ScorerSettings(statistics_examples=4, recovery_examples=4, examples=4, batch_size=2)


class RandomImages(ClassificationTask):
    """A few random images: what a policy pass costs does not depend on what they show."""

    def __init__(self) -> None:
        object.__setattr__(self, "label_smoothing", 0.0)

    @property
    def name(self) -> str:
        """Not a data set."""
        return "random"

    @property
    def fingerprint(self) -> str:
        """Always the same images."""
        return "random"

    def batches(self, split: str, *, batch_size: int, limit: int | None = None, **_options: object):
        """Two images a batch, whatever is asked."""
        generator = torch.Generator().manual_seed(0)
        for _ in range(2):
            classes = torch.randint(0, 1000, (2,), generator=generator)
            yield torch.randn(2, 3, 224, 224, generator=generator), classes

    def _check_shape(self, outputs: torch.Tensor) -> None:
        """Any head will do."""


COLUMNS = (
    *("what", "network", "evaluation_seconds", "forward_seconds", "torch_pruning_seconds", "reconstruct_seconds"),
    *("full_reconstruct_seconds", "reconstruct_ratio", "overhead"),
    *("times_faster", "repeats", "precision", "total_seconds", "scoring_seconds", "looking_seconds"),
    *("update_seconds", "share", "evaluations", "policy_seconds", "memory_mib", "groups", "edges"),
)


def add(table: Table, **row: object) -> None:
    """Write a row; columns of the other measurements stay empty."""
    table.append({column: row.get(column, "") for column in COLUMNS})


if __name__ == "__main__":
    main(tyro.cli(Arguments))
