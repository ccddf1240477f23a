"""The tables of README.md and docs/results.md, from the rows in `results/`.

    python benchmarks/tables.py           # prints them
    python benchmarks/tables.py --write   # puts them in their places

A place is a comment `<!-- table: NAME -->`; what follows it is made here, and a test says when it is not. Accuracies
are in percent.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import tyro
from comparison_tables import compare, compare_finetuned, equal_seconds, short, together
from formats import markdown, with_range
from proxy_table import Study, studies_of, tau_rows
from rows import RESULTS, Table

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLACE = r"<!-- table: (\w+) -->\n(?:\n(?:\|.*\n)+)?"
BUDGETS = ("macs:0.5", "macs:0.35")
STUDIED = {"cifar_resnet20": "ResNet-20, 35 % MACs", "cifar_vgg16_half": "half-width VGG-16, 15 % MACs"}
_HEADER = ("MACs kept", "50 %", "35 %")


@dataclass(frozen=True)
class Arguments:
    """What to do with the tables."""

    write: bool = False
    """Put them in their places in README.md and docs/results.md."""


def main(arguments: Arguments) -> None:
    """Print every table, or write it."""
    made = {name: make() for name, make in TABLES.items()}
    if arguments.write:
        for page in PAGES:
            page.write_text(filled(page.read_text(encoding="utf-8"), made), encoding="utf-8")
        return
    for name, table in made.items():
        print(f"## {name}\n\n{table}\n")


def filled(page: str, made: Mapping[str, str]) -> str:
    """A page with each table in its place.

    Raises:
        KeyError: It has a place for a table that nobody makes.
    """
    return re.sub(PLACE, lambda place: f"<!-- table: {place[1]} -->\n\n{made[place[1]]}\n", page)


def read(name: str) -> list[dict[str, str]]:
    """Rows of a table."""
    return Table(RESULTS / f"{name}.csv", ()).rows


def post_training() -> str:
    """The agent against its start, over seeds: at 50 % MACs with a second look, at 35 % without."""
    rows = {"macs:0.5": read("post_training_confirmed"), "macs:0.35": read("post_training")}
    titles = {
        "uniform": "uniform",
        "knapsack": "knapsack, one shot",
        "untrained agent": "untrained agent",
        "agent": "**agent, its own plan**",
        "agent best sampled": "agent, best plan it sampled",
    }

    def score(searcher: str, budget: str) -> str:
        found = [one for one in rows[budget] if (one["searcher"], one["budget"]) == (searcher, budget)]
        return with_range(float(one["selection_score"]) for one in found)

    return markdown(_HEADER, ([title, *(score(name, one) for one in BUDGETS)] for name, title in titles.items()))


def transfer() -> str:
    """What needs no training, and frozen policies, on a network that these have not seen."""
    trained = "post_training__cifar_resnet20__macs{}__s0"
    titles = {
        ("uniform", ""): "uniform",
        ("knapsack", ""): "knapsack, one shot",
        ("untrained agent, 3 rounds", ""): "untrained agent, 3 rounds",
        ("policy", trained.format(0.5)): "policy trained at 50 % (1 round)",
        ("policy", trained.format(0.35)): "policy trained at 35 % (3 rounds)",
    }
    scores = {
        (one["searcher"], one["policy"], one["budget"]): f"{100 * float(one['selection_score']):.1f}"
        for one in read("transfer")
    }
    return markdown(_HEADER, ([title, *(scores[*key, one] for one in BUDGETS)] for key, title in titles.items()))


def finetune() -> str:
    """The three accuracies, cost and speed-up of each searcher."""
    stages = ("after_pruning", "after_recovery", "after_finetuning")
    lines = [
        [
            one["searcher"],
            *(f"{100 * float(one[stage]):.1f}" for stage in stages),
            f"{float(one['macs']) / 1e6:.1f} of {float(one['macs_before']) / 1e6:.1f} M",
            f"{float(one['parameters']) / 1e3:.0f} of {float(one['parameters_before']) / 1e3:.0f} k",
            f"{float(one['speed_up_torch']):.2f}x",
            f"{float(one['speed_up_onnxruntime']):.2f}x",
        ]
        for one in read("finetune")
    ]
    header = ["", "right after pruning", "after recovery", "after fine-tuning", "MACs", "parameters"]
    return markdown([*header, "torch", "ONNX Runtime"], lines)


def latency() -> str:
    """How far tables are off, and what exported files keep of the latency at `latency:0.5`, by network."""
    networks = {"cifar_resnet56": "ResNet-56 (CIFAR-10)", "mobilenet_v2": "MobileNetV2 (224×224)"}
    rows = {(one["network"], one["what"], one["allocation"]): one for one in read("latency")}

    def cells(what: str, allocation: str, value: Callable[[dict[str, str]], str]) -> list[str]:
        return [value(rows[name, what, allocation]) for name in networks]

    def percent(column: str) -> Callable[[dict[str, str]], str]:
        return lambda row: f"{100 * float(row[column]):.1f} %"

    def exported(row: dict[str, str]) -> str:
        drift = f", drift {100 * float(row['drift']):.0f} %" if float(row["drift"]) else ""
        return f"{100 * float(row['exported_share']):.1f} ({100 * float(row['off_budget']):+.1f} %{drift})"

    lines = [
        ["unpruned", *cells("table", "", lambda row: f"{float(row['unpruned_ms']):.2f} ms")],
        ["table off by, median", *cells("table", "", percent("median_error"))],
        ["table off by, 95th percentile", *cells("table", "", percent("p95_error"))],
        *(
            [f"`latency:0.5`, {title}", *cells("budget", allocation, exported)]
            for allocation, title in (
                ("uniform", "uniform"),
                ("knapsack", "knapsack"),
                *((f"random {seed}", f"random keep ratios {seed}") for seed in range(3)),
            )
        ),
    ]
    return markdown(["", *networks.values()], lines)


def latency_agents() -> str:
    """Agents with MACs and with latency budgets, at the same measured latency."""
    rows = {(one["seed"], one["agent"]): one for one in read("latency_agents")}

    def kept(row: dict[str, str]) -> list[str]:
        share, low, high = (100 * float(row[f"latency_{name}"]) for name in ("share", "low", "high"))
        macs, test = 100 * float(row["macs_share"]), 100 * float(row["test"])
        return [f"{macs:.1f}", f"{share:.1f} ({low:.1f} to {high:.1f})", f"{test:.1f}"]

    lines = []
    for seed in sorted({seed for seed, _ in rows}):
        macs, latency = rows[seed, "macs"], rows[seed, "latency"]
        gain, low, high = (100 * float(latency[f"test_gain{name}"]) for name in ("", "_low", "_high"))
        lines.append([seed, *kept(macs), *kept(latency), f"{gain:+.1f} ({low:+.1f} to {high:+.1f})"])
    columns = ("MACs", "latency", "test")
    header = ["seed", *(f"{budget} budget: {one}" for budget in ("MACs", "latency") for one in columns), "gain"]
    return markdown(header, lines)


def coverage() -> str:
    """How many networks are pruned, by library."""
    lines = []
    for library in ("torchvision", "timm"):
        rows = [one for one in read("coverage") if one["library"] == library]
        whole = [one for one in rows if not one["failed"]]
        slowest = max((one for one in rows if one["trace_seconds"]), key=lambda one: float(one["trace_seconds"]))
        lines.append(
            [
                library,
                f"{len(whole)} of {len(rows)}",
                sum(float(one["reached"]) <= 0.5 for one in whole),
                f"{median(float(one['passes']) for one in rows if one['passes']):.1f}",
                f"{float(slowest['trace_seconds']):.1f} s ({slowest['network']})",
                sum(bool(one["tp_reached"]) and float(one["tp_reached"]) < 0.95 for one in rows),
            ]
        )
    header = ["", "do all of it", "reach 50 % of their MACs", "median time to trace, in forward passes"]
    return markdown([*header, "slowest trace", "pruned by torch_pruning in the same run"], lines)


def study_of(network: str) -> Study:
    """Allocations of one network that were fine-tuned, and what was known of them before."""
    (study,) = [one for one in studies_of(read("proxy")) if one.network == network]
    return study


def proxy() -> str:
    """How well what is known before fine-tuning ranks allocations of two networks, best on average first."""
    taus = [{row["proxy"]: row for row in tau_rows(study_of(network))} for network in STUDIED]
    names = sorted(taus[0], key=lambda name: -fmean(float(rows[name]["tau"]) for rows in taus))

    def interval(row: Mapping[str, Any], which: str = "") -> str:
        low, high = (row[f"{which}{end}"] for end in ("low", "high"))
        return f"{row[f'{which}tau']:.2f} ({low:.2f} to {high:.2f})"

    def seconds(name: str) -> str:
        return " and ".join(f"{rows[name]['seconds']:.1f}" for rows in taus if rows[name]["seconds"])

    lines = [
        [name, *(interval(rows[name], which) for rows in taus for which in ("", "top_")), seconds(name)]
        for name in names
    ]
    header = [cell for title in STUDIED.values() for cell in (title, "its better half")]
    return markdown(["", *header, "seconds per plan"], lines)


TABLES: dict[str, Callable[[], str]] = {
    "short": short,
    "post_training": post_training,
    "compare": compare,
    "together": together,
    "equal_seconds": equal_seconds,
    "compare_finetuned": compare_finetuned,
    "transfer": transfer,
    "finetune": finetune,
    "coverage": coverage,
    "latency": latency,
    "latency_agents": latency_agents,
    "proxy": proxy,
}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
