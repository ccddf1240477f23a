"""Figures of a comparison on rows that are made up, against what one counts by hand."""

from typing import Any

import pytest

from prunegym.experiments.comparison.bootstrap import Interval
from prunegym.experiments.comparison.summary import Table, at_seconds, fastest_seconds, summarise

PAIRS = (("a", "macs:0.5"), ("b", "macs:0.5"))
#: Searcher -> for each pair, for each seed: score after recovery.
SCORES = {"uniform": ((0.5, 0.5), (0.7, 0.7)), "agent": ((0.6, 0.8), (0.7, 0.9)), "random": ((0.4, 0.6), (0.6, 0.6))}
SECONDS = {"uniform": 0.01, "agent": 10.0, "random": 4.0}


def rows(**changes: Any) -> list[dict[str, Any]]:
    """Two pairs, two seeds, two fine-tuning seeds that differ by 0.02."""
    return [
        {
            "network": network,
            "budget": budget,
            "searcher": name,
            "seed": seed,
            "finetune_seed": tuned,
            "plan": f"{name}-{seed if name != 'uniform' else 0}",
            "reward_score": SCORES[name][index][seed] + 0.01,
            "after_pruning_score": 0.1,
            "after_recovery_score": SCORES[name][index][seed],
            "after_finetuning_score": SCORES[name][index][seed] + 0.1 + 0.02 * tuned,
            "test_after_recovery_score": None,
            "test_after_finetuning_score": None,
            "cost": 0.49,
            "latency_ratio": None,
            "evaluations": 0 if name == "uniform" else 20,
            "seconds": SECONDS[name] + seed,
            **changes,
        }
        for index, (network, budget) in enumerate(PAIRS)
        for name in SCORES
        for seed in (0, 1)
        for tuned in (0, 1)
    ]


def curves() -> list[dict[str, Any]]:
    """Each search has one plan at half its seconds, 0.1 worse, and its last at three quarters."""
    return [
        {
            "network": network,
            "budget": budget,
            "searcher": name,
            "seed": seed,
            "evaluations": 0,
            "seconds": share * SECONDS[name],
            "after_recovery_score": SCORES[name][index][seed] - less,
        }
        for index, (network, budget) in enumerate(PAIRS)
        for name in SCORES
        for seed in (0, 1)
        for share, less in ((0.5, 0.1), (0.75, 0.0))
    ]


@pytest.fixture
def table() -> Table:
    """All rows, with fine-tuning."""
    return Table(rows(), curves(), tuple(SCORES))


def test_runs_are_means_over_fine_tuning_seeds(table: Table) -> None:
    """For each pair, for each seed."""
    assert table.runs("agent", "after_finetuning_score") == [
        pytest.approx([0.71, 0.91]),
        pytest.approx([0.81, 1.01]),
    ]


def test_last_stage_that_was_measured_decides(table: Table) -> None:
    """After fine-tuning if there was any."""
    assert table.stage == "after_finetuning_score"
    assert Table(rows(after_finetuning_score=None), curves(), ("agent",)).stage == "after_recovery_score"


@pytest.mark.parametrize(
    ("searchers", "expected"),
    [(("uniform", "policy", "agent"), "agent"), (("uniform", "policy"), "policy"), (("uniform", "random"), "uniform")],
)
def test_reference_is_the_agent_if_there_is_one(searchers: tuple[str, ...], expected: str) -> None:
    """Else a policy, else the first."""
    assert Table(rows(), curves(), searchers).reference == expected


def test_summary_is_what_one_counts(table: Table) -> None:
    """Means over pairs; differences paired with the agent; reward minus selection."""
    uniform, agent, _ = summarise(table)

    assert uniform["score"].mean == pytest.approx(0.6 + 0.11)
    assert uniform["difference"].mean == pytest.approx(0.6 - 0.75)
    # over pairs: their differences are 0.5 - 0.7 and 0.7 - 0.8
    assert (uniform["difference"].low, uniform["difference"].high) == pytest.approx((-0.2, -0.1))
    assert agent["difference"] is None
    assert agent["gap"] == pytest.approx(0.01)
    assert agent["after_recovery_score"] == pytest.approx(0.75)
    assert agent["seconds"] == pytest.approx(10.5)
    assert agent["most_evaluations"] == 20


def test_allocator_on_one_pair_has_no_interval() -> None:
    """Its runs are copies of one: they show no spread, which does not mean that there is none."""
    single = Table([row for row in rows() if row["network"] == "a"], curves(), tuple(SCORES))
    uniform, agent, random = summarise(single)

    assert uniform["score"] == Interval(uniform["score"].mean)
    assert agent["score"].low is not None
    assert random["difference"].low is not None


def test_fastest_search_sets_the_seconds(table: Table) -> None:
    """Not an allocator, which searches nothing."""
    assert fastest_seconds(table) == dict.fromkeys(PAIRS, 4.5)
    assert fastest_seconds(Table(rows(evaluations=0), curves(), ("uniform",))) is None


@pytest.mark.parametrize("name", ["prior", "policy"])
def test_what_scores_a_few_plans_sets_no_seconds(table: Table, name: str) -> None:
    """By then no search has a plan, and the table of equal seconds would be empty."""
    changed = {"searcher": name, "evaluations": 3, "seconds": 0.1}
    few = [{**row, **changed} for row in rows() if row["searcher"] == "uniform"]

    assert fastest_seconds(Table([*rows(), *few], curves(), (*SCORES, name))) == dict.fromkeys(PAIRS, 4.5)


@pytest.mark.parametrize(
    ("seconds", "agent", "random"), [(1.0, None, None), (2.5, None, 0.45), (5.0, 0.65, 0.55), (8.0, 0.75, 0.55)]
)
def test_scores_at_seconds_are_those_of_the_plans_by_then(
    table: Table, seconds: float, agent: float | None, random: float | None
) -> None:
    """A search without plan by then has no score, and is counted."""
    found = {one["searcher"]: one for one in at_seconds(table, dict.fromkeys(PAIRS, seconds))}

    for name, expected in (("agent", agent), ("random", random)):
        assert (found[name]["score"] is None) is (expected is None)
        assert found[name]["without"] == (4 if expected is None else 0)
        if expected is not None:
            assert found[name]["score"].mean == pytest.approx(expected)
    assert (found["random"]["difference"] is None) is (agent is None)
