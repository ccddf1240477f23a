"""Is an agent with a latency budget worth more than one with a MACs budget, where what counts is latency?

For each seed an agent is trained for a share of the MACs, and its own plan is measured in ONNX Runtime, one image on
one thread. Another agent of the same seed gets what was measured as its latency budget, and the same evaluations. Then
the unpruned network and both pruned ones take turns, and both are scored after recovery on the selection split, which
no search has seen, and on the test images. Intervals are bootstraps over images, paired between the two networks.

    python benchmarks/latency_agents.py --data cifar10.npz --weights cifar10_resnet56.th

Training and scoring can share the machine with other work; `match` and `measure` need it to themselves: `--stage macs`,
`match`, `latency`, `measure` and `score` do one after the other. Each finished piece is kept, and a script that was
stopped goes on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rows import RESULTS, Table
from scipy.stats import bootstrap
from torch import nn

from prunegym.agents.configuration.config import TrainConfig
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.latency_budget import bring_to_budget
from prunegym.agents.setup import build_problem
from prunegym.agents.training.loop import train
from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget
from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.files import read_json, write_json
from prunegym.pruning.modes import evaluating
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import prepare, ready_to_measure, take_turns_in_sessions
from prunegym.pruning.timing.latency_table import LatencyTable
from prunegym.pruning.timing.speed_up import SpeedUp, speed_up

STAGES = ("macs", "match", "latency", "measure", "score")
SPLITS = ("selection", "test")
_RESAMPLES = 2000


@dataclass(frozen=True)
class Arguments:
    """What to run."""

    data: str
    """CIFAR-10 as an .npz file."""
    weights: str
    """Weights of the network."""
    network: str = "cifar_resnet56"
    budget: str = "macs:0.5"
    """Of the agents that count MACs."""
    seeds: tuple[int, ...] = (0, 1, 2)
    evaluations: int = 100
    """Plans scored by each agent."""
    rounds: int = 1
    stage: Literal["all", "macs", "match", "latency", "measure", "score"] = "all"
    """What to do now; later stages need what earlier ones left."""
    runs: Path = Path("runs/benchmarks/latency_agents")
    """Where the run folders, the latency table and the plans go."""
    name: str = "latency_agents"
    """Name of the table in benchmarks/results."""


def main(arguments: Arguments) -> None:
    """Do what is missing of the stages asked for."""
    torch.set_num_threads(1)
    work = Work(arguments)
    for stage in STAGES if arguments.stage == "all" else (arguments.stage,):
        for seed in arguments.seeds:
            getattr(work, stage)(seed)
    summarise(work.table)


class Work:
    """The pieces of each seed.

    Args:
        arguments: what to run.
    """

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments
        self.table = Table(RESULTS / f"{arguments.name}.csv", ("network", "budget", "agent", "seed"))
        arguments.runs.mkdir(parents=True, exist_ok=True)

    def macs(self, seed: int) -> None:
        """Train an agent for a share of the MACs."""
        self._train("macs", self.arguments.budget, seed)

    def match(self, seed: int) -> None:
        """Measure its plan: the budget of the other agent."""
        file = self._path(f"match_s{seed}.json")
        if file.exists():
            return
        problem = self._problem(self.arguments.budget, seed, latency=True)
        plan = self._plan("macs", seed)
        shares = [1 / found.ratio for found in (speed_up(*_known(problem).beside(plan)) for _ in range(3))]
        write_json(file, {"share": float(np.median(shares)), "shares": shares})

    def latency(self, seed: int) -> None:
        """Train an agent for the same latency."""
        self._train("latency", self._latency_budget(seed), seed)

    def measure(self, seed: int) -> None:
        """Bring the second plan to its budget by the clock, and measure both."""
        file = self._path(f"measured_s{seed}.json")
        if file.exists():
            return
        budget = Budget.parse(self._latency_budget(seed))
        problem = self._problem(str(budget), seed)
        plan, report = bring_to_budget(problem, budget, self._plan("latency", seed), _known(problem).beside)
        plans = {"macs": self._plan("macs", seed), "latency": plan}
        network, known = problem.scorer.network, _known(problem)
        content = {
            name: {
                "plan": plans[name].to_json(),
                "plans_measured": report.plans if name == "latency" else 0,
                "table_share": round(known.prediction(network.counts(plans[name])) / known.full, 4),
                "latency_share": round(1 / found.ratio, 4),
                "latency_low": round(1 / found.high, 4),
                "latency_high": round(1 / found.low, 4),
                "drift": round(found.drift, 4),
            }
            for name, found in side_by_side(problem, plans).items()
        }
        write_json(file, content)

    def score(self, seed: int) -> None:
        """Score both plans, and write their rows."""
        key = {"network": self.arguments.network, "budget": self.arguments.budget, "seed": seed}
        if self.table.has(**key, agent="latency"):
            return
        measured = read_json(self._path(f"measured_s{seed}.json"))
        problem = self._problem(self.arguments.budget, seed)
        network = problem.scorer.network
        plans = {name: PruningPlan.from_json(one["plan"]) for name, one in measured.items()}
        correct = {name: _correct(problem, problem.scorer.recovered(one)) for name, one in plans.items()}
        unpruned = _correct(problem, network.model)
        for name, one in plans.items():
            row = {
                **key,
                "agent": name,
                "asked": self.arguments.budget if name == "macs" else self._latency_budget(seed),
                "macs_share": round(network.cost(one).macs / network.full_cost.macs, 4),
                **{column: value for column, value in measured[name].items() if column != "plan"},
                "evaluations": self.arguments.evaluations,
                "rounds": self.arguments.rounds,
                "counts": " ".join(map(str, network.counts(one).tolist())),
            }
            for split in SPLITS:
                row[split] = round(float(correct[name][split].mean()), 4)
                row[f"unpruned_{split}"] = round(float(unpruned[split].mean()), 4)
                gained = correct[name][split] - correct["macs"][split]
                row[f"{split}_gain"], row[f"{split}_gain_low"], row[f"{split}_gain_high"] = _interval(gained)
            self.table.append(row)

    def _train(self, name: str, budget: str, seed: int) -> None:
        """Train an agent, and keep its own plan."""
        if self._path(f"{name}_s{seed}.json").exists():
            return
        config = self._config(budget, seed)
        run = RunFolder.create(
            self._path(f"{name}_s{seed}"),
            network=self.arguments.network,
            searcher="ppo",
            budget=budget,
            seed=seed,
            config=config,
        )
        problem = self._problem(budget, seed)
        result = train([problem], config, run)
        (plan,) = result.own.values()
        plan.save(self._path(f"{name}_s{seed}.json"))

    def _config(self, budget: str, seed: int) -> TrainConfig:
        return TrainConfig(
            network=(self.arguments.network,),
            weights=(self.arguments.weights,),
            data=self.arguments.data,
            data_root=self.arguments.runs,
            budget=(budget,),
            seed=seed,
            evaluations=self.arguments.evaluations,
            rounds=self.arguments.rounds,
            latency_backend="onnxruntime",
            latency_threads=1,
            tensorboard=False,
        )

    def _problem(self, budget: str, seed: int, *, latency: bool = False) -> PruningProblem:
        config = self._config(budget, seed)
        return build_problem(
            self.arguments.network, self.arguments.weights, config, config.budgets, latency=latency, progress=True
        )

    def _plan(self, name: str, seed: int) -> PruningPlan:
        return PruningPlan.load(self._path(f"{name}_s{seed}.json"))

    def _latency_budget(self, seed: int) -> str:
        return f"latency:{read_json(self._path(f'match_s{seed}.json'))['share']:.4f}"

    def _path(self, name: str) -> Path:
        return self.arguments.runs / name


def _known(problem: PruningProblem) -> LatencyTable:
    assert isinstance(problem.latency, LatencyTable)
    return problem.latency


def side_by_side(problem: PruningProblem, plans: dict[str, PruningPlan]) -> dict[str, SpeedUp]:
    """Let the unpruned network and those of all plans take turns."""
    network = problem.scorer.network
    with ready_to_measure(_known(problem).settings) as ready:
        inputs = with_batch(network.example_inputs, ready.batch_size)
        models = {"unpruned": network.model, **{name: network.pruned(plan) for name, plan in plans.items()}}
        openers = {name: prepare(name, model, inputs, ready) for name, model in models.items()}
        measured = take_turns_in_sessions(openers, ready)
    return {name: speed_up(measured["unpruned"], measured[name]) for name in plans}


def _correct(problem: PruningProblem, model: nn.Module) -> dict[str, NDArray[np.float64]]:
    """Which images of each split a network gets right ``(images,)``, in float32."""
    task = problem.scorer.task
    found: dict[str, NDArray[np.float64]] = {}
    with evaluating(model), torch.no_grad():
        for split in SPLITS:
            batches = task.batches(split, batch_size=256)
            hits = [(model(inputs).argmax(1) == targets).double() for inputs, targets in batches]
            found[split] = torch.cat(hits).numpy()
    return found


def _interval(gained: NDArray[np.float64]) -> tuple[float, float, float]:
    """Mean, and its 95 % interval by a percentile bootstrap over images."""
    if not gained.any():  # the agent that the other is compared with
        return 0.0, 0.0, 0.0
    found = bootstrap((gained,), np.mean, n_resamples=_RESAMPLES, method="percentile", rng=np.random.default_rng(0))
    low, high = found.confidence_interval
    return round(float(gained.mean()), 4), round(float(low), 4), round(float(high), 4)


def summarise(table: Table) -> None:
    """Print the rows of both agents."""
    shown: tuple[str, ...] = ("agent", "seed", "asked", "latency_share", *SPLITS, *(f"{one}_gain" for one in SPLITS))
    for row in table.rows:
        kept: dict[str, Any] = {name: row[name] for name in shown}
        print(kept)


if __name__ == "__main__":
    main(tyro.cli(Arguments))
