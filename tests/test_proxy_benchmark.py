"""The benchmark of proxies: its allocations, its figures, and that it can be stopped at any time."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import kendalltau

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
HALF = Budget.parse("macs:0.5")


def module(name: str) -> ModuleType:
    """A script of the benchmarks, which import each other by their bare names."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        return importlib.import_module(name)


@pytest.fixture(scope="module")
def proxy() -> ModuleType:
    """The script."""
    return module("proxy")


@pytest.fixture(scope="module")
def figures() -> ModuleType:
    """What it makes of its rows."""
    return module("proxy_table")


@pytest.fixture(scope="module")
def chosen(problem: PruningProblem) -> list[Any]:
    """Allocations of the trained digits network."""
    found: list[Any] = module("allocations").allocations(problem, HALF, 36)
    return found


def test_allocations_are_distinct_and_cost_the_same(chosen: list[Any], problem: PruningProblem) -> None:
    """All keep the budget, and none can take one more channel."""
    limit = problem.limits[HALF]

    assert len({one.text for one in chosen}) == 36
    for one in chosen:
        assert limit.holds(one.counts)
        for group in np.flatnonzero(one.counts < problem.sizes):
            grown = one.counts.copy()
            grown[group] += 1
            assert not limit.holds(grown)


def test_allocations_reach_from_uniform_to_extreme(chosen: list[Any], problem: PruningProblem) -> None:
    """Some keep nearly the same share everywhere, some strip a group to almost nothing."""
    spreads = [np.ptp(one.counts / problem.sizes) for one in chosen]

    assert chosen[0].name == "uniform"
    assert min(spreads) < 0.1
    assert max(spreads) > 0.9


def test_longer_list_begins_like_a_shorter_one(chosen: list[Any], problem: PruningProblem) -> None:
    """So that a study can be extended."""
    make = module("allocations").allocations

    assert [one.text for one in make(problem, HALF, 20)] == [one.text for one in chosen[:20]]
    assert [one.text for one in make(problem, HALF, 36, seed=1)] != [one.text for one in chosen]


@given(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=6, max_size=6),
    st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_tau_of_a_sample_is_that_of_scipy(pairs: list[tuple[int, int]], counts: list[int]) -> None:
    """Where what is ranked occurs several times, as if it were written so often."""
    values, target = (np.array(one, np.float64) for one in zip(*pairs, strict=True))
    repeated = np.repeat(values, counts), np.repeat(target, counts)
    ranked = sum(counts) > 1 and all(np.ptp(one) > 0 for one in repeated)

    (found,) = module("proxy_table").weighted_taus(values, target, np.array([counts]))

    assert found == pytest.approx(kendalltau(*repeated).statistic if ranked else 0.0)


def test_tau_interval_holds_the_tau_and_narrows(figures: ModuleType, rng: np.random.Generator) -> None:
    """More allocations say more."""
    widths = []
    for count in (10, 80):
        target = rng.normal(size=count)
        tau, low, high = figures.tau_interval(target + rng.normal(size=count), target)
        assert low <= tau <= high
        widths.append(high - low)

    assert widths[1] < widths[0]


def test_regression_predicts_what_an_allocation_decides(figures: ModuleType, rng: np.random.Generator) -> None:
    """Where the target follows from the ratios, it ranks well; where it does not, it does not rank backwards."""
    taus = []
    for trial in range(3):
        keep = rng.uniform(0.05, 0.95, (36, 4))
        target = np.log(keep / (1 - keep)) @ np.array([1.0, -0.5, 0.2, 0.0])
        assert kendalltau(figures.leave_one_out(keep, target), target).statistic > 0.8
        noise = np.random.default_rng(trial).normal(size=36)
        taus.append(kendalltau(figures.leave_one_out(keep, noise), noise).statistic)

    assert abs(np.mean(taus)) < 0.35


def rows_of(values: dict[str, list[float]], repeats: dict[int, list[float]]) -> list[dict[str, str]]:
    """Rows as the script writes them, for made-up scores by measure."""
    shared = {"network": "n", "budget": "b", "setup": "s", "epochs": "3", "loss": "1.0", "seconds": "2.0"}
    rows = []
    for measure, scores in values.items():
        for index, score in enumerate(scores):
            seeds = [score, *(repeats.get(index, []) if measure == "finetuned" else [])]
            for seed, one in enumerate(seeds):
                text = {"counts": str(index), "measure": measure, "seed": str(seed), "score": str(one)}
                rows.append({**shared, **text, "keep": f"0.{index + 1} 0.5"})
    return rows


def test_study_tells_spread_and_noise(figures: ModuleType) -> None:
    """The noise is pooled over the repeated allocations."""
    target = [0.8, 0.82, 0.9, 0.7, 0.85]
    rows = rows_of({"pruned": [0.1] * 5, "finetuned": target}, {0: [0.82, 0.84], 2: [0.9, 0.93]})
    (study,) = figures.studies_of(rows)

    variances = [np.var([0.8, 0.82, 0.84], ddof=1), np.var([0.9, 0.9, 0.93], ddof=1)]
    assert study.noise == pytest.approx(np.sqrt(np.mean(variances)))
    assert study.target.tolist() == target
    text = figures.section(study, figures.tau_rows(study))
    assert "5 allocations of equal cost reach 70.00 to 90.00 %" in text
    assert "a spread of 20.00 points" in text


def test_proxies_are_ranked(figures: ModuleType) -> None:
    """One that orders the allocations as fine-tuning does has tau 1; a constant has none."""
    target = [0.8, 0.82, 0.9, 0.7, 0.85]
    rows = rows_of({"pruned": [0.1] * 5, "compensated": [one / 2 for one in target], "finetuned": target}, {})
    taus = {row["proxy"]: row for row in figures.tau_rows(figures.studies_of(rows)[0])}

    assert taus["accuracy, compensated and recalibrated"]["tau"] == pytest.approx(1)
    assert taus["accuracy, compensated and recalibrated"]["top_tau"] == pytest.approx(1)
    assert taus["accuracy, right after pruning"]["tau"] == 0
    assert taus["accuracy, right after pruning"]["seconds"] == 2.0


def test_gain_over_recovery_is_paired(figures: ModuleType) -> None:
    """On the same samples: a proxy has nothing over itself, and what falls behind recovery everywhere is below it."""
    target = np.array([0.8, 0.82, 0.9, 0.7, 0.85, 0.6])
    worse = np.array([0.82, 0.8, 0.9, 0.85, 0.7, 0.6])

    assert figures.tau_gain(target, target, target) == (0.0, 0.0, 0.0)
    gain, low, high = figures.tau_gain(worse, target, target)
    assert gain == pytest.approx(kendalltau(worse, target).statistic - 1)
    assert low <= gain <= high <= 0


def test_unfinished_allocations_are_left_out(figures: ModuleType) -> None:
    """Tables can be written at any time."""
    rows = rows_of({"pruned": [0.1, 0.2, 0.3, 0.4, 0.5], "finetuned": [0.8, 0.82, 0.9, 0.7]}, {})

    assert len(figures.studies_of(rows)[0].target) == 4
    assert figures.studies_of(rows[:-1]) == []


@pytest.fixture
def arguments(proxy: ModuleType, tmp_path: Path) -> Any:
    """Little of everything."""
    return proxy.Arguments(
        network="digits_vgg",
        allocations=5,
        repeated=2,
        seeds=2,
        epochs=1,
        steps=(1,),
        reward_examples=32,
        device="cpu",
        results=tmp_path / "results",
        runs=tmp_path / "runs",
    )


def test_script_goes_on_where_it_was_stopped(
    proxy: ModuleType, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No piece is computed twice; at the end everything is there, and no checkpoint."""
    piece, computed = proxy.Proxies._piece, []

    def stopped(self: Any, allocation: Any, measure: str, seed: int) -> Any:
        if len(computed) == 9:
            computed.append(("", "", 0))
            raise KeyboardInterrupt
        computed.append((allocation.text, measure, seed))
        return piece(self, allocation, measure, seed)

    monkeypatch.setattr(proxy.Proxies, "_piece", stopped)
    with pytest.raises(KeyboardInterrupt):
        proxy.main(arguments)
    proxy.main(arguments)

    # 5 allocations x 6 measures, and 2 more fine-tunings
    assert len(computed) == len(set(computed)) == 32 + 1
    table = proxy.Table(arguments.results / "proxy.csv", proxy.KEYS)
    assert len(table.rows) == 32
    assert {row["measure"] for row in table.rows} == {
        *("pruned", "recalibrated", "compensated", "steps 1", "importance", "finetuned")
    }
    assert (arguments.results / "proxy.md").read_text().startswith("# Which reward")
    assert len((arguments.results / "proxy_taus.csv").read_text().splitlines()) == 1 + 2 * 5 + 1
    assert list((tmp_path / "runs").rglob("*.pt")) == []
