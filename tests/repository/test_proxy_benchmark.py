"""The benchmarks of plans after fine-tuning and of the scores that rank them: allocations, taus, and being stopped."""

import importlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from prunegym.envs.setting import PruningProblem
from prunegym.pruning.budget import Budget

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
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


@pytest.fixture
def arguments(proxy: ModuleType, tmp_path: Path) -> Any:
    """Little of everything."""
    return proxy.Arguments(
        network="digits_vgg",
        allocations=5,
        repeated=2,
        seeds=2,
        epochs=1,
        device="cpu",
        results=tmp_path / "results",
        runs=tmp_path / "runs",
    )


def test_script_goes_on_where_it_was_stopped(
    proxy: ModuleType, arguments: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is fine-tuned twice; at the end everything is there, and no checkpoint."""
    piece, computed = proxy.FineTunings.piece, []

    def stopped(self: Any, allocation: Any, seed: int) -> Any:
        if len(computed) == 3:
            computed.append(("", 0))
            raise KeyboardInterrupt
        computed.append((allocation.text, seed))
        return piece(self, allocation, seed)

    monkeypatch.setattr(proxy.FineTunings, "piece", stopped)
    with pytest.raises(KeyboardInterrupt):
        proxy.main(arguments)
    proxy.main(arguments)

    # 5 allocations, and 2 of them again
    assert len(computed) == len(set(computed)) == 7 + 1
    assert len(proxy.Table(arguments.results / "proxy.csv", proxy.KEYS).rows) == 7
    assert list((tmp_path / "runs").rglob("*.pt")) == []


def test_taus_are_those_of_all_pairs(rng: np.random.Generator) -> None:
    """Counted pair by pair, of all plans and of the better half."""
    taus = module("taus")
    truth, other, value = (rng.permutation(12).astype(float) for _ in range(3))
    names = (*taus.SCORES, *taus.WHOLE)
    rows = [
        {
            "reconstructed": str(truth[index]),
            "finetuned": str(other[index]),
            **dict.fromkeys(names, str(value[index])),
            **dict.fromkeys((f"{name} seconds" for name in names), "2.0"),
        }
        for index in range(12)
    ]

    (found, *_) = taus.tau_rows(rows)

    assert found["price"] == "1.00"
    for label, target in (("after full reconstruction", truth), ("after fine-tuning", other)):
        for suffix, part in (("", target >= target.min()), (", better half", target >= np.median(target))):
            assert float(found[label + suffix].split()[0]) == pytest.approx(_tau(value[part], target[part]), abs=0.005)


def _tau(first: np.ndarray, second: np.ndarray) -> float:
    pairs = [(i, j) for i in range(len(first)) for j in range(i)]
    return float(np.mean([np.sign(first[i] - first[j]) * np.sign(second[i] - second[j]) for i, j in pairs]))


def test_fine_tuned_plans_come_from_the_rows() -> None:
    """Those of a network and budget, with the first seed."""
    taus = module("taus")

    found = taus.finetuned_plans(taus.Arguments(network="cifar_resnet20", budget="macs:0.35"))

    assert len(found) == 30
    assert 0.7 < min(found.values()) < max(found.values()) < 0.9
