"""The README's tables, from the rows in `results/`.

    python benchmarks/tables.py

Prints Markdown; figures are in percent.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from rows import RESULTS, Table


def main() -> None:
    """Print every table whose rows are there."""
    for name, make in (
        ("post_training", post_training),
        ("transfer", transfer),
        ("finetune", finetune),
        ("speed", speed),
    ):
        rows = Table(RESULTS / f"{name}.csv", ()).rows
        if rows:
            print(f"## {name}\n\n{make(rows)}\n")


def markdown(header: Sequence[str], lines: Iterable[Sequence[object]]) -> str:
    """A Markdown table."""
    text = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*text, *("| " + " | ".join(map(str, line)) + " |" for line in lines)])


def percent(values: Iterable[float]) -> str:
    """Mean with range over seeds, in percent."""
    scores = 100 * np.asarray(list(values))
    spread = f" ({scores.min():.1f} to {scores.max():.1f})" if len(scores) > 1 and np.ptp(scores) > 0 else ""
    return f"{scores.mean():.1f}{spread}"


def post_training(rows: list[dict[str, str]]) -> str:
    """Searchers by budget, over seeds."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    searchers = dict.fromkeys(row["searcher"] for row in rows)
    return markdown(
        ["", *budgets],
        (
            [
                searcher,
                *(
                    percent(
                        float(row["selection_score"])
                        for row in rows
                        if (row["searcher"], row["budget"]) == (searcher, budget)
                    )
                    for budget in budgets
                ),
            ]
            for searcher in searchers
        ),
    )


def transfer(rows: list[dict[str, str]]) -> str:
    """Searchers and frozen policies by budget."""
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    labels = dict.fromkeys((row["searcher"], row["policy"]) for row in rows)

    def score(label: tuple[str, str], budget: str) -> str:
        found = [row for row in rows if (row["searcher"], row["policy"], row["budget"]) == (*label, budget)]
        return percent(float(row["selection_score"]) for row in found) if found else ""

    def title(label: tuple[str, str]) -> str:
        return f"{label[0]} {Path(label[1]).name.removeprefix('post_training__')}".strip()

    return markdown(["", *budgets], ([title(one), *(score(one, budget) for budget in budgets)] for one in labels))


def finetune(rows: list[dict[str, str]]) -> str:
    """The three accuracies, cost and speed-up of each searcher."""
    header = ["", "right after pruning", "after recovery", "after fine-tuning", "MACs", "parameters"]
    return markdown(
        [*header, "torch", "ONNX Runtime"],
        (
            [
                row["searcher"],
                *(f"{100 * float(row[key]):.2f}" for key in ("after_pruning", "after_recovery", "after_finetuning")),
                f"{float(row['macs']) / 1e6:.1f} M of {float(row['macs_before']) / 1e6:.1f} M",
                f"{float(row['parameters']) / 1e3:.0f} k of {float(row['parameters_before']) / 1e3:.0f} k",
                f"{row['speed_up_torch']}x",
                f"{row['speed_up_onnxruntime']}x",
            ]
            for row in rows
        ),
    )


def speed(rows: list[dict[str, str]]) -> str:
    """Every measurement with what it says."""
    lines = []
    for row in rows:
        filled = {key: row[key] for key in list(row)[2:19] if row[key]}
        lines.append([row["what"], row["network"], ", ".join(f"{key} {value}" for key, value in filled.items())])
    return markdown(["measurement", "network", "figures"], lines)


if __name__ == "__main__":
    main()
