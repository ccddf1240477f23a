"""The command ``measure``: what saved networks cost and reach, beside what was said of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from tqdm import tqdm

from prunegym.agents.configuration.options import DataOptions
from prunegym.agents.run_folders.running import Reporter, Result
from prunegym.agents.tables import format_table
from prunegym.experiments.deployment.config import MeasureConfig
from prunegym.experiments.deployment.finetune import check_fits
from prunegym.experiments.deployment.origin import data_of, origin_of
from prunegym.experiments.plan_checks import macs_of_run
from prunegym.experiments.setup import build_task
from prunegym.pruning.deployment.saving import read_network
from prunegym.pruning.task import first_batch
from prunegym.pruning.training import evaluate_network

SPLITS = ("selection", "test")


def run_measure(config: MeasureConfig, reporter: Reporter) -> Result:
    """Measure saved networks, one after the other."""
    rows = [
        measured(folder.expanduser(), config)
        for folder in tqdm(config.runs, desc="measure", unit="network", disable=not reporter.progress)
    ]
    return Result({"rows": rows}, format_table(rows))


def measured(folder: Path, config: MeasureConfig) -> dict[str, Any]:
    """One row: network and folder, MACs, parameters, scores, and the score on test that was said when it was saved.

    Raises:
        PruningError: The folder holds no network that can be read, or the data are unknown or do not fit it.
    """
    saved = read_network(folder, allow_code=config.allow_code)
    asked = DataOptions(**{one.name: getattr(config, one.name) for one in fields(DataOptions)})
    task = build_task(data_of(asked, origin_of(folder)))
    check_fits(saved.model, task)
    device = config.torch_device
    model = saved.model.to(device)
    inputs, _ = first_batch(task, "calibration", 1, device)
    scores = {f"{split}_score": evaluate_network(model, task, split, device=device).score for split in SPLITS}
    return {
        "network": str(saved.metadata.get("network") or saved.blueprint.source.get("network")),
        "folder": str(folder),
        "macs": macs_of_run(model, inputs),
        "parameters": sum(one.numel() for one in model.parameters()),
        **scores,
        "said_score": said_of(saved.metadata),
    }


def said_of(metadata: Mapping[str, Any]) -> float | None:
    """The last score on test that was written down with a network; None if none was."""
    tuned = metadata.get("finetuning") or [{}]
    scores = {**(metadata.get("test_scores") or {}), **(tuned[-1].get("test_scores") or {})}
    stages = ("after_finetuning", "after_recovery", "after_pruning")
    return next((float(scores[stage]) for stage in stages if scores.get(stage) is not None), None)
