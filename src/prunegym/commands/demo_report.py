"""The end of the demonstration: one table and one picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from prunegym.agents.tables import markdown_table
from prunegym.experiments.prune import STAGES
from prunegym.pruning.files import replacing
from prunegym.reporting.pictures import draw_overview

#: Columns of the one table.
COLUMNS = (
    "network",
    "budget",
    "plan by",
    "MACs",
    "parameters",
    "selection_score",
    "test_score",
    "evaluations",
)
_INTRODUCTION = (
    "Handwritten digits (8x8), base networks trained here. Scores are accuracies after recovery, without "
    "training unless the row says fine-tuned. Nothing was chosen by looking at the test images."
)
_QUICK = "Quick: far too little of everything was done for the numbers to mean anything."


def write_report(content: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], report: Path, picture: Path) -> None:
    """Write the table and what belongs to it as Markdown, and draw the picture.

    Args:
        content: The results of all steps.
        curve: Rows of metrics of the training.
        report: The Markdown file.
        picture: The picture.

    Raises:
        PruningError: A file could not be written.
    """
    _draw(content, curve, picture)
    latency = content["pruned"]["policy"]["latency"]
    text = "\n\n".join(
        [
            "# prunegym demo",
            *([_QUICK] if content["quick"] else []),
            _INTRODUCTION,
            markdown_table(table_rows(content), COLUMNS),
            "Measured latency of the network pruned by the policy, beside the unpruned one:",
            "\n".join(f"- {one['backend']}: {one['sentence']}" for one in latency),
            f"Reloaded in a new process: outputs {_verdict(content['reloaded_identical'])}.",
            f"Picture: {picture}",
            f"All steps together took {content['seconds']:.0f} seconds, finished ones not counted again.",
        ]
    )
    with replacing(report) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def table_rows(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The one table: the agent's own network, the network it never saw, and fine-tuned ones."""
    home, foreign = content["unpruned"]
    rows = [_plan_row(row) for row in [home, *content["evaluation"], foreign, *content["transfer"]]]
    for name, one in content["pruned"].items():
        rows.append(
            {
                "network": f"{one['network']}, fine-tuned",
                "budget": one["budget"],
                "plan by": name,
                "MACs": one["macs"]["after"],
                "parameters": one["parameters"]["after"],
                "test_score": one["test_scores"][STAGES[-1]],
            }
        )
    return rows


def _plan_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of `evaluate` or `transfer` in the columns of the table."""
    return {
        "network": row["network"],
        "budget": row["budget"],
        "plan by": row["searcher"],
        "MACs": row["macs"],
        "parameters": row["parameters"],
        "selection_score": row["selection_score"],
        "test_score": row["test_score"],
        "evaluations": row.get("evaluations"),
    }


def _draw(content: Mapping[str, Any], curve: Sequence[Mapping[str, Any]], picture: Path) -> None:
    """Draw the learning curve and what each searcher keeps."""
    rows = content["training"]["rows"]
    references = {}
    for name in ("uniform", "knapsack"):
        scores = [row["reward_score"] for row in rows if row["searcher"] == name]
        references[name] = sum(scores) / len(scores)  # over budgets, as the curve
    channels = {
        name: {group: kept["after"] / kept["before"] for group, kept in one["channels"].items()}
        for name, one in content["pruned"].items()
    }
    first = content["pruned"]["policy"]
    title = f"{first['network']}: training (mean over budgets), and plans at {first['budget']}"
    draw_overview(picture, curve, references, channels, title=title)


def _verdict(identical: bool) -> str:
    return "bit-identical" if identical else "NOT identical"
