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
from statistics import mean, median

import comparison_tables
import recovery_tables
import tyro
from formats import markdown
from rows import RESULTS, Table
from taus import TRUTHS, tau_rows

ROOT = Path(__file__).resolve().parent.parent
PAGES = (ROOT / "README.md", ROOT / "docs" / "results.md")
PLACE = r"<!-- table: (\w+) -->\n(?:\n(?:\|.*\n)+)?"
STUDIED = {"cifar_resnet20": "ResNet-20, 35 %", "cifar_vgg16_half": "VGG-16/2, 15 %"}


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


def taus() -> str:
    """How well each cheap score ranks plans by what they become."""
    rows = read("taus")
    parts = {}
    for network, title in STUDIED.items():
        mine = [one for one in rows if one["network"] == network]
        parts[title] = {one["score"]: one for one in tau_rows(mine)} if mine else {}
    labels = [label + half for label in TRUTHS.values() for half in ("", ", better half")]
    lines = [
        [f"{name}, {title}", *(found[name][label] for label in labels), found[name]["price"]]
        for title, found in parts.items()
        for name in found
    ]
    return markdown(["", *labels, "price"], lines)


ARMS = {
    ("uniform", "0"): "uniform",
    ("halp", "0"): "Taylor knapsack",
    ("rounds", "0"): "knapsack, 3 rounds",
    ("knapsack", "0"): "knapsack",
    ("cmaes_prior", "32"): "CMA-ES from it, 32",
    ("cmaes_prior", "200"): "CMA-ES from it, 200",
    ("cmaes_prior by loss", "200"): "by loss, 200",
}
"""Columns of the table of allocations: searcher and evaluations."""


def allocations() -> str:
    """Test accuracy of what each allocation leaves, after full reconstruction; means over seeds."""
    rows = read("transfer")
    there = {(one["searcher"], one["allowed"]) for one in rows}
    arms = {arm: title for arm, title in ARMS.items() if arm in there}
    lines = []
    for network, budget in dict.fromkeys((one["network"], one["budget"]) for one in rows):
        mine = [one for one in rows if (one["network"], one["budget"]) == (network, budget)]
        cells = []
        for arm in arms:
            scores = [100 * float(one["test_score"]) for one in mine if (one["searcher"], one["allowed"]) == arm]
            cells.append(f"{mean(scores):.1f}" if scores else "")
        title = recovery_tables.NETWORKS.get(network, "DenseNet-like")
        lines.append([f"{title}, {100 * float(budget.partition(':')[2]):.0f} %", *cells])
    return markdown(["", *arms.values()], lines)


TABLES: dict[str, Callable[[], str]] = {
    "front": recovery_tables.front,
    "ladder": recovery_tables.ladder,
    "prices": recovery_tables.prices,
    "ablations": recovery_tables.ablations,
    "tuned": recovery_tables.tuned,
    "beside_torch_pruning": recovery_tables.beside_torch_pruning,
    "taus": taus,
    "allocations": allocations,
    "compare": comparison_tables.compare,
    "equal_seconds": comparison_tables.equal_seconds,
    "coverage": coverage,
    "latency": latency,
}


if __name__ == "__main__":
    main(tyro.cli(Arguments))
