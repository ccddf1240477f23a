"""The configuration of each command: a dataclass whose fields are the flags and whose texts are the help.

What commands share is in :mod:`prunegym.agents.configuration.options`. Derived values are properties. The help lists
the fields of the last base class first, and a field that is declared again stays where it was.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from functools import cached_property
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import tyro

from prunegym.agents.configuration.option_rules import Names, Options, at_least, only_with, positive, require
from prunegym.agents.configuration.options import (
    DEFAULT_BUDGET,
    DEFAULT_EVALUATIONS,
    BudgetsOptions,
    DataOptions,
    LatencyOptions,
    OneNetwork,
    ProblemOptions,
    RunOptions,
    SeveralNetworks,
    check_patterns,
    parse_budgets,
)
from prunegym.agents.configuration.time_limit import TimeLimitOption
from prunegym.agents.configuration.training_options import DistillationOptions, TrainingOptions
from prunegym.agents.configuration.width_options import WidthOptions
from prunegym.pruning.errors import PruningError, unknown_name

__all__ = [
    "DemoConfig",
    "EvaluateConfig",
    "InspectConfig",
    "PretrainConfig",
    "PruneConfig",
    "TrainConfig",
    "TransferConfig",
]


@dataclass(frozen=True, kw_only=True)
class AgentOptions(BudgetsOptions):
    """How a policy learns."""

    policy: Path | None = None
    """Policy file."""
    evaluations: int = 0
    """Plans that may be scored."""
    workers: int = 1
    """Workers that score plans side by side: processes, or with --ray actors of the cluster; 1 process is the main
    one."""
    ray: str | None = None
    """Ray cluster whose machines do the work (needs `pip install 'prunegym[ray]'`): auto for the one that this machine
    belongs to, or its address. The result is the same as without, for the same number of workers."""
    reward: str | None = None
    """Reward profile: improvement, loss, smooth, latency or tradeoff; by default improvement, or tradeoff in
    free mode."""
    mode: Literal["budgeted", "free"] = "budgeted"
    """budgeted: every action is projected onto the budget. free: it is not, and costs count in the reward."""
    update_evaluations: int = 10
    """Evaluations between two updates of the policy."""
    learning_rate: float = 1e-3
    """Learning rate of the policy's updates."""
    ppo_epochs: int = 5
    """Passes over the latest evaluations in each PPO update."""
    elites: int = 4
    """Best episodes of each network and budget that the policy is drawn towards."""
    imitation_steps: int = 60
    """Optimiser steps towards them after each PPO update; 0 is plain PPO."""
    imitation_rate: float = 1e-3
    """Learning rate of those steps."""
    std: float = 0.08
    """Exploration noise at the start, in units of the action, whose range is -1 to 1."""
    min_std: float = 0.02
    """Least exploration noise."""
    tensorboard: Annotated[
        bool,
        tyro.conf.arg(
            help="Leave out the learning curves for TensorBoard beside metrics.csv.",
            help_behavior_hint="(by default they are written)",
        ),
    ] = True
    """Write learning curves for TensorBoard beside metrics.csv."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reward is not None:
            from prunegym.envs.rewards import PROFILES

            if self.reward not in PROFILES:
                raise unknown_name("--reward", self.reward, PROFILES)
        if self.ray is not None:
            from prunegym.envs.cluster import check_ray

            check_ray()
        at_least(self, 1, "workers", "update_evaluations", "ppo_epochs", "elites")
        at_least(self, 0, "imitation_steps", "evaluations")
        positive(self, "learning_rate", "imitation_rate", "std", "min_std")
        require(self.min_std <= self.std, "min-std", f"at most --std, {self.std}", self.min_std)

    @property
    def episode_rounds(self) -> int:
        """Rounds of pruning in an episode."""
        return 1

    @property
    def reward_profile(self) -> str:
        """Name of the reward profile."""
        return self.reward or ("tradeoff" if self.mode == "free" else "improvement")


@dataclass(frozen=True, kw_only=True)
class InspectConfig(RunOptions, LatencyOptions, WidthOptions, DataOptions, OneNetwork):
    """List the channel groups of a network, their couplings, what is frozen and why, and reachable budgets.

    No images are read unless --data is given.
    """

    data: str = ""
    """Data whose classes and image size the network gets (see `prunegym train --help`); by default the
    network's own."""
    out: Path | None = None
    """Run folder that the list is kept in; by default none."""
    num_classes: int | None = None
    """Classes of the network, without --data; by default its own."""
    in_channels: int | None = None
    """Channels of the noise that the network is traced on, without --data; by default its own, or 3."""
    latency: bool = False
    """Measure the latency too, and the least that pruning can reach: a latency table is made, or read if there is
    one."""
    latency_plans: int = 10
    """Random plans that are measured beside the table's predictions, with --latency; 0 leaves them out."""
    plan: Path | None = None
    """Plan file (plan.json of `prunegym prune`): show what it keeps of each group, which blocks it leaves out, and
    what is left."""
    html: Path | None = None
    """Write a page with the channel graph to this file."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "latency_plans")
        at_least(self, 1, "num_classes", "in_channels")
        for size in ("num_classes", "in_channels"):
            received, flag = getattr(self, size), size.replace("_", "-")
            require(not self.data or received is None, flag, "left out with --data", received, "Leave out one of them.")


@dataclass(frozen=True, kw_only=True)
class PretrainConfig(TimeLimitOption, RunOptions, TrainingOptions, DataOptions, OneNetwork):
    """Train a network on the train split, to be pruned later.

    The run folder gets its weights (model.safetensors, for --weights) and its accuracy on the test images.
    """

    epochs: int = 30
    """Passes over the training images."""
    learning_rate: float | None = None
    """Highest learning rate; by default 0.1 with sgd and 0.001 with adamw."""

    sgd_rate: ClassVar[float] = 0.1
    """Learning rate of SGD unless asked for."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "epochs")


@dataclass(frozen=True, kw_only=True)
class TrainConfig(TimeLimitOption, ProblemOptions, AgentOptions, SeveralNetworks):
    """Train a pruning policy with PPO, on one network or on several at once.

    The run folder gets policy.safetensors, the learning curve (metrics.csv, TensorBoard) and the best plans.
    """

    policy: Path | None = None
    """Policy file to start from; by default a new policy, which starts from the best of knapsack, uniform and
    halfway."""
    evaluations: int = DEFAULT_EVALUATIONS
    """Plans scored in all, at most: the price of the training. At least one update (--update-evaluations) is made."""
    rounds: int | None = None
    """Rounds of pruning in an episode; the budget falls to the target over them, and the network is looked at anew in
    each. By default 1; a policy that is continued keeps its own."""
    features: Literal["data", "structure", "random"] = "data"
    """What a new policy sees of channels: data-aware features, or for ablations structure only, or noise. One that is
    continued (--policy) keeps its own."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "evaluations", "rounds")

    @property
    def episode_rounds(self) -> int:
        """Those asked for, or else those of the policy that is continued, or one."""
        if self.rounds is None and self.policy is not None:
            return _rounds_of(self.policy)
        return self.rounds or super().episode_rounds


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(TimeLimitOption, ProblemOptions, BudgetsOptions, SeveralNetworks):
    """Compare a policy with uniform and knapsack allocation, on networks x budgets.

    Without policy, searcher and budget: measure the unpruned networks on the test images.
    """

    policy: Path | None = None
    """Policy file to evaluate; its attention is also what --criterion encoder_attention means."""
    searcher: Names = ()
    """Searcher to put beside the policy, by default uniform and knapsack. Without evaluations: uniform,
    global_magnitude, lamp, global_taylor, halp, knapsack. With: prior, sensitivity, random, tpe, cmaes, cmaes_prior,
    evolution, legr, netadapt, amc, dcpa, laasp, attention."""
    evaluations: int = 100
    """Plans that a searcher such as random may score; those that need no evaluations score none,
    policies at most three, on a network or budget that is new to them."""
    test: bool = False
    """Measure every plan on the test images too. For the end: what was chosen by looking at them is no
    longer an honest result."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.searcher:
            _check_searcher(name, self.policy, self.evaluations)
        at_least(self, 0, "evaluations")

    @property
    def measures_unpruned(self) -> bool:
        """Whether the unpruned networks are to be measured and nothing else."""
        return self.policy is None and not self.budget and not self.searcher

    @property
    def searchers(self) -> tuple[str, ...]:
        """Names of all searchers to compare, the policy last."""
        names = self.searcher or ("uniform", "knapsack")
        return tuple(dict.fromkeys([*names, *(["policy"] if self.policy is not None else [])]))


@dataclass(frozen=True, kw_only=True)
class TransferConfig(TimeLimitOption, ProblemOptions, AgentOptions, SeveralNetworks):
    """Use a policy on networks it has not seen: as it is (zero-shot) or after some evaluations (few-shot).

    The result stands beside uniform and knapsack allocation.
    """

    policy: Path = field()
    """Policy file to transfer."""
    evaluations: int = 0
    """Plans that may be scored on each new network and budget, though at least one update is made
    (--update-evaluations); 0 is zero-shot: but for three that decide what the policy starts from there, none."""
    test: bool = False
    """Measure every plan on the test images too. For the end: what was chosen by looking at them is no
    longer an honest result."""

    @cached_property
    def episode_rounds(self) -> int:
        """Those that the policy was trained with."""
        return _rounds_of(self.policy)


@dataclass(frozen=True, kw_only=True)
class SearchOptions(Options):
    """Where the plan of `prune` comes from."""

    budget: str = DEFAULT_BUDGET
    """Cost kept: a share of the unpruned network's MACs, parameters or latency (macs:0.5, params:0.3,
    latency:0.7), or a latency in milliseconds (latency:12ms)."""
    searcher: str | None = None
    """Who makes the plan; policy if --policy is given, else prior, the best of knapsack, uniform and halfway
    (with fewer than 3 --evaluations the knapsack). Without evaluations: uniform, global_magnitude, lamp,
    global_taylor, halp, knapsack, policy. With: prior, sensitivity, random, tpe, cmaes, cmaes_prior, evolution,
    legr, netadapt, amc, dcpa, laasp, attention. cmaes_prior begins at the prior; dcpa may leave residual blocks out;
    laasp and attention choose channels themselves."""
    policy: Path | None = None
    """Policy file that makes the plan, or whose attention is the criterion (--criterion encoder_attention)."""
    plan: Path | None = None
    """Plan file (plan.json of another `prunegym prune`) to carry out instead of searching."""
    evaluations: int = 100
    """Plans that a searcher such as random may score; those that need no evaluations score none,
    policies at most three, on a network or budget that is new to them."""
    rounds: int | None = None
    """Rounds of pruning; by default those the policy was trained with, and 3 with --searcher attention."""
    leave_out: Names = ()
    """Regular expression of residual blocks to leave out altogether (`prunegym inspect` lists them); the widths of the
    rest then follow the budget."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.leave_out, "leave-out")
        parse_budgets((self.budget,))
        if self.searcher is not None:
            _check_searcher(self.searcher, self.policy, self.evaluations)
            used = self.searcher == "policy" or getattr(self, "criterion", None) == "encoder_attention"
            alone = self.policy is None or used
            rule = f"left out with --searcher {self.searcher}"
            require(alone, "policy", rule, self.policy, "Leave out one of the two.")
        alone = self.plan is None or (self.policy is None and self.searcher is None)
        rule, remedy = "given without --policy and --searcher", "Leave these out: the plan is already there."
        require(alone, "plan", rule, self.plan, remedy)
        at_least(self, 0, "evaluations")
        at_least(self, 1, "rounds")
        if self.rounds is not None:
            from prunegym.agents.searching.searchers import ONE_ROUND

            used = self.searcher_name not in {*ONE_ROUND, "plan"}
            only_with(self, used, "--searcher policy or attention", "rounds")

    @property
    def searcher_name(self) -> str:
        """Who makes the plan: a searcher, or ``plan`` for a file."""
        if self.plan is not None:
            return "plan"
        if self.searcher is not None or self.policy is not None:
            return self.searcher or "policy"
        from prunegym.envs.prior import TRIALS

        return "prior" if self.evaluations >= TRIALS else "knapsack"


@dataclass(frozen=True, kw_only=True)
class PruneConfig(TimeLimitOption, ProblemOptions, DistillationOptions, TrainingOptions, SearchOptions, OneNetwork):
    """Prune a network for good: find a plan, cut, recover, fine-tune, save.

    The run folder gets the smaller network, its plan, and accuracy, cost and latency before and after.
    """

    epochs: int = 10
    """Passes over the training images in fine-tuning; 0 leaves it out."""
    onnx: bool = False
    """Save the pruned network as model.onnx too (needs `pip install 'prunegym[onnx]'`)."""
    program: bool = False
    """Save the pruned network as model.pt2 too: a torch.export program, which runs without the network's code."""

    def __post_init__(self) -> None:
        super().__post_init__()
        rule, remedy = "left out with --plan", "A given plan is carried out as it is."
        unused = ("align", "min_channels", "bound", "budget", "evaluations", "leave_out")
        for one in fields(self):
            value = getattr(self, one.name)
            alone = self.plan is None or one.name not in unused or value == one.default
            require(alone, one.name.replace("_", "-"), rule, value, remedy)


@dataclass(frozen=True, kw_only=True)
class DemoConfig(TimeLimitOption, Options):
    """Go the whole way on small images of handwritten digits, in minutes and without any download.

    Train two networks, inspect, train an agent, evaluate it, transfer it, prune, save, reload, report.
    """

    out: Path = Path("runs/demo")
    """Folder of the demonstration; steps that it already holds are not repeated."""
    quick: bool = False
    """Do far less of everything, in seconds: shows that it runs, and nothing about how well it works."""
    seed: int = 0
    """Seed of everything random except the splits of the data."""
    json: bool = False
    """Print the result as one JSON object on standard output, and everything else on standard error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 0, "seed")


def _check_searcher(name: str, policy: Path | None, evaluations: int) -> None:
    """Refuse an unknown searcher, and one that lacks what it needs."""
    from prunegym.agents.searching.searchers import SEARCHERS, WITHOUT_EVALUATIONS, check_library

    if name not in SEARCHERS:
        raise unknown_name("--searcher", name, SEARCHERS)
    if name == "policy" and policy is None:
        raise PruningError(
            "`--policy` should name a policy file where the searcher is policy. Received none. "
            "Train one with `prunegym train`."
        )
    check_library(name)
    if name not in WITHOUT_EVALUATIONS:
        remedy = "Give it a number of plans to try."
        require(evaluations > 0, "evaluations", f"at least 1 with searcher {name}", evaluations, remedy)


def _rounds_of(policy: Path) -> int:
    """Rounds of pruning that a policy was trained with."""
    from prunegym.agents.policies.policy_file import load_policy

    return int(load_policy(policy)[1].get("rounds", 1))
