"""The tables of `recovery.py`, from its rows; `tables.py` puts them in their places."""

from __future__ import annotations

import math
from collections.abc import Sequence

from formats import markdown
from rows import RESULTS, Table

NETWORKS = {
    "cifar_resnet20": "ResNet-20",
    "cifar_resnet56": "ResNet-56",
    "cifar_vgg16_half": "VGG-16/2",
    "cifar_mobilenet_v2": "MobileNetV2",
    "cifar_hybrid": "hybrid",
}
BUDGETS = {"macs:0.5": "50 %", "macs:0.35": "35 %", "macs:0.2": "20 %"}
LADDER = ("none", "bn", "compensate", "reconstruct", "distill, calibration images", "distill, training images")
FRONT = ("compensate", "reconstruct")
ALLOCATIONS = ("uniform", "prior", "knapsack")
TUNED = ("ridge ", "distill, calibration images, features ", "distill, train images, features ")
"""How rows begin whose settings are chosen among."""

EARLIER = "recovery_taylor"
"""Rows of plans by squared Taylor scores, on which parts and settings were compared."""

Rows = dict[tuple[str, str, str, str], dict[str, str]]


def read(name: str = "recovery") -> Rows:
    """Rows by network, budget, allocation and recovery."""
    rows = Table(RESULTS / f"{name}.csv", ()).rows
    return {(one["network"], one["budget"], one["allocation"], one["recovery"]): one for one in rows}


def percent(row: dict[str, str] | None) -> str:
    """Test accuracy; nothing where there is no row, a dash where a tool could not prune the network."""
    if row is None:
        return ""
    score = float(row["test_score"])
    return "–" if math.isnan(score) else f"{100 * score:.1f}"


def pairs(rows: Rows, recoveries: Sequence[str]) -> list[tuple[str, str]]:
    """Networks and budgets of which there is anything."""
    there = {(network, budget) for network, budget, _, recovery in rows if recovery in recoveries}
    return [(network, budget) for network in NETWORKS for budget in BUDGETS if (network, budget) in there]


def front() -> str:
    """What the README shows: the prior's plan after three recoveries."""
    rows = read()
    cells = [
        [
            f"{NETWORKS[network]}, {BUDGETS[budget]}",
            percent(rows.get((network, "none", "unpruned", "unpruned"))),
            *(percent(rows.get((network, budget, "prior", one))) for one in FRONT),
        ]
        for network, budget in pairs(rows, FRONT)
    ]
    return markdown(["MACs kept", "unpruned", *FRONT], cells)


def ladder() -> str:
    """Every recovery of both allocations."""
    rows = read()
    cells = [
        [
            f"{NETWORKS[network]}, {BUDGETS[budget]}, {allocation}",
            *(percent(rows.get((network, budget, allocation, one))) for one in LADDER),
        ]
        for network, budget in pairs(rows, LADDER)
        for allocation in ALLOCATIONS
        if any((network, budget, allocation, one) in rows for one in LADDER)
    ]
    return markdown(["", *LADDER], cells)


def prices() -> str:
    """Seconds of processor time and memory of each recovery, at 35 % MACs."""
    rows = read()
    cells = []
    for network, title in NETWORKS.items():
        found = [rows.get((network, "macs:0.35", "prior", one)) for one in LADDER]
        if any(found):
            texts = (f"{float(one['processor_seconds']):.1f} s, {one['peak_mib']} MiB" if one else "" for one in found)
            cells.append([title, *texts])
    return markdown(["", *LADDER], cells)


def ablations() -> str:
    """Reconstruction with one thing changed, at 35 % MACs."""
    rows = read(EARLIER)
    networks = ("cifar_resnet20", "cifar_resnet56")
    others = [one for _, _, allocation, one in rows if allocation == "prior" and one not in LADDER]
    names = [one for one in others if not one.startswith(TUNED)]
    cells = [
        [name, *(percent(rows.get((network, "macs:0.35", "prior", name))) for network in networks)]
        for name in ("reconstruct", *dict.fromkeys(names))
    ]
    return markdown(["", *(f"{NETWORKS[one]}, 35 %" for one in networks)], cells)


def tuned() -> str:
    """Ridges and weights of the features: selection accuracy, and test accuracy in brackets."""
    rows = read(EARLIER)
    names = list(dict.fromkeys(one for *_, one in rows if one.startswith(TUNED)))
    networks = list(dict.fromkeys(network for network, *_, one in rows if one in names))

    def cell(row: dict[str, str] | None) -> str:
        return f"{100 * float(row['selection_score']):.1f} ({percent(row)})" if row else ""

    cells = [[name, *(cell(rows.get((one, "macs:0.35", "prior", name))) for one in networks)] for name in names]
    return markdown(["", *(f"{NETWORKS[one]}, 35 %" for one in networks)], cells)


def beside_torch_pruning() -> str:
    """What torch_pruning leaves with ratios of its own, beside ours at the same MACs."""
    rows = read()
    theirs = ("torch_pruning magnitude", "torch_pruning taylor")
    networks = [(network, budget) for network, budget, allocation, _ in rows if allocation in theirs]
    cells = [
        [
            f"{NETWORKS[network]}, {BUDGETS[budget]}",
            *(percent(rows.get((network, budget, one, "bn"))) for one in theirs),
            *(percent(rows.get((network, budget, "prior", one))) for one in ("bn", "reconstruct")),
        ]
        for network, budget in dict.fromkeys(networks)
    ]
    return markdown(["", *(f"{one}, bn" for one in theirs), "prior, bn", "prior, reconstruct"], cells)
