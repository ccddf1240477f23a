"""Rows of all commands in one form, and what may stand beside what."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from prunegym.agents.run_folders.runs import RunFolder
from prunegym.pruning.timing.latency import Latency, LatencySettings
from prunegym.pruning.timing.speed_up import speed_up
from prunegym.reporting.gather import Run, gather
from prunegym.reporting.scores import Scores, by_searcher, collect


def run(name: str, command: str, rows: list[dict[str, Any]] | None = None, **config: Any) -> Run:
    """A run on CIFAR-10 with rows in its result."""
    asked = {"command": command, "seed": 0, "network": ["net"], "config": {"data": "data/cifar10.npz", **config}}
    return Run(folder=Path(name), name=name, command=command, asked=asked, rows=rows or ())


def row(searcher: str, score: float, **changes: Any) -> dict[str, Any]:
    """A row as `evaluate` writes it."""
    return {"network": "net", "budget": "macs:0.5", "searcher": searcher, "selection_score": score, **changes}


@pytest.fixture(scope="module")
def scores(pruning_runs: dict[str, Path]) -> Scores:
    """Those of real runs."""
    return collect(gather(list(pruning_runs.values())))


def test_plan_that_two_folders_hold_counts_once() -> None:
    """The uniform plan stands beside every policy; policies of two trainings are two runs."""
    runs = [
        run("a", "evaluate", [row("uniform", 0.5), row("policy", 0.6)], policy="x/policy.safetensors"),
        run("b", "evaluate", [row("uniform", 0.5), row("policy", 0.7)], policy="y/policy.safetensors"),
        run("c", "evaluate", [row("uniform", 0.5), row("policy", 0.6)], policy="x/policy.safetensors"),
    ]

    (rows,) = collect(runs).fields.values()
    found = by_searcher(rows, "macs:0.5")
    assert {name: [one.score for one in some] for name, some in found.items()} == {
        "policy": [0.6, 0.7],
        "uniform": [0.5],
    }


def test_rows_that_should_agree_and_do_not_are_both_kept() -> None:
    """Something else than what is known here was different."""
    runs = [run("a", "evaluate", [row("uniform", 0.5)]), run("b", "evaluate", [row("uniform", 0.4)])]

    assert [one.score for one in collect(runs).rows] == [0.5, 0.4]


@pytest.mark.parametrize("change", [{"data": "other.npz"}, {"split_seed": 3}])
def test_scores_on_other_images_stand_apart(change: dict[str, Any]) -> None:
    """Nothing is compared across data or splits."""
    runs = [run("a", "evaluate", [row("uniform", 0.5)]), run("b", "evaluate", [row("policy", 0.4)], **change)]

    assert len(collect(runs).fields) == 2


@pytest.mark.parametrize(
    ("told", "config", "recovery"),
    [
        ({"recovery": "distill"}, {}, "distill"),
        ({"recovery": "none"}, {}, "none"),
        ({}, {}, "compensate"),
    ],
)
@pytest.mark.parametrize("command", ["evaluate", "compare", "prune"])
def test_scores_after_another_recovery_stand_apart(
    command: str, told: dict[str, str], config: dict[str, Any], recovery: str
) -> None:
    """By default compensation."""
    made = run("a", command, **config)
    if command == "prune":
        shown = {"network": "net", "budget": "macs:0.5", "searcher": "uniform"}
        costs = {name: {"before": 2, "after": 1} for name in ("macs", "parameters")}
        scores = {"unpruned": 1.0, "after_recovery": 0.5}
        made = replace(made, result={**shown, **costs, "test_scores": scores, **told})
    else:
        made = replace(made, rows=[row("uniform", 0.5, after_recovery_score=0.5, plan="p", finetune_seed=None, **told)])

    assert {where.recovery for where in collect([made]).fields} == {recovery}


def test_selection_and_test_images_stand_apart_and_selection_comes_first() -> None:
    """What was chosen by, before what was read at the end."""
    fields = collect([run("a", "evaluate", [row("uniform", 0.5, test_score=0.4)])]).fields

    assert [where.split for where in fields] == ["selection", "test"]


def test_unpruned_rows_are_no_plans() -> None:
    """They tell where a network started, on every split."""
    unpruned = row("unpruned", 0.9, test_score=0.8, reward_score=0.7, macs=100, parameters=10)
    found = collect([run("a", "evaluate", [unpruned, row("uniform", 0.5)])])

    assert [one.searcher for one in found.rows] == ["uniform"]
    assert found.unpruned["net"].macs == 100
    assert found.unpruned_score(found.rows[0].where) == 0.9


def test_real_rows_are_those_of_the_folders(scores: Scores, pruning_runs: dict[str, Path]) -> None:
    """Of a comparison, of an evaluation and of `prune`, each in its field."""
    compared = RunFolder(pruning_runs["compare"]).read_rows("rows.csv")
    evaluated = RunFolder(pruning_runs["evaluate"]).read_json("result.json")["rows"]
    pruned = RunFolder(pruning_runs["prune"]).read_json("result.json")
    selection, *others = scores.fields.items()
    found = {name: {one.score for one in some} for name, some in by_searcher(selection[1], "macs:0.5").items()}

    assert selection[0].stage == "after_recovery"
    assert found["random"] == {one["after_recovery_score"] for one in compared if one["searcher"] == "random"}
    assert found["policy"] == {one["selection_score"] for one in evaluated if one["searcher"] == "policy"}
    assert {where.stage: rows[0].score for where, rows in others} == {
        stage: pruned["test_scores"][stage] for stage in ("after_recovery", "after_finetuning")
    }


def test_measured_latency_comes_with_its_conditions(scores: Scores, pruning_runs: dict[str, Path]) -> None:
    """As a share of the unpruned network's; a row that another folder has without it gets it."""
    compared = RunFolder(pruning_runs["compare"]).read_rows("rows_timing.csv")
    rows = {one.searcher: one for one in scores.rows if one.where.split == "selection"}

    expected = next(one["latency_ratio"] for one in compared if one["searcher"] == "uniform")
    assert rows["uniform"].latency_ratio == expected
    assert rows["uniform"].latency_of is not None
    assert "batch 1" in rows["uniform"].latency_of


@pytest.mark.parametrize("after", [1.0, 2.0])
def test_conditions_are_read_from_the_sentence(after: float) -> None:
    """As the measurement writes it: what stands behind the number of turns."""
    settings = LatencySettings(threads=1)
    before, later = (Latency.from_samples([seconds] * 9, settings) for seconds in (2.0, after))
    sentence = speed_up(before, later).sentence
    compared = {
        "network": "net",
        "budget": "macs:0.5",
        "searcher": "tpe",
        "seed": 0,
        "finetune_seed": None,
        "plan": "p",
    }
    measured = {"after_recovery_score": 0.5, "recovery": "compensate", "latency": sentence, "latency_ratio": 0.8}
    asked = {"command": "compare", "config": {}}
    one = Run(folder=Path("c"), name="c", command="compare", asked=asked, rows=[{**compared, **measured}])

    assert collect([one]).rows[0].latency_of == later.conditions


def test_number_of_images_is_known(scores: Scores, pruning_runs: dict[str, Path]) -> None:
    """From the splits: without them there would be no noise to tell."""
    (record,) = RunFolder(pruning_runs["evaluate"]).read_json("networks.json")

    where = next(iter(scores.fields))
    assert scores.examples(where) == record["unpruned"]["selection"]["examples"]
    assert scores.unpruned_score(where) == record["unpruned"]["selection"]["score"]
