"""From a pruning problem to a smaller network: plan, surgery, recovery, fine-tuning, and what came of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from prunegym.agents.configuration.config import PruneConfig
from prunegym.agents.configuration.options import LatencyOptions
from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.searching.latency_budget import within_measured_budget
from prunegym.agents.searching.searchers import SearchResult, SearchSettings, searcher_named
from prunegym.agents.tables import format_table
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.fitting import fit
from prunegym.experiments.plan_checks import check_cost, check_outputs
from prunegym.pruning.budget import Budget
from prunegym.pruning.copies import duplicate
from prunegym.pruning.cost import Cost
from prunegym.pruning.deployment.recipe import NO_SOURCE, Blueprint
from prunegym.pruning.deployment.saving import save_network
from prunegym.pruning.errors import PruningError
from prunegym.pruning.memory import PeakMemory, peak_memory
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.task import first_batch
from prunegym.pruning.timing.latency import compare_latency
from prunegym.pruning.timing.module_times import TimeProfile, compare_module_times
from prunegym.pruning.timing.speed_up import speed_up
from prunegym.pruning.training import EpochRow, check_pruned_training, check_training, compare_networks

#: Names of the scores of a result, in the order in which they come about.
STAGES = ("unpruned", "after_pruning", "after_recovery", "after_finetuning")


#: Keep ratio in all groups of the network that is trained for a step before a search: each has lost channels there.
_TRIED = 0.5
#: Runtimes whose latency is told whatever was asked for, where they are there.
MEASURED_IN = ("torch", "onnxruntime")


@dataclass(frozen=True, kw_only=True)
class PruneResult:
    """A pruned network and what is known of it."""

    model: nn.Module = field(repr=False)
    """The smaller network: same class, same interface."""
    network: PrunableNetwork = field(repr=False)
    """The unpruned network."""
    plan: PruningPlan = field(repr=False)
    searcher: str
    budget: str
    recovery: str
    scores: dict[str, float]
    """On the test split: ``unpruned``, ``after_pruning`` (cut, nothing else; NaN where its outputs are),
    ``after_recovery`` and, if there was any, ``after_finetuning`` (last epoch)."""
    before: Cost
    after: Cost
    memory: tuple[PeakMemory, PeakMemory]
    """Peak memory of activations for one example, before and after."""
    search: SearchResult = field(repr=False)
    skipped: Mapping[str, str] = field(default_factory=dict, repr=False)
    """Weights that reconstruction left as compensation made them, with the reason."""
    epochs: tuple[EpochRow, ...] = field(default=(), repr=False)
    latency: tuple[dict[str, Any], ...] = ()
    """Per runtime: latency before and after, measured side by side, and what can be said of it."""
    module_times: dict[str, TimeProfile] | None = field(default=None, repr=False)
    """Where the time goes ``before`` and ``after``, where latency was measured."""
    source: Mapping[str, Any] = field(default_factory=lambda: NO_SOURCE, repr=False)
    """How to build the unpruned network, for :func:`save`."""

    @property
    def blueprint(self) -> Blueprint:
        """What rebuilds the pruned network around its tensors."""
        return Blueprint.of_pruned(self.network, self.plan, self.model, self.source)

    def to_json(self) -> dict[str, Any]:
        """The result without the networks, in what JSON holds."""
        kept = self.plan.counts()
        return {
            "network": self.network.name,
            "searcher": self.searcher,
            "budget": self.budget,
            "recovery": self.recovery,
            "layers_not_reconstructed": dict(self.skipped),
            "test_scores": {name: self.scores.get(name) for name in STAGES},
            "macs": {"before": self.before.macs, "after": self.after.macs},
            "parameters": {"before": self.before.parameters, "after": self.after.parameters},
            "memory": {"before": self.memory[0].mib, "after": self.memory[1].mib, "unit": "MiB per example"},
            "channels": {
                group.name: {"before": group.size, "after": kept[group.name]} for group in self.network.graph.groups
            },
            "blocks_left_out": list(self.plan.removed),
            "search": {"evaluations": self.search.evaluations, "seconds": self.search.seconds},
            "epochs": len(self.epochs),
            "latency": list(self.latency),
            "module_times": self.module_times
            and {name: profile.to_json() for name, profile in self.module_times.items()},
            "latency_budget": self.search.latency,
        }


def find_plan(
    problem: PruningProblem,
    budget: Budget,
    config: PruneConfig,
    *,
    progress: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> SearchResult:
    """Let the searcher of the configuration make a plan, or read the plan file.

    Where the budget is a latency, the plan is brought to it by measuring.

    Args:
        problem: Network, data and recovery.
        budget: What may remain.
        config: Who searches, and with how many evaluations.
        progress: Show a bar.
        clock: Gives the seconds of the search.

    Raises:
        PruningError: The file is no plan of this network, or the searcher lacks something.
    """
    if config.plan is not None:
        plan = PruningPlan.load(config.plan)
        plan.mask(problem.scorer.network.graph)  # refuses the plan of another network
        return SearchResult(plan=plan, evaluations=0, seconds=0.0)
    settings = SearchSettings(
        evaluations=config.evaluations,
        seed=config.seed,
        policy=config.policy,
        rounds=config.rounds,
        progress=progress,
        clock=clock,
    )
    found = searcher_named(config.searcher_name)(problem, budget, settings)
    return within_measured_budget(problem, budget, found)


def carry_out(
    problem: PruningProblem,
    found: SearchResult,
    config: PruneConfig,
    *,
    run: RunFolder | None = None,
    source: Mapping[str, Any] | None = None,
    latency: bool = True,
    progress: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> PruneResult:
    """Cut, recover and fine-tune a network by a plan, and measure it.

    The test split is read at the end only, when everything has been done.

    Args:
        problem: Network, data and recovery.
        found: The plan.
        config: Fine-tuning and what is measured.
        run: Where fine-tuning leaves its checkpoint and metrics; from there it is resumed.
        source: How to build the unpruned network.
        latency: Measure latency before and after.
        progress: Show bars.
        limit: When to stop: after the epoch under way.

    Raises:
        PruningError: The loss became non-finite, or the rebuilt network does not cost what the plan says.
    """
    scorer, network, plan = problem.scorer, problem.scorer.network, found.plan
    before, after = network.full_cost, network.cost(plan)
    recovered, skipped = scorer.recover(plan, progress=progress)
    model = duplicate(recovered)
    check_cost(network, model, after)
    check_outputs(network, plan)
    epochs = fine_tune(model, problem, config, run, progress=progress, limit=limit) if config.epochs else []
    stages = {"unpruned": network.model, "after_pruning": network.pruned(plan), "after_recovery": recovered}
    if config.epochs:
        stages["after_finetuning"] = model
    scores = compare_networks(stages, scorer.task, device=scorer.device, may_fail={"after_pruning"})
    return PruneResult(
        model=model.eval(),
        network=network,
        plan=plan,
        searcher=config.searcher_name,
        budget="none" if config.plan is not None else config.budget,
        recovery=scorer.settings.recovery,
        skipped=skipped,
        scores=scores,
        before=before,
        after=after,
        memory=(
            peak_memory(network.model, network.example_inputs),
            peak_memory(model, network.example_inputs),
        ),
        search=found,
        epochs=tuple(epochs),
        latency=tuple(measure_speed(network, model, config, scorer.device)) if latency else (),
        module_times=time_modules(network, model, config, scorer.device) if latency else None,
        source=source or NO_SOURCE,
    )


def fine_tune(
    model: nn.Module,
    problem: PruningProblem,
    config: PruneConfig,
    run: RunFolder | None = None,
    *,
    progress: bool = False,
    limit: TimeLimit = NO_LIMIT,
) -> list[EpochRow]:
    """Train a pruned network in place, with the unpruned one as its teacher if asked for."""
    scorer = problem.scorer
    return fit(
        model,
        scorer.task,
        config.training_settings(config.seed),
        run=run,
        checkpoint_minutes=config.checkpoint_minutes,
        teacher=scorer.network.model if config.distill else None,
        device=scorer.device,
        progress=progress,
        limit=limit,
    )


def check_fine_tuning(problem: PruningProblem, config: PruneConfig) -> None:
    """Refuse what could not be finished, before a plan is searched for: no test split, or a fine-tuning that cannot be.

    Raises:
        PruningError: It cannot, see :func:`~prunegym.pruning.training.check_training` and
            :func:`~prunegym.pruning.training.check_pruned_training`.
    """
    scorer, network = problem.scorer, problem.scorer.network
    first_batch(scorer.task, "test", 1)  # what is told of the networks in the end is measured there
    if config.epochs:
        settings = config.training_settings(config.seed)
        teacher = network.model if config.distill else None
        check_training(network.model, scorer.task, settings, teacher=teacher, device=scorer.device)
        smaller = problem.plan(problem.widths.nearest(np.full(len(problem.sizes), _TRIED)))
        plan = smaller if config.plan is None else PruningPlan.load(config.plan)
        check_pruned_training(network, plan, scorer.task, settings, device=scorer.device)


def measure_speed(
    network: PrunableNetwork, model: nn.Module, options: LatencyOptions, device: torch.device
) -> list[dict[str, Any]]:
    """Measure latency before and after side by side: in the runtime asked for, in torch, and in ONNX Runtime."""
    rows: list[dict[str, Any]] = []
    for backend in dict.fromkeys((*MEASURED_IN, options.latency_backend)):
        try:
            settings = options.latency_settings(device, backend)
            models = {"before": network.model, "after": model}
            measured = compare_latency(models, network.example_inputs, settings)
        except PruningError as fault:
            if backend == options.latency_backend:
                raise
            rows.append({"backend": backend, "sentence": f"Not measured: {fault}"})
            continue
        rows.append(
            {
                "backend": backend,
                "before": measured["before"].to_json(),
                "after": measured["after"].to_json(),
                **speed_up(measured["before"], measured["after"]).to_json(),
            }
        )
    return rows


def time_modules(
    network: PrunableNetwork, model: nn.Module, options: LatencyOptions, device: torch.device
) -> dict[str, TimeProfile]:
    """Where the time of a network goes before and after, in PyTorch."""
    models = {"before": network.model, "after": model}
    return compare_module_times(models, network.example_inputs, options.latency_settings(device, "torch"))


def save(result: PruneResult, folder: Path) -> None:
    """Write a pruned network, to be read by :func:`prunegym.load`.

    Args:
        result: The network with its plan.
        folder: Gets ``model.safetensors`` and ``recipe.json``.

    Raises:
        PruningError: The folder cannot be written, or the network would not come back as it is.
    """
    save_network(
        Path(folder),
        result.network,
        result.plan,
        result.model,
        source=result.source,
        metadata=result.to_json(),
    )


def describe(content: Mapping[str, Any]) -> str:
    """A result, as of :meth:`PruneResult.to_json`, for a terminal."""
    rows = []
    memory = content.get("memory", {})
    for name in STAGES:
        score = content["test_scores"][name]
        if score is None and name != "after_pruning":
            continue
        side = "before" if name == "unpruned" else "after"
        rows.append(
            {
                "network": name.replace("_", " ").replace("finetuning", "fine-tuning"),
                "test score": "no number" if score is None else score,
                "MACs": content["macs"][side],
                "parameters": content["parameters"][side],
                **({"peak MiB": memory[side]} if memory else {}),
            }
        )
    lines = [format_table(rows), ""]
    blocks = content.get("blocks_left_out")
    skipped = content.get("layers_not_reconstructed")
    lines += [f"compensated, not reconstructed: {name} ({reason})" for name, reason in (skipped or {}).items()]
    lines += [f"blocks left out: {', '.join(blocks)}"] if blocks else []
    kept = content.get("latency_budget")
    lines += [kept["sentence"]] if kept else []
    lines += [f"{one['backend']}: {one['sentence']}" for one in content["latency"]]
    return "\n".join(lines).rstrip()
