"""The configuration of ``prunegym compare``: which grid, at what price, and what is measured of each plan."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

import tyro

from prunegym.agents.configuration.config import AgentOptions, PruneConfig, TrainConfig
from prunegym.agents.configuration.option_rules import Names, Options, at_least, only_with, positive, require
from prunegym.agents.configuration.options import DEFAULT_EVALUATIONS, ProblemOptions, SeveralNetworks
from prunegym.agents.configuration.time_limit import TimeLimitOption
from prunegym.agents.configuration.training_options import DistillationOptions, FittingOptions
from prunegym.pruning.errors import PruningError, unknown_name

if TYPE_CHECKING:
    from prunegym.pruning.budget import Budget

Marks: TypeAlias = tyro.conf.UseAppendAction[tuple[float, ...]]
"""Numbers that are given by repeating the flag."""

AGENTS = {
    "agent": "data",
    "agent best": "data",
    "shuffled": "data",
    "mean": "data",
    "agent:structure": "structure",
    "agent:random": "random",
}
"""Searchers that come out of a training, with what its policy sees; four of them share one training."""

DEFAULT_SEARCHERS = ("uniform", "knapsack", "random", "agent", "agent best")

EXTENDABLE = ("network", "weights", "policy", "budget", "searcher", "repeats", "finetune_repeats", "seconds")
"""Fields that a folder may be continued with other values of: finished rows are kept whatever they are."""


@dataclass(frozen=True, kw_only=True)
class CompareConfig(
    TimeLimitOption, ProblemOptions, DistillationOptions, FittingOptions, AgentOptions, SeveralNetworks
):
    """Compare searchers on networks x budgets x seeds, at equal evaluations and at equal seconds.

    The run folder gets one row per finished piece (rows.csv), a table with bootstrap intervals and paired differences
    to the agent (table.md), curves of what each search would have returned earlier (curves.csv, anytime.png) and
    performance profiles (profiles.png). Interrupted at any moment, it goes on with --out; so does a finished one that
    is asked for more networks, budgets, searchers or repeats.
    """

    searcher: Names = ()
    """Searcher to compare: any of `prunegym prune --searcher`; agent (PPO trained on that network and budget with the
    evaluations allowed: its own plan), agent best (the best plan it sampled); its controls shuffled (its own keep
    ratios dealt out among the groups at random) and mean (its mean action for all groups); its ablations
    agent:structure and agent:random (what its policy sees). By default uniform, knapsack, random, agent, agent best."""
    policy: Path | None = None
    """Policy file of the searcher policy. The agents of the comparison start afresh."""
    evaluations: int = DEFAULT_EVALUATIONS
    """Plans that each search may score, the training of an agent included; allocators need none."""
    rounds: int | None = None
    """Rounds of pruning in an episode of the agents; by default 1 for budgets that keep half or more, and 3 below."""
    repeats: int = 3
    """Seeds of each search: --seed and those that follow. What has no use for a seed (allocators, policies,
    prior, sensitivity, netadapt) runs once, and its plan stands for every seed."""
    seconds: Marks = ()
    """Seconds at which searches are compared too, by what each would have returned by then. By default those of the
    fastest search of each network and budget."""
    curve_examples: int | None = None
    """Images of the selection split that the earlier plans of a search are scored on, for the curves and for the
    comparison at equal seconds; by default all. They are many plans: fewer images save time."""
    epochs: int = 0
    """Passes over the training images that fine-tune every plan; 0 leaves fine-tuning out."""
    finetune_repeats: int = 3
    """Seeds of the fine-tuning of each plan: --seed and those that follow."""
    finetune_rate: float | None = None
    """Highest learning rate of fine-tuning; by default 0.01 with sgd and 0.001 with adamw."""
    latency: bool = False
    """Measure the latency of every pruned network beside that of the unpruned one, in --latency-backend."""
    test: bool = False
    """Measure every plan on the test images too. For the end: what was chosen by looking at them is no
    longer an honest result."""
    tensorboard: bool = False
    """Write learning curves of the agents for TensorBoard."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "evaluations", "rounds", "repeats", "finetune_repeats", "curve_examples")
        if self.finetune_rate is not None:
            positive(self, "finetune_rate")
        only_with(self, self.epochs > 0, "--epochs above 0", "finetune_rate", "finetune_repeats")
        rule, remedy = "left out with --ray", "Beside other work it would not be that of the network."
        require(self.ray is None or not self.latency, "latency", rule, "both", remedy)
        rule, remedy = "1 with --ray", "The tasks of a comparison have one processor each."
        require(self.ray is None or self.devices == 1, "devices", rule, self.devices, remedy)
        for mark in self.seconds:
            require(0 < mark < math.inf, "seconds", "above 0 and finite", mark)
        budgeted = self.mode == "budgeted"
        remedy = "Leave it out: plans are compared at equal cost."
        require(budgeted, "mode", "budgeted in a comparison", self.mode, remedy)
        for name in self.searcher:
            _check_known(name)
        if "policy" in self.searchers and self.policy is None:
            raise PruningError(
                "`--policy` should name a policy file where one of the searchers is policy. Received none. "
                "Train one with `prunegym train`."
            )
        agents = [name for name in self.searchers if name in AGENTS]
        trainable = self.criterion != "encoder_attention" or not agents
        rule = "such that no --policy is needed where agents are trained"
        require(trainable, "criterion", rule, self.criterion, f"Name searchers without {', '.join(agents)}.")
        self._check_allowance()

    def _check_allowance(self) -> None:
        """Refuse an allowance that does not last for one update of an agent: it would be exceeded."""
        if not any(name in AGENTS for name in self.searchers):
            return
        from prunegym.envs.prior import TRIALS

        workers = self.workers
        least = -(-self.update_evaluations // workers) * workers + 1 + TRIALS
        remedy = "Allow more, or lower --update-evaluations."
        rule = f"at least {least}, for one update of the agent"
        require(self.evaluations >= least, "evaluations", rule, self.evaluations, remedy)

    @property
    def searchers(self) -> tuple[str, ...]:
        """The searchers, each once."""
        names = dict.fromkeys(self.searcher or DEFAULT_SEARCHERS)
        if self.policy is not None:
            names["policy"] = None
        return tuple(names)

    @property
    def seeds(self) -> tuple[int, ...]:
        """Seeds of each search."""
        return tuple(range(self.seed, self.seed + self.repeats))

    @property
    def finetune_seeds(self) -> tuple[int | None, ...]:
        """Seeds of the fine-tuning of each plan; one None where there is none."""
        return tuple(range(self.seed, self.seed + self.finetune_repeats)) if self.epochs else (None,)

    @property
    def labels(self) -> tuple[str, ...]:
        """What each network is called in the rows; one that comes twice is numbered."""
        before = [self.network[:index].count(name) for index, name in enumerate(self.network)]
        pairs = zip(self.network, before, strict=True)
        return tuple(f"{name}#{count + 1}" if count else name for name, count in pairs)

    def training(self, network: str, budget: Budget, seed: int, features: str) -> TrainConfig:
        """How an agent of the comparison is trained."""
        shared = {one.name: getattr(self, one.name) for one in fields(TrainConfig) if hasattr(self, one.name)}
        own = {"network": (network,), "weights": (), "budget": (str(budget),), "policy": None, "out": None, "ray": None}
        scoring = {"recovery": self.recovery_name, "scored": self.scorer_settings.scoring}
        return TrainConfig(**{**shared, **own, **scoring, "seed": seed, "features": features})

    def finetuning(self, network: str, seed: int) -> PruneConfig:
        """How a plan is fine-tuned."""
        shared = {*_names(FittingOptions), *_names(DistillationOptions)}
        options = {name: getattr(self, name) for name in shared}
        return PruneConfig(network=network, learning_rate=self.finetune_rate, seed=seed, device=self.device, **options)


def _names(kind: type[Options]) -> list[str]:
    """Names of the options of a group."""
    return [one.name for one in fields(kind)]


def _check_known(name: str) -> None:
    """Refuse an unknown searcher, and one whose library is missing."""
    from prunegym.agents.searching.searchers import SEARCHERS, check_library

    if name not in SEARCHERS and name not in AGENTS:
        raise unknown_name("--searcher", name, [*SEARCHERS, *AGENTS])
    check_library(name)
