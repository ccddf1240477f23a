"""The part of the page about networks that were made for good: pruned, fine-tuned, exported."""

from __future__ import annotations

from collections.abc import Sequence

from prunegym.reporting.gather import Record, Run
from prunegym.reporting.page import Block, Section, Table, Text
from prunegym.reporting.scores import WORDS, recovery_of
from prunegym.reporting.verdict import speed_tone
from prunegym.reporting.words import amount, duration, percent, plural, suggest


def reached(runs: Sequence[Run]) -> Section:
    """What networks that were pruned or fine-tuned came to, one column each; and the files that were exported."""
    pruned = [(run, result) for run in runs if (result := run.came_to("prune"))]
    tuned = [(run, result) for run in runs if (result := run.came_to("finetune"))]
    exported = [(run, result) for run in runs if (result := run.came_to("export"))]
    blocks: list[Block] = []
    if pruned or tuned:
        columns = {run.label: _pruned_column(run, result) for run, result in pruned}
        columns |= {run.label: _tuned_column(result) for run, result in tuned}
        caption = "Accuracy on the test images, which were read once, at the end."
        if any(_measured(result) for _, result in pruned):
            caption += " Latency: median and quartiles, before and after side by side."
        blocks.append(Table.of(_side_by_side(columns), caption))
        measured = [row for _, result in pruned for row in _measured(result)]
        conditions = dict.fromkeys(f"Measured in {row['backend']}: {_conditions(row)}." for row in measured)
        blocks += [Text(sentence, kind="small") for sentence in conditions]
    if exported:
        rows = [_file_row(run, one) for run, result in exported for one in result["files"]]
        caption = "Files for deployment. Difference: the largest of any output, from the network's."
        blocks.append(Table.of(rows, caption))
    if not pruned:
        text = "No network was pruned for good. The three accuracies, parameters and measured latency come from"
        blocks.append(Text(text, suggest(runs, "prune")))
    return Section("reached", "What was reached", blocks)


def _side_by_side(columns: dict[str, dict[str, str]]) -> list[dict[str, str]]:
    """One row per measure that any of the columns has."""
    measures = dict.fromkeys(name for one in columns.values() for name, value in one.items() if value)
    return [{"": name, **{label: one.get(name, "") for label, one in columns.items()}} for name in measures]


def _tuned_column(result: Record) -> dict[str, str]:
    scores = result["test_scores"]
    teacher = ", imitating the unpruned network" if result["distilled"] else ""
    return {
        "network": result["network"],
        "accuracy, before fine-tuning": percent(scores["before_finetuning"]),
        "accuracy, after fine-tuning": percent(scores["after_finetuning"]),
        "parameters": amount(result["parameters"]),
        "fine-tuned for": plural(result["epochs"], "epoch") + teacher,
    }


def _file_row(run: Run, one: Record) -> dict[str, str]:
    return {
        "run": run.label,
        "file": str(one["path"]).rpartition("/")[2],
        "format": one["format"],
        "size": f"{one['bytes'] / 2**20:.3g} MiB",
        "batch": "any" if one["dynamic_batch"] else "fixed",
        "difference": f"{one['difference']:.1e}",
        "from float32": f"{one['from_float32']:.1e}" if one["from_float32"] else "",
        "read it with": one["load"],
    }


def _pruned_column(run: Run, result: Record) -> dict[str, str]:
    scores, memory = result["test_scores"], result.get("memory")
    return {
        "network": result["network"],
        "budget": result["budget"],
        "plan by": result["searcher"],
        "recovery": recovery_of(result),
        "accuracy, unpruned": percent(scores["unpruned"]),
        **{f"accuracy, {words}": percent(scores.get(stage)) for stage, words in WORDS.items()},
        "MACs": _before_after(result["macs"]),
        "parameters": _before_after(result["parameters"]),
        "peak memory of activations": f"{memory['before']:.3g} → {memory['after']:.3g} MiB" if memory else "",
        "blocks left out": ", ".join(result.get("blocks_left_out", [])),
        **{f"latency in {row['backend']}": _latency(row) for row in _measured(result)},
        "evaluations of the search": str(result.get("search", {}).get("evaluations", "")),
        "the search took": duration(result.get("search", {}).get("seconds")),
    }


def _before_after(cost: Record) -> str:
    return f"{amount(cost['before'])} → {amount(cost['after'])} ({percent(cost['after'] / max(cost['before'], 1), 0)})"


def _measured(result: Record) -> list[Record]:
    """Rows about latency that hold one."""
    return [row for row in result.get("latency", ()) if row.get("speed_up")]


def _latency(row: Record) -> str:
    """Medians with quartiles, and the ratio of neighbouring runs."""
    before, after = (
        f"{1e3 * row[side]['median_seconds']:.3g} ({1e3 * row[side]['lower_quartile_seconds']:.3g} to "
        f"{1e3 * row[side]['upper_quartile_seconds']:.3g})"
        for side in ("before", "after")
    )
    interval = " ({:.2f} to {:.2f})".format(*row["interval"])
    noise = ", within the noise" if speed_tone(row) == "even" else ""
    return f"{before} → {after} ms, {row['speed_up']:.2f}×{interval}{noise}"


def _conditions(row: Record) -> str:
    """What a latency is of."""
    after = row["after"]
    parts = [after.get("device_name"), after.get("runtime"), plural(int(after.get("threads") or 1), "thread")]
    return ", ".join([*(str(one) for one in parts if one), f"batch {after.get('batch_size')}", str(after.get("dtype"))])
