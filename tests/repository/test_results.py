"""Figures in the README and among the results are those of the rows: every table, and what sentences say of them."""

import importlib
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/results.md")}
FRONT, RESULTS = (" ".join(page.split()) for page in PAGES.values())


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    """The script that makes the README's tables."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "benchmarks"))
        return importlib.import_module("tables")


def test_tables_are_those_of_the_rows(tables: ModuleType) -> None:
    """Each is in its place, each has one, and there is no other table with figures."""
    made = {name: table() for name, table in tables.TABLES.items()}
    places = [name for page in PAGES.values() for name in re.findall(tables.PLACE, page)]
    lines = [line for page in PAGES.values() for line in page.splitlines() if re.match(r"\|.*\d", line)]

    assert sorted(places) == sorted(made)
    for page in PAGES.values():
        assert tables.filled(page, made) == page  # else: python benchmarks/tables.py --write
    assert [line for line in lines if not any(line in table for table in made.values())] == []


def test_table_is_put_in_its_place(tables: ModuleType) -> None:
    """Instead of an older one, or where there was none; what stands around it stays."""
    page = "before\n\n<!-- table: a -->\n\n| 1 |\n| 2 |\n\nbetween\n\n<!-- table: b -->\n\nafter\n"

    filled = tables.filled(page, {"a": "| 3 |", "b": "| 4 |\n| 5 |"})

    assert filled == ("before\n\n<!-- table: a -->\n\n| 3 |\n\nbetween\n\n<!-- table: b -->\n\n| 4 |\n| 5 |\n\nafter\n")
    with pytest.raises(KeyError, match="b"):
        tables.filled(page, {"a": "| 3 |"})


def test_speed_is_that_of_the_rows(tables: ModuleType) -> None:
    """What an evaluation, a reconstruction, a training and a pass of the policy cost."""
    rows = {(one["what"], one["network"]): one for one in tables.read("speed")}
    names = ("cifar_resnet20", "cifar_resnet20_conv", "cifar_resnet56")
    small, other, large = (rows["evaluation", name] for name in names)
    networks = ("cifar_resnet20", "cifar_resnet56")
    shares = [rows[f"share, {rounds} rounds", name] for name in networks for rounds in (1, 3)]
    one, three, many, most = (f"{100 * float(row['share']):.0f} %" for row in shares)
    spent = [int(row["evaluations"]) for row in shares]
    passes = [
        f"{1e3 * float(rows['policy', network]['policy_seconds']):.0f} ms and "
        f"{float(rows['policy', network]['memory_mib']):.0f} MiB on {name} ({rows['policy', network]['groups']} groups)"
        for network, name in (("resnet50", "torchvision's ResNet-50"), ("vgg19", "VGG-19"))
    ]

    for sentence in (
        f"costs {100 * float(small['overhead']):.0f} % more than the forward passes alone",
        f"(ResNet-20; {100 * float(other['overhead']):.0f} % with 1×1 shortcuts)",
        f"takes {float(small['reconstruct_ratio']):.2f} times as long on ResNet-20 and "
        f"{float(large['reconstruct_ratio']):.2f} times on ResNet-56",
        f"takes {float(small['full_reconstruct_seconds']):.1f} s on ResNet-20 and "
        f"{float(large['full_reconstruct_seconds']):.1f} s on ResNet-56",
        f"is {float(other['times_faster']):.1f} times as fast as a deep copy pruned by torch_pruning",
        f"medians of {small['repeats']} turns side by side",
        f"take {one} of a training run's time on ResNet-20 in one round and {three} in three, {many} on ResNet-56 in "
        f"one and {most} in three (one run each of {min(spent)} to {max(spent)} evaluations",
        f"takes {', '.join(passes)}",
    ):
        assert sentence in RESULTS


def test_front_page_says_what_the_rows_say(tables: ModuleType) -> None:
    """In short what stands among the results."""
    speed = {(one["what"], one["network"]): one for one in tables.read("speed")}
    other, large = speed["evaluation", "cifar_resnet20_conv"], speed["evaluation", "cifar_resnet56"]
    latency = tables.read("latency")
    errors = sorted(f"{100 * float(one['median_error']):.1f}" for one in latency if one["what"] == "table")
    off = max(abs(100 * float(one["off_budget"])) for one in latency if one["what"] == "budget")

    for sentence in (
        f"Reconstructing ResNet-56 takes {float(large['full_reconstruct_seconds']):.1f} s on one core",
        f"{float(other['times_faster']):.1f} times as fast as a deep copy pruned by torch_pruning",
        f"not learned from to {' to '.join(errors)} % (median), and exported files keep a budget of half the "
        f"latency to within {off:.0f} %",
    ):
        assert sentence in FRONT


def test_gains_of_recovery_are_those_of_the_rows(tables: ModuleType) -> None:
    """In points, of the prior's plans; on no network and plan does reconstruction lose to compensation."""
    rows = tables.recovery_tables.read()
    gains = {}
    for (network, budget, allocation, recovery), row in rows.items():
        if recovery == "reconstruct":
            before = float(rows[network, budget, allocation, "compensate"]["test_score"])
            gains[network, budget, allocation] = 100 * (float(row["test_score"]) - before)
    priors = [gain for (_, _, allocation), gain in gains.items() if allocation == "prior"]

    assert min(gains.values()) > 0
    assert f"{min(priors):.0f} to {max(priors):.0f} points over compensation" in FRONT


def test_gain_of_distillation_is_that_of_the_rows(tables: ModuleType) -> None:
    """Over reconstruction, of the plans that it was measured on."""
    rows = tables.recovery_tables.read(tables.recovery_tables.EARLIER)
    gains = [
        100 * (float(row["test_score"]) - float(rows[*plan, "reconstruct"]["test_score"]))
        for (*plan, recovery), row in rows.items()
        if recovery in tables.recovery_tables.LADDER[4:]
    ]

    assert f"distillation was worth {min(gains):.0f} to {max(gains):.0f} points more than reconstruction" in RESULTS


def test_gains_of_allocation_and_search_are_those_of_the_rows(tables: ModuleType) -> None:
    """In points on test, over the pairs of networks and budgets that have the rows."""
    scores: dict[tuple[str, str], dict[tuple[str, str], float]] = {}
    for row in tables.read("transfer"):
        arms = scores.setdefault((row["network"], row["budget"]), {})
        arms.setdefault((row["searcher"], row["allowed"]), 100 * float(row["test_score"]))  # the first seed

    def gains(arm: tuple[str, str], over: tuple[str, str]) -> list[float]:
        return [found[arm] - found[over] for found in scores.values() if {arm, over} <= found.keys()]

    over_uniform = gains(("knapsack", "0"), ("uniform", "0"))
    searched = gains(("cmaes_prior", "200"), ("knapsack", "0"))
    rounds = gains(("rounds", "0"), ("knapsack", "0"))

    assert f"{min(over_uniform):.0f} to {max(over_uniform):.0f} points over the uniform plan" in FRONT
    assert (
        f"200 evaluations of CMA-ES from there change it by {min(searched):.1f} to {max(searched):.1f} points" in FRONT
    )
    ends = [scores[name, "macs:0.35"]["knapsack", "0"] for name in ("cifar_resnet20", "cifar_resnet56")]
    assert "without an evaluation, {:.1f} and {:.1f} on test".format(*ends) in RESULTS
    assert f"Three rounds change it by {min(rounds):.1f} to {max(rounds):.1f} points" in RESULTS


def test_unpruned_networks_are_those_of_the_rows(tables: ModuleType) -> None:
    """What pruning starts from."""
    rows = tables.recovery_tables.read()
    names = ("cifar_resnet20", "cifar_resnet56", "cifar_vgg16_half", "cifar_hybrid")
    scores = [f"{100 * float(rows[name, 'none', 'unpruned', 'unpruned']['test_score']):.1f}" for name in names]

    assert "Unpruned they have {}, {}, {} and {}.".format(*scores) in RESULTS
