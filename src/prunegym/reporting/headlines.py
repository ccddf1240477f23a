"""The few figures on top of the page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from prunegym.reporting.gather import Record, Run
from prunegym.reporting.page import Card, Headline
from prunegym.reporting.scores import WORDS, Field, Scored, Scores, by_searcher
from prunegym.reporting.verdict import difference, speed_tone, subject_of
from prunegym.reporting.words import amount, percent, plural, signed

#: More would be a table.
_MOST = 4


def headlines(runs: Sequence[Run], scores: Scores) -> list[Headline]:
    """What was reached: networks pruned for good, or else the plans of learned searchers.

    Args:
        runs: As of :func:`.gather.gather`.
        scores: As of :func:`.scores.collect`.
    """
    pruned = [
        Headline(_title(result), list(_pruned_cards(run, result))) for run in runs if (result := run.came_to("prune"))
    ]
    tuned = [
        Headline(f"{result['network']} fine-tuned", list(_tuned_cards(run, result)))
        for run in runs
        if (result := run.came_to("finetune"))
    ]
    return (pruned + tuned or list(_plans(scores)) or list(_trainings(runs)))[:_MOST]


def _title(result: Record) -> str:
    by = "a plan from a file" if result["searcher"] == "plan" else result["searcher"]
    return f"{result['network']} pruned to {result['budget']} by {by}"


def _pruned_cards(run: Run, result: Record) -> Iterator[Card]:
    scores = result["test_scores"]
    stage = next(one for one in reversed(tuple(WORDS)) if scores.get(one) is not None)
    gap = difference([scores[stage]], [scores["unpruned"]], run.examples.get("test"))
    detail = f"{WORDS[stage]}, test images; {percent(scores['unpruned'])} unpruned"
    yield Card("accuracy", percent(scores[stage]), detail, "bad" if gap.tone == "bad" else "good")
    for name, cost in (("MACs", result["macs"]), ("parameters", result["parameters"])):
        share = cost["after"] / max(cost["before"], 1)
        yield Card(f"{name} kept", percent(share), f"{amount(cost['after'])} of {amount(cost['before'])}")
    for row in result.get("latency", ()):
        if row.get("speed_up"):
            after = row["after"]
            tone = speed_tone(row)
            conditions = (
                f"{row['backend']}, batch {after.get('batch_size')}, {plural(after.get('threads', 1), 'thread')}"
            )
            if tone == "even":
                yield Card("speed-up", "none", f"{row['speed_up']:.2f}× lies within the noise; {conditions}", tone)
            else:
                yield Card("speed-up", f"{row['speed_up']:.2f}×", conditions, tone)


def _tuned_cards(run: Run, result: Record) -> Iterator[Card]:
    scores = result["test_scores"]
    after, before = scores["after_finetuning"], scores["before_finetuning"]
    gap = difference([after], [before], run.examples.get("test"))
    yield Card("accuracy", percent(after), f"test images; {percent(before)} before fine-tuning")
    noise = "noise unknown" if gap.margin is None else f"noise ±{100 * gap.margin:.1f}"
    yield Card("gained", signed(100 * gap.value), f"points in {plural(result['epochs'], 'epoch')}; {noise}", gap.tone)
    yield Card("parameters", amount(result["parameters"]))


def _trainings(runs: Sequence[Run]) -> Iterator[Headline]:
    """How far agents have come whose plans were not compared yet."""
    for run in runs:
        for one in run.trainings:
            last = one.metrics[-1]
            detail = "on the reward images, which the search sees"
            yield Headline(
                f"{one.network} at {one.budget}, training with seed {one.seed}",
                [
                    Card("the policy's own plan", percent(last["own"]), detail),
                    Card("best sampled plan", percent(last["best"]), detail),
                    Card("evaluations", f"{last['evaluations']:,}", "plans scored so far"),
                ],
            )


def _plans(scores: Scores) -> Iterator[Headline]:
    """For each network and budget the plan that the page is about."""
    for where, rows in scores.fields.items():
        for budget in dict.fromkeys(row.budget for row in rows):
            found = by_searcher(rows, budget)
            name = subject_of(found) or next(iter(found))
            title = f"{where.network} at {budget} by {name}"
            yield Headline(title, list(_plan_cards(where, found, name, scores)))


def _plan_cards(where: Field, found: dict[str, list[Scored]], name: str, scores: Scores) -> Iterator[Card]:
    rows, examples = found[name], scores.examples(where)
    values = [row.score for row in rows]
    unpruned = scores.unpruned_score(where)
    detail = f"{WORDS[where.stage]}, {where.split} images"
    yield Card("accuracy", percent(fmean(values)), detail + (f"; {percent(unpruned)} unpruned" if unpruned else ""))
    for rival in ("uniform", "knapsack"):
        if rival in found and rival != name:
            gap = difference(values, [row.score for row in found[rival]], examples)
            noise = "noise unknown" if gap.margin is None else f"noise ±{100 * gap.margin:.1f}"
            yield Card(f"over {rival}", signed(100 * gap.value), f"points; {noise}", gap.tone)
    if rows[0].macs is not None:
        known = scores.unpruned.get(where.network)
        if known is not None and known.macs:
            of = f"{amount(rows[0].macs)} of {amount(known.macs)}"
            yield Card("MACs kept", percent(rows[0].macs / known.macs), of)
        else:
            yield Card("MACs left", amount(rows[0].macs))
    if rows[0].evaluations is not None:
        yield Card("evaluations", f"{max(row.evaluations or 0 for row in rows):,}", "plans scored by the search")
