"""What is measured of the plans of a comparison: cost of the rebuilt network, and scores no search has seen.

All scores are of float32 networks on the whole selection split, and on the test split where asked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import nn

from prunegym.agents.configuration.time_limit import NO_LIMIT, TimeLimit
from prunegym.agents.run_folders.runs import RunFolder, slug
from prunegym.envs.setting import PruningProblem
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.fitting import CHECKPOINT
from prunegym.experiments.plan_checks import check_cost, count_macs
from prunegym.experiments.prune import fine_tune
from prunegym.pruning.budget import Budget
from prunegym.pruning.copies import duplicate
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import compare_latency
from prunegym.pruning.timing.speed_up import speed_up
from prunegym.pruning.training import evaluate_network

Row: TypeAlias = dict[str, Any]

FINETUNING = "finetuning"
SCORES = "scores.json"
STAGES = ("after_pruning_score", "after_recovery_score", "after_finetuning_score")
"""On the selection split; with ``test_`` before them on the test split."""


class Judge:
    """Measures plans of one network, each of them once.

    Args:
        problem: The network.
        config: What is measured, and how plans are fine-tuned.
        run: The run folder; fine-tuning leaves its checkpoints and scores there.
        progress: Show bars.
        limit: When to stop.
    """

    def __init__(
        self,
        problem: PruningProblem,
        config: CompareConfig,
        run: RunFolder,
        *,
        progress: bool = False,
        limit: TimeLimit = NO_LIMIT,
    ) -> None:
        self.problem = problem
        self.config = config
        self.run = run
        self.progress = progress
        self.limit = limit
        self.splits = ("selection", "test") if config.test else ("selection",)
        self._rows: dict[tuple[PruningPlan, Budget], Row] = {}
        self._recovered: dict[PruningPlan, float] = {}

    def measure(self, plan: PruningPlan, budget: Budget) -> Row:
        """Cost, latency where asked, and scores before fine-tuning.

        Raises:
            PruningError: The rebuilt network does not cost what the plan says.
        """
        key = (plan, budget)
        if key not in self._rows:
            scorer, network = self.problem.scorer, self.problem.scorer.network
            model = scorer.recovered(plan)
            expected = network.cost(plan)
            check_cost(network, model, expected)
            self._rows[key] = {
                "cost": self.problem.limit_of(plan, budget).fraction(network.counts(plan)),
                "macs": expected.macs,
                "counted_macs": count_macs(network, model),
                "parameters": sum(one.numel() for one in model.parameters()),
                **self._latency(model, budget),
                "reward_score": scorer.score(plan).score,
                **self._scores(STAGES[0], network.pruned(plan), self.splits),
                **self._scores(STAGES[1], model, self.splits),
            }
            if self.config.curve_examples is None:
                self._recovered[plan] = self._rows[key][STAGES[1]]
        return dict(self._rows[key])

    def after_recovery(self, plan: PruningPlan) -> float:
        """Score after recovery on the selection split, or as much of it as was asked for: what the curves show."""
        if plan not in self._recovered:
            scorer = self.problem.scorer
            model, limit = scorer.recovered(plan), self.config.curve_examples
            found = evaluate_network(model, scorer.task, "selection", limit=limit, device=scorer.device)
            self._recovered[plan] = found.score
        return self._recovered[plan]

    def finetuned(self, plan: PruningPlan, seed: int | None) -> Row:
        """Scores after fine-tuning, once for each plan and seed, whoever found the plan.

        Args:
            plan: Channels to keep.
            seed: Of the order of the images; None where nothing is fine-tuned.

        Raises:
            PruningError: The loss became non-finite; the checkpoint of the epoch before is kept.
        """
        if seed is None:
            return {}
        folder = self.run.subfolder(FINETUNING).subfolder(folder_name(self.problem.scorer.network.name, plan, seed))
        if not folder.path(SCORES).exists():
            model = duplicate(self.problem.scorer.recovered(plan))
            config = self.config.finetuning(self.problem.scorer.network.name, seed)
            fine_tune(model, self.problem, config, folder, progress=self.progress, limit=self.limit)
            folder.write_json(SCORES, self._scores(STAGES[2], model, self.splits))
        folder.path(CHECKPOINT).unlink(missing_ok=True)  # as large as the network, and of no more use
        scores: Row = folder.read_json(SCORES)
        return scores

    def _scores(self, stage: str, model: nn.Module, splits: Sequence[str]) -> Row:
        scorer = self.problem.scorer
        return {
            stage if split == "selection" else f"{split}_{stage}": evaluate_network(
                model, scorer.task, split, device=scorer.device
            ).score
            for split in splits
        }

    def _latency(self, model: nn.Module, budget: Budget) -> Row:
        """Latency as a share of the unpruned network's, measured side by side."""
        if not self.config.latency and budget.kind != "latency":
            return {}
        network, device = self.problem.scorer.network, self.problem.scorer.device
        settings = self.config.latency_settings(device)
        measured = compare_latency({"before": network.model, "after": model}, network.example_inputs, settings)
        found = speed_up(measured["before"], measured["after"])
        return {"latency_ratio": 1 / found.ratio, "latency": found.sentence}


def folder_name(network: str, plan: PruningPlan, seed: int) -> str:
    """Name of the folder of a fine-tuning: it tells networks, plans and seeds apart."""
    digest = hashlib.sha256(json.dumps(plan.to_json()).encode()).hexdigest()[:16]
    return f"{slug(network)}__{digest}__f{seed}"
