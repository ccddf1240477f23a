"""The outcome of a comparison in its run folder: one Markdown table with what belongs to it, curves and pictures.

Everything is made from ``rows.csv`` and the curves beside the plans, so it can be made again at any time.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from typing import Any

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.agents.tables import format_table, markdown_table
from prunegym.experiments.comparison.bootstrap import LEVEL, Interval, performance_profiles
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.comparison.pictures import FORMATS, draw_anytime, draw_profiles
from prunegym.experiments.comparison.rows import curve_rows
from prunegym.experiments.comparison.summary import Pair, Table, at_seconds, fastest_seconds, summarise
from prunegym.pruning.files import plain, replacing

CURVES, TABLE, ANYTIME, PROFILES = "curves.csv", "table.md", "anytime", "profiles"
_WORDS = {
    "after_pruning_score": "after pruning",
    "after_recovery_score": "after recovery",
    "after_finetuning_score": "after fine-tuning",
}


def report(rows: Sequence[Mapping[str, Any]], config: CompareConfig, run: RunFolder) -> dict[str, Any]:
    """Write the table, the curves and the pictures.

    Args:
        rows: All rows of the grid.
        config: What was compared.
        run: The run folder.

    Returns:
        What ``--json`` prints: rows, the summary of each searcher, the figures at equal seconds, and the files.

    Raises:
        PruningError: A file could not be written.
    """
    curves = curve_rows(rows, run)
    table = Table(rows, curves, config.searchers)
    _write_curves(curves, run)
    summary = summarise(table, seed=config.seed)
    timed = {label: at_seconds(table, marks, seed=config.seed) for label, marks in _marks(table, config).items()}
    runs = {name: table.runs(name, table.stage) for name in config.searchers}
    draw_anytime(run.path(ANYTIME), table)
    title = f"{_WORDS[table.stage]}, selection split"
    draw_profiles(run.path(PROFILES), performance_profiles(runs, seed=config.seed), title=title)
    with replacing(run.path(TABLE)) as temporary:
        temporary.write_text(_markdown(table, config, summary, timed), encoding="utf-8")
    pictures = [str(run.path(name + suffix)) for name in (ANYTIME, PROFILES) for suffix in FORMATS]
    return {
        "folder": str(run.folder),
        "stage": table.stage,
        "reference": table.reference,
        "summary": plain(summary),
        "at_seconds": plain(timed),
        "rows": plain(rows),
        "files": [str(run.path("rows.csv")), str(run.path(CURVES)), str(run.path(TABLE)), *pictures],
    }


def terminal_text(content: Mapping[str, Any]) -> str:
    """The main table for a terminal."""
    summary = [
        {**one, "score": _interval(one["score"]), "difference": _interval(one["difference"])}
        for one in content["summary"]
    ]
    lines = _main_rows(summary, content["reference"], content["stage"])
    return f"{format_table(lines)}\n\nmore in {content['folder']}/{TABLE}"


def _interval(content: Mapping[str, Any] | None) -> Interval | None:
    return None if content is None else Interval(**content)


def _marks(table: Table, config: CompareConfig) -> dict[str, dict[Pair, float]]:
    """The seconds at which searches are compared, by what they are called."""
    if config.seconds:
        return {f"{mark:g} s": dict.fromkeys(table.pairs, mark) for mark in dict.fromkeys(config.seconds)}
    fastest = fastest_seconds(table)
    return {} if fastest is None else {"the seconds of the fastest search": fastest}


def _write_curves(curves: Sequence[Mapping[str, Any]], run: RunFolder) -> None:
    with replacing(run.path(CURVES)) as temporary, temporary.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(curves[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(curves)


def _markdown(
    table: Table,
    config: CompareConfig,
    summary: Sequence[Mapping[str, Any]],
    timed: Mapping[str, Sequence[Mapping[str, Any]]],
) -> str:
    """The whole page."""
    sections = [
        "# Comparison of searchers",
        _conditions(table, config),
        f"## At {config.evaluations} evaluations",
        markdown_table(_main_rows(summary, table.reference, table.stage)),
        *_overspent(summary, config),
    ]
    for index, (label, rows) in enumerate(timed.items()):
        some = f" These scores are of {config.curve_examples} images." if config.curve_examples else ""
        explained = _TIMED + some if index == 0 else ""
        sections += [f"## At {label}", explained, _mark_line(table, config), markdown_table(_timed_rows(rows, table))]
    sections += [
        "## By network and budget",
        f"Means over seeds, {_WORDS[table.stage]}, in percent.",
        markdown_table(_pair_rows(table)),
        f"![anytime curves]({ANYTIME}.png)",
        f"![performance profiles]({PROFILES}.png)",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


_TIMED = (
    "What each search would have returned by then, scored after recovery. Statistics of the unpruned network and "
    "prepared images are shared and count for nobody; nor does the scoring on the selection split."
)


def _conditions(table: Table, config: CompareConfig) -> str:
    """What the figures are figures of."""
    first = table.rows[0]
    pairs, seeds = len(table.pairs), len(table.seeds)
    tuned = f", each the mean of {len(config.finetune_seeds)} fine-tuning seeds" if config.epochs else ""
    units = f"{pairs} (network, budget) pairs, each the mean of {seeds} search seeds{tuned}"
    if pairs == 1:
        units = f"{seeds} search seeds{tuned}, of the only (network, budget) pair: nothing is said about others"
    return (
        f"Recovery: {first['recovery']}{f', then fine-tuned for {config.epochs} epochs' if config.epochs else ''}. "
        f"Data: {first['data']} (split seed {first['split_seed']}). Criterion: {first['criterion']}. "
        f"Searches see {first['reward_examples']} images of the reward split; scores are accuracies in percent on the "
        "selection split, which no search sees, of the rebuilt float32 network. "
        f"Intervals: {LEVEL:.0%} percentile bootstrap over {units}. They are too narrow where there are few. "
        f"Differences are paired, minus {table.reference}. The gap is reward minus selection score after recovery."
    )


def _main_rows(summary: Sequence[Mapping[str, Any]], reference: str, stage: str) -> list[dict[str, str]]:
    """One line per searcher; scores in percent, differences in points."""
    lines = []
    for one in summary:
        earlier = {_WORDS[name]: _percent(one[name]) for name in _WORDS if one[name] is not None and name != stage}
        test = one[f"test_{stage}"]
        lines.append(
            {
                "searcher": one["searcher"],
                **earlier,
                _WORDS[stage]: _with_interval(one["score"]),
                f"minus {reference}": _with_interval(one["difference"], signed=True),
                **({} if test is None else {f"test, {_WORDS[stage]}": _percent(test)}),
                "gap": f"{100 * one['gap']:+.2f}",
                "cost kept": _percent(one["cost"]),
                **({} if one["latency_ratio"] is None else {"latency kept": _percent(one["latency_ratio"])}),
                "evaluations": f"{one['evaluations']:.0f}",
                "seconds": f"{one['seconds']:.3g}",
            }
        )
    return lines


def _overspent(summary: Sequence[Mapping[str, Any]], config: CompareConfig) -> list[str]:
    """A warning where a search took more than it was allowed: then the table is not one at equal evaluations."""
    names = [one["searcher"] for one in summary if one["most_evaluations"] > config.evaluations]
    return [f"**Not matched**: {', '.join(names)} spent more evaluations than allowed."] if names else []


def _mark_line(table: Table, config: CompareConfig) -> str:
    """The seconds of each pair, where they are not the same for all."""
    fastest = None if config.seconds else fastest_seconds(table)
    if fastest is None:
        return ""
    marks = ", ".join(f"{network} {budget} {mark:.3g}" for (network, budget), mark in fastest.items())
    return f"Seconds: {marks}."


def _timed_rows(rows: Sequence[Mapping[str, Any]], table: Table) -> list[dict[str, str]]:
    total = len(table.pairs) * len(table.seeds)
    return [
        {
            "searcher": one["searcher"],
            "after recovery": _with_interval(one["score"])
            if one["score"] is not None
            else f"no plan yet in {one['without']} of {total} runs",
            f"minus {table.reference}": _with_interval(one["difference"], signed=True),
        }
        for one in rows
    ]


def _pair_rows(table: Table) -> list[dict[str, str]]:
    scores = {name: table.runs(name, table.stage) for name in table.searchers}
    return [
        {
            "network": network,
            "budget": budget,
            **{name: f"{100 * sum(runs[index]) / len(runs[index]):.2f}" for name, runs in scores.items()},
        }
        for index, (network, budget) in enumerate(table.pairs)
    ]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.2f}"


def _with_interval(interval: Interval | None, *, signed: bool = False) -> str:
    """Mean and interval in percent, or points."""
    if interval is None:
        return ""
    form = "+.2f" if signed else ".2f"
    text = format(100 * interval.mean, form)
    if interval.low is None or interval.high is None:
        return text
    return f"{text} ({format(100 * interval.low, form)} to {format(100 * interval.high, form)})"
