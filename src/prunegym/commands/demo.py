"""``prunegym demo``: the whole way on embedded images of digits, each step a command with its own folder.

A step whose folder is complete is not repeated, so an interrupted demonstration continues.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prunegym.agents.configuration.config import (
    DemoConfig,
    EvaluateConfig,
    InspectConfig,
    PretrainConfig,
    PruneConfig,
    TrainConfig,
    TransferConfig,
)
from prunegym.agents.run_folders.reload import same_in_new_process
from prunegym.agents.run_folders.running import RESULT, Launch, Reporter, Result
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.commands.agent_commands import run_evaluate, run_train, run_transfer
from prunegym.commands.demo_report import write_report
from prunegym.commands.network_commands import run_inspect, run_pretrain, run_prune

#: Coupled by shortcuts; and one with depthwise convolutions and squeeze-and-excitation, new to the agent.
HOME, FOREIGN = "digits_resnet", "digits_mobilenet"
#: At half the MACs little is lost on digits; the second budget leaves something to win.
BUDGETS = ("macs:0.5", "macs:0.3")
FINAL_BUDGET = "macs:0.5"
#: Who prunes in the last part, under the same fine-tuning and seed.
PRUNERS = ("uniform", "knapsack", "policy")
REPORT = "report.md"
PICTURE = "overview.png"


@dataclass(frozen=True)
class _Effort:
    """How much is done of everything."""

    base_epochs: int
    evaluations: int
    few_shot: int
    tuning_epochs: int
    update_evaluations: int
    examples: int
    """Of statistics, recalibration and reward, at most."""


_FULL = _Effort(20, 300, 40, 10, 10, 512)
_QUICK = _Effort(1, 4, 2, 1, 2, 32)


def run_demo(config: DemoConfig, reporter: Reporter) -> Result:
    """Go the whole way.

    Raises:
        PruningError: The folder holds something else or cannot be written.
    """
    launch = Launch(config, reporter, (HOME, FOREIGN), "demo", "+".join(BUDGETS))
    content = launch.finished()
    if content is None:
        run = launch.open()
        content = _Demo(config, run, reporter).go()
        run.write_json(RESULT, content)
    return Result(content, Path(content["report"]).read_text(encoding="utf-8").rstrip())


class _Demo:
    """The steps, in order; each returns the result of its command."""

    def __init__(self, config: DemoConfig, run: RunFolder, reporter: Reporter) -> None:
        self.config = config
        self.run = run
        self.reporter = reporter
        self.effort = _QUICK if config.quick else _FULL
        # absolute, so that a step is recognised from wherever the demonstration is continued
        self.folder = run.folder.resolve()
        self.scoring: dict[str, Any] = {
            "seed": config.seed,
            "device": "cpu",
            "statistics_examples": self.effort.examples,
            "recovery_examples": self.effort.examples,
            "reward_examples": self.effort.examples,
        }

    def go(self) -> dict[str, Any]:
        """All steps, and the report."""
        started = time.perf_counter()
        base = {name: self.pretrain(name) for name in (HOME, FOREIGN)}
        weights = {name: one["weights"] for name, one in base.items()}
        self.say("inspect", f"channel groups of {HOME}")
        inspection = run_inspect(InspectConfig(network=HOME, data="digits"), self.silent())
        self.run.write_json("inspection.json", inspection.content)
        self.reporter.say(inspection.text)
        training = self.train(weights[HOME])
        unpruned = self.evaluate_unpruned(weights)
        evaluation = self.evaluate(weights[HOME], training["policy"])
        transfer = self.transfer(weights[FOREIGN], training["policy"])
        pruned = {name: self.prune(name, weights[HOME], training["policy"]) for name in PRUNERS}
        self.reporter.limit.check()
        self.say("reload", "the pruned network, in a new process")
        identical = same_in_new_process(Path(pruned["policy"]["folder"]))
        content = {
            "folder": str(self.folder),
            "report": str(self.folder / REPORT),
            "picture": str(self.folder / PICTURE),
            "quick": self.config.quick,
            "seed": self.config.seed,
            "unpruned": unpruned["rows"],
            "training": training,
            "evaluation": evaluation["rows"],
            "transfer": transfer["rows"],
            "pruned": pruned,
            "reloaded_identical": identical,
            "seconds": time.perf_counter() - started,
        }
        curve = RunFolder(self.folder / "train").read_rows("metrics.csv")
        write_report(content, curve, self.folder / REPORT, self.folder / PICTURE)
        return content

    def pretrain(self, network: str) -> dict[str, Any]:
        """Train a base network."""
        self.say("pretrain", f"{network} on handwritten digits")
        config = PretrainConfig(
            network=network,
            epochs=self.effort.base_epochs,
            batch_size=64,
            seed=self.config.seed,
            device="cpu",
            out=self.folder / f"base_{network}",
        )
        return run_pretrain(config, self.silent()).content

    def train(self, weights: str) -> dict[str, Any]:
        """Train an agent."""
        self.say("train", f"a pruning policy on {HOME}, {self.effort.evaluations} evaluations")
        config = TrainConfig(
            network=(HOME,),
            weights=(weights,),
            budget=BUDGETS,
            evaluations=self.effort.evaluations,
            update_evaluations=self.effort.update_evaluations,
            out=self.folder / "train",
            **self.scoring,
        )
        return run_train(config, self.silent()).content

    def evaluate_unpruned(self, weights: Mapping[str, str]) -> dict[str, Any]:
        """Measure both networks as they are."""
        self.say("evaluate", "the unpruned networks")
        config = EvaluateConfig(
            network=(HOME, FOREIGN),
            weights=(weights[HOME], weights[FOREIGN]),
            out=self.folder / "evaluate_unpruned",
            **self.scoring,
        )
        return run_evaluate(config, self.silent()).content

    def evaluate(self, weights: str, policy: str) -> dict[str, Any]:
        """Put the agent beside uniform and knapsack allocation, at equal realised MACs."""
        self.say("evaluate", "the policy beside uniform and knapsack allocation")
        config = EvaluateConfig(
            network=(HOME,),
            weights=(weights,),
            budget=BUDGETS,
            policy=Path(policy),
            test=True,
            out=self.folder / "evaluate",
            **self.scoring,
        )
        return run_evaluate(config, self.silent()).content

    def transfer(self, weights: str, policy: str) -> dict[str, Any]:
        """Use the agent on a network it has not seen: zero-shot, then few-shot."""
        shots = f"zero-shot and after {self.effort.few_shot} evaluations"
        self.say("transfer", f"the policy to {FOREIGN}, {shots}")
        config = TransferConfig(
            network=(FOREIGN,),
            weights=(weights,),
            budget=BUDGETS,
            policy=Path(policy),
            evaluations=self.effort.few_shot,
            update_evaluations=self.effort.update_evaluations,
            test=True,
            out=self.folder / "transfer",
            **self.scoring,
        )
        return run_transfer(config, self.silent()).content

    def prune(self, searcher: str, weights: str, policy: str) -> dict[str, Any]:
        """Prune for good and fine-tune."""
        self.say("prune", f"{HOME} to {FINAL_BUDGET} by {searcher}, and fine-tune")
        config = PruneConfig(
            network=HOME,
            weights=weights,
            budget=FINAL_BUDGET,
            searcher=searcher,
            policy=Path(policy) if searcher == "policy" else None,
            epochs=self.effort.tuning_epochs,
            batch_size=64,
            out=self.folder / f"prune_{searcher}",
            **self.scoring,
        )
        return run_prune(config, self.silent()).content

    def say(self, step: str, what: str) -> None:
        """Announce a step."""
        self.reporter.say(f"\n== {step}: {what}")

    def silent(self) -> Reporter:
        """For a step: with bars, without lines, and without claiming the folder to continue from."""
        return Reporter(progress=self.reporter.progress, limit=self.reporter.limit)
