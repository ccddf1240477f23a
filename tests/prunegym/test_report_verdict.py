"""What may be said of figures: the rules, against hand counts."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prunegym.reporting.gather import Run
from prunegym.reporting.scores import Field, Scored, Scores, Unpruned
from prunegym.reporting.verdict import Sentence, difference, speed_tone, subject_of, verdicts

WHERE = Field(network="net", data="digits", split="selection", stage="after_recovery", recovery="reconstruct", epochs=0)


def scored(searcher: str, score: float, **changes: Any) -> Scored:
    """A run of a searcher at half the MACs."""
    kept: dict[str, Any] = dict.fromkeys(("cost", "macs", "parameters", "latency_ratio", "latency_of", "seconds"))
    more = {"budget": "macs:0.5", "identity": f"{score}", "reward_score": None, "reward_examples": None}
    return Scored(where=WHERE, searcher=searcher, score=score, evaluations=0, run="r", **{**kept, **more, **changes})


def said(*rows: Scored, examples: int | None = 1000) -> list[Sentence]:
    """Sentences about rows, scored on so many images."""
    count = {} if examples is None else {("digits", "selection"): examples}
    return verdicts([], Scores(rows, {"net": Unpruned(scores={}, examples=count)}))


def pruned(**changes: Any) -> Run:
    """A run of `prune`: half the MACs, as accurate as before, not measured for speed."""
    result = {
        "network": "net",
        "budget": "macs:0.5",
        "searcher": "policy",
        "macs": {"before": 100, "after": 50},
        "test_scores": {"unpruned": 0.9, "after_pruning": 0.2, "after_recovery": 0.8, "after_finetuning": 0.9},
        "latency": [],
        **changes,
    }
    asked = {"command": "prune", "config": {}}
    return Run(folder=Path("p"), name="p", command="prune", asked=asked, result=result, examples={"test": 1000})


def latency(ratio: float, spread: float = 0.01) -> dict[str, Any]:
    """A latency measured in torch, 10 ms before, with an interval that wide on both sides."""
    sides = {"before": {"median_seconds": 0.01}, "after": {"median_seconds": 0.01 / ratio}}
    interval = [ratio - spread, ratio + spread]
    return {"backend": "torch", "speed_up": ratio, "interval": interval, "drift": 0.0, "sentence": "", **sides}


def texts(found: list[Sentence]) -> str:
    """All that is said."""
    return " ".join(one.text for one in found)


def test_margin_is_that_of_two_shares_of_the_images() -> None:
    """By hand: 80 % and 70 % of 400 images."""
    gap = difference([0.8], [0.7], 400)

    assert gap.value == pytest.approx(0.1)
    assert gap.margin == pytest.approx(1.96 * math.sqrt(0.8 * 0.2 / 400 + 0.7 * 0.3 / 400))
    assert gap.tone == "good"


def test_runs_that_differ_widen_the_margin() -> None:
    """By hand: the variance of the mean of three runs is added."""
    gap = difference([0.7, 0.8, 0.9], [0.8], 400)

    assert gap.margin == pytest.approx(1.96 * math.sqrt(2 * 0.8 * 0.2 / 400 + 0.01 / 3))


def test_nothing_is_claimed_where_no_noise_is_known() -> None:
    """One run each, on nobody knows how many images; or copies of one run."""
    for ours in ([0.9], [0.9, 0.9]):
        gap = difference(ours, [0.1], None)

        assert gap.margin is None
        assert gap.tone == "even"


@given(
    ours=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
    theirs=st.lists(st.floats(0.01, 0.99), min_size=1, max_size=4),
    examples=st.integers(1, 10_000),
)
def test_gains_of_one_are_losses_of_the_other(ours: list[float], theirs: list[float], examples: int) -> None:
    """And neither gains where the difference lies within the margin."""
    one, other = difference(ours, theirs, examples), difference(theirs, ours, examples)

    assert {"good": "bad", "bad": "good", "even": "even"}[one.tone] == other.tone
    assert (abs(one.value) <= (one.margin or 0)) == (one.tone == "even")


def test_better_than_uniform_is_said_with_the_figures() -> None:
    """Beyond the noise."""
    (sentence,) = said(scored("policy", 0.8), scored("uniform", 0.6))

    assert sentence.tone == "good"
    assert sentence.about == "net at macs:0.5, after recovery, selection images"
    assert sentence.text == (
        "The plan of the policy is better than uniform: 80.0 % against 60.0 % (+20.0 points, noise ±3.9)."
    )


def test_uniform_is_enough_where_nothing_was_gained() -> None:
    """A difference within the noise is none."""
    (sentence,) = said(scored("policy", 0.61), scored("uniform", 0.6))

    assert sentence.tone == "even"
    assert "The plan of the policy is not better than uniform: 61.0 % against 60.0 %" in sentence.text
    assert sentence.text.endswith("uniform is enough here.")


def test_worse_than_uniform_is_said_too() -> None:
    """With what to use instead."""
    (sentence,) = said(scored("policy", 0.4), scored("uniform", 0.6))

    assert sentence.tone == "bad"
    assert sentence.text.endswith("Use uniform here.")


def test_best_allocator_and_best_rival_are_rivals_too() -> None:
    """Of several the best of each kind; its own best sampled plan is no rival of a policy."""
    rows = [("policy", 0.8), ("best sampled", 0.9), ("uniform", 0.6), ("knapsack", 0.79), ("lamp", 0.5)]
    rows += [("random", 0.7), ("tpe", 0.81)]
    found = said(*(scored(name, score) for name, score in rows))

    assert [one.tone for one in found] == ["good", "even", "even"]
    assert "knapsack is enough here" in found[1].text
    assert "not better than tpe" in found[2].text


def test_no_claim_without_noise() -> None:
    """The figures are given, and that nothing tells chance apart."""
    (sentence,) = said(scored("policy", 0.9), scored("uniform", 0.1), examples=None)

    assert sentence.tone == "even"
    assert "Nothing tells how much of that is chance" in sentence.text


@pytest.mark.parametrize(
    ("names", "subject"),
    [
        (["uniform", "policy", "random"], "policy"),
        (["agent best", "agent"], "agent"),
        (["zero-shot", "few-shot", "uniform"], "few-shot"),
        (["uniform", "random", "tpe"], "tpe"),
        (["uniform", "knapsack"], "knapsack"),
        (["uniform"], None),
    ],
)
def test_subject_is_what_was_learned_or_else_the_best_that_was_tried(names: list[str], subject: str | None) -> None:
    """The last named scores best."""
    found = {name: [scored(name, 0.5 + place / 100)] for place, name in enumerate(names)}

    assert subject_of(found) == subject


def test_search_that_fits_its_images_is_told() -> None:
    """A gap between the images of the search and others, beyond the noise of both."""
    seen = {"reward_score": 0.9, "reward_examples": 1000}
    found = said(scored("policy", 0.8, **seen), scored("uniform", 0.5))

    assert found[-1].tone == "note"
    assert "90.0 % on the 1,000 images of the search and 80.0 % on others" in found[-1].text
    assert not [one for one in said(scored("policy", 0.9, **seen), scored("uniform", 0.5)) if one.tone == "note"]


def test_speed_is_said_with_what_the_macs_promise() -> None:
    """Half the MACs and a fifth more speed."""
    found = verdicts([pruned(latency=[latency(1.2)])], Scores((), {}))

    assert found[0].tone == "good"
    assert found[0].text == (
        "Faster: 1.20 times as fast as before (median 10 → 8.33 ms). "
        "2.0 times fewer MACs are not 2.0 times the speed here."
    )


def test_no_speed_up_beyond_the_noise_is_said() -> None:
    """By the interval of the measurement."""
    row = latency(1.1, spread=0.2)
    found = verdicts([pruned(latency=[row])], Scores((), {}))

    assert speed_tone(row) == "even"
    assert found[0].tone == "even"
    assert found[0].text.startswith("No speed-up beyond the noise: 1.10 times as fast as before")


@pytest.mark.parametrize(("interval", "tone"), [((1.01, 1.2), "good"), ((0.9, 1.1), "even"), ((0.8, 0.99), "bad")])
def test_interval_decides_where_there_is_one(interval: tuple[float, float], tone: str) -> None:
    """Whatever the words."""
    row = {**latency(1.0), "interval": interval, "drift": -0.1}

    found = verdicts([pruned(latency=[row])], Scores((), {}))
    assert found[0].tone == speed_tone(row) == tone
    assert "drifted while it measured: the last third of the turns took 10% less than the first" in found[1].text


def test_slower_is_a_loss() -> None:
    """Fewer MACs are no promise."""
    found = verdicts([pruned(latency=[latency(0.9)])], Scores((), {}))

    assert found[0].tone == "bad"
    assert found[0].text.startswith("Slower than before: 0.90 times as fast")


def test_what_was_not_measured_is_told_why() -> None:
    """A runtime that is not installed."""
    row = {"backend": "onnxruntime", "sentence": "Not measured: it needs the package onnx."}

    assert verdicts([pruned(latency=[row])], Scores((), {}))[0].text == row["sentence"]


@pytest.mark.parametrize(("holds", "tone"), [(True, "good"), (False, "bad")])
def test_latency_budget_is_told_as_it_was_measured(holds: bool, tone: str) -> None:
    """When the plan was brought to it."""
    kept = {"asked": 0.5, "holds": holds, "sentence": "latency:0.5: all of it."}
    (_, budget, *_) = verdicts([pruned(latency=[latency(2.0)], latency_budget=kept)], Scores((), {}))

    assert (budget.tone, budget.text) == (tone, kept["sentence"])


@pytest.mark.parametrize(("asked", "told"), [(0.8, True), (0.86, False), (0.9, False)])
def test_network_that_breaks_its_latency_budget_in_the_end_is_told(asked: float, told: bool) -> None:
    """10 ms before and 8.7 ms after: 87 % are left, give or take 2; what lies within that is no breach."""
    kept = {"asked": asked, "holds": True, "sentence": "It held."}
    run = pruned(latency=[latency(1 / 0.87, spread=0.03)], latency_budget=kept)

    assert ("does not hold the budget: 87.0 %" in texts(verdicts([run], Scores((), {})))) == told


@pytest.mark.parametrize(
    ("after", "tone", "words"),
    [
        (0.9, "good", "No accuracy lost beyond the noise: 90.0 % after fine-tuning"),
        (0.7, "bad", "Pruning costs accuracy: 70.0 % after fine-tuning, 90.0 % unpruned"),
        (0.99, "good", "More accurate than before"),
    ],
)
def test_accuracy_is_judged_against_the_unpruned_network(after: float, tone: str, words: str) -> None:
    """The last stage there is, on the test images."""
    scores = {"unpruned": 0.9, "after_pruning": 0.1, "after_recovery": 0.5, "after_finetuning": after}
    (sentence,) = verdicts([pruned(test_scores=scores)], Scores((), {}))

    assert sentence.tone == tone
    assert words in sentence.text


def test_quick_demonstration_comes_with_a_warning_before_all_else() -> None:
    """Its figures mean nothing."""
    demo = Run(folder=Path("d"), name="d", command="demo", asked={"config": {"quick": True}}, result={})

    assert verdicts([pruned(), demo], Scores((), {}))[0].text.startswith("A quick demonstration")


def test_unfinished_runs_and_changed_code_are_told() -> None:
    """What a reader should know of the runs themselves."""
    dirty = {"git": {"commit": "abc", "dirty": True}}
    run = Run(folder=Path("t"), name="t", command="train", asked={"config": {}}, environment=dirty)

    found = texts(verdicts([run], Scores((), {})))
    assert "Not finished: train t." in found
    assert "Not finished" not in texts(verdicts([replace(run, result={})], Scores((), {})))
    assert "differs from its commit" in found
