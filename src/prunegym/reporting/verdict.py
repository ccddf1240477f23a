"""What can honestly be said of the figures, by fixed rules; also that nothing was gained.

The rule for two scores: a difference counts if it exceeds its *margin*, 1.96 standard errors. The error has two parts:
the images (a share ``p`` of ``N`` images has the variance ``p (1 - p) / N``) and the runs (the variance of their mean,
where there are several). Both are counted as if the two plans had been measured apart; on the same images the true
error is smaller, so the rule rather says too little. Where nothing tells the error there is no margin and no claim.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Literal

from prunegym.pruning.timing.latency import drifted
from prunegym.reporting.gather import Record, Run
from prunegym.reporting.scores import LEARNED, SIMPLE, WORDS, Field, Scored, Scores, by_searcher, mean_score
from prunegym.reporting.words import joined, percent, plural, signed

#: Standard errors that a difference must exceed.
_STANDARD_ERRORS = 1.96
#: Of the speed that the MACs promise, less than this share is told.
_PROMISED = 0.5

Tone = Literal["good", "even", "bad", "note"]


@dataclass(frozen=True)
class Sentence:
    """One honest sentence."""

    tone: Tone
    """A gain, none, a loss, or something to know."""
    about: str
    """What it is about: network, budget, stage."""
    text: str


@dataclass(frozen=True)
class Difference:
    """How far one set of runs is from another, in score."""

    value: float
    margin: float | None
    """None where nothing is known about the noise."""

    @property
    def tone(self) -> Tone:
        """Whether it counts, and for whom."""
        if self.margin is None or abs(self.value) <= self.margin:
            return "even"
        return "good" if self.value > 0 else "bad"

    def __str__(self) -> str:
        """Points with their noise."""
        noise = "noise unknown" if self.margin is None else f"noise ±{100 * self.margin:.1f}"
        return f"{signed(100 * self.value)} points, {noise}"


def difference(ours: Sequence[float], theirs: Sequence[float], examples: int | None) -> Difference:
    """Difference of two mean scores, with the margin that it has to exceed.

    Args:
        ours: Scores of the runs in question, shares of right answers.
        theirs: Scores of what they are compared with.
        examples: Images that each score is a mean over; None if unknown.
    """
    error = 0.0
    for scores in (ours, theirs):
        if examples:
            error += fmean(scores) * (1 - fmean(scores)) / examples
        if len(scores) > 1:
            error += variance(scores) / len(scores)
    # copies of one run, and shares of 0 or 1, show no noise, which does not mean that there is none
    return Difference(fmean(ours) - fmean(theirs), _STANDARD_ERRORS * math.sqrt(error) if error else None)


def verdicts(runs: Sequence[Run], scores: Scores) -> list[Sentence]:
    """All sentences of a page: about plans, then speed, then accuracy; warnings last, but for the gravest.

    Args:
        runs: As of :func:`.gather.gather`.
        scores: As of :func:`.scores.collect`.
    """
    found: list[Sentence] = []
    if any(run.is_quick for run in runs):
        text = "A quick demonstration: far too little was done for its figures to mean anything."
        found.append(Sentence("bad", "Before all else", text))
    for where, rows in scores.fields.items():
        found += _about_plans(where, rows, scores.examples(where))
    for run in runs:
        if result := run.came_to("prune"):
            found += _about_speed(run, result)
            found += _about_accuracy(run, result)
        if result := run.came_to("finetune"):
            found.append(_about_finetuning(run, result))
        if result := run.came_to("export"):
            found += _about_files(result)
    found += _warnings(runs)
    return list(dict.fromkeys(found))


def _about_plans(where: Field, rows: Sequence[Scored], examples: int | None) -> Iterator[Sentence]:
    """Who is better than whom, at each budget."""
    for budget in dict.fromkeys(row.budget for row in rows):
        found = by_searcher(rows, budget)
        about = f"{where.network} at {budget}, {WORDS[where.stage]}, {where.split} images"
        subject = subject_of(found)
        if subject is None:
            continue
        yield from _against(subject, found, about, examples)
        yield from _flattery(subject, found[subject], about, where, examples)


def subject_of(found: dict[str, list[Scored]]) -> str | None:
    """Whom the sentences are about: the policy or agent, or else the best of those that try things out.

    Args:
        found: Searcher -> its runs, in one field and at one budget.

    Returns:
        A searcher; None where there is nobody but uniform.
    """
    for name in LEARNED:
        if name in found:
            return name
    tried = [name for name in found if name not in SIMPLE]
    if tried:
        return max(tried, key=lambda name: mean_score(found[name]))
    others = [name for name in found if name != "uniform"]
    return max(others, key=lambda name: mean_score(found[name])) if others else None


def _against(subject: str, found: dict[str, list[Scored]], about: str, examples: int | None) -> Iterator[Sentence]:
    """Against uniform; against the best of the allocators that need no evaluation; against the best rival of all."""
    ours = [row.score for row in found[subject]]
    told = {subject}
    if "uniform" in found:
        told.add("uniform")
        yield _compare(subject, "uniform", ours, found, about, examples)
    simple = [name for name in found if name in SIMPLE and name not in told]
    rivals = [name for name in found if name not in told and name not in SIMPLE and name not in LEARNED]
    for names in (simple, rivals):
        if names:
            yield _compare(subject, max(names, key=lambda name: mean_score(found[name])), ours, found, about, examples)


def _compare(
    subject: str, rival: str, ours: Sequence[float], found: dict[str, list[Scored]], about: str, examples: int | None
) -> Sentence:
    theirs = [row.score for row in found[rival]]
    gap = difference(ours, theirs, examples)
    who = _the(subject)
    figures = f"{percent(fmean(ours))} against {percent(fmean(theirs))} ({gap})"
    several = f", means of {len(ours)} and {len(theirs)} runs" if max(len(ours), len(theirs)) > 1 else ""
    if gap.tone == "good":
        return Sentence("good", about, f"{who} is better than {rival}: {figures}{several}.")
    if gap.tone == "bad":
        return Sentence("bad", about, f"{who} is worse than {rival}: {figures}{several}. Use {rival} here.")
    if gap.margin is None:
        text = f"{who} is not shown to be better than {rival}: {figures}. Nothing tells how much of that is chance."
        return Sentence("even", about, text)
    enough = f"{rival} is enough here" if rival in SIMPLE else "the two cannot be told apart here"
    return Sentence("even", about, f"{who} is not better than {rival}: {figures}{several}; {enough}.")


def _the(searcher: str) -> str:
    return f"The plan of {'the ' if searcher in ('policy', 'agent') else ''}{searcher}"


def _flattery(
    subject: str, rows: Sequence[Scored], about: str, where: Field, examples: int | None
) -> Iterator[Sentence]:
    """Whether a search scores higher on the images it saw than on others."""
    if where.stage != "after_recovery" or any(row.reward_score is None for row in rows):
        return
    reward = fmean(row.reward_score for row in rows if row.reward_score is not None)
    score = mean_score(rows)
    seen = min((row.reward_examples or 0) for row in rows)
    if not seen or not examples:
        return
    margin = _STANDARD_ERRORS * math.sqrt(reward * (1 - reward) / seen + score * (1 - score) / examples)
    if reward - score > margin:
        text = (
            f"{_the(subject)} scores {percent(reward)} on the {seen:,} images of the search and {percent(score)} on "
            f"others: the search has fitted its images. Quote the second."
        )
        yield Sentence("note", about, text)


def _about_speed(run: Run, result: Record) -> Iterator[Sentence]:
    """Whether it is faster, and how much of what the MACs promise."""
    fewer = result["macs"]["before"] / max(result["macs"]["after"], 1)
    for row in result.get("latency", ()):
        about = f"{result['network']} at {result['budget']}, latency in {row['backend']}"
        ratio = row.get("speed_up")
        if ratio is None:
            yield Sentence("note", about, str(row["sentence"]))
            continue
        tone = speed_tone(row)
        figures = f"{ratio:.2f} times as fast as before ({_milliseconds(row)})"
        despite = f"{figures}, with {fewer:.1f} times fewer MACs"
        if tone == "even":
            yield Sentence("even", about, f"No speed-up beyond the noise: {despite}.")
        elif tone == "bad":
            yield Sentence("bad", about, f"Slower than before: {despite}.")
        else:
            less = ratio - 1 < _PROMISED * (fewer - 1)
            rest = f" {fewer:.1f} times fewer MACs are not {fewer:.1f} times the speed here." if less else ""
            yield Sentence("good", about, f"Faster: {figures}.{rest}")
        if row.get("drift"):
            text = f"The machine drifted while it measured: {drifted(row['drift'])}. Measure again when it is idle."
            yield Sentence("note", about, text)
    yield from _about_latency_budget(run, result)


def speed_tone(row: Record) -> Tone:
    """Whether a network is faster than before: by the interval of the measurement."""
    low, high = row["interval"]
    return "even" if low <= 1 <= high else "good" if low > 1 else "bad"


def _milliseconds(row: Record) -> str:
    before, after = (1e3 * row[side]["median_seconds"] for side in ("before", "after"))
    return f"median {before:.3g} → {after:.3g} ms"


def _about_latency_budget(run: Run, result: Record) -> Iterator[Sentence]:
    """Whether a latency budget holds: when the plan was brought to it, and of the network in the end."""
    kept = result.get("latency_budget")
    if not kept:
        return
    backend = run.config.get("latency_backend", "torch")
    about = f"{result['network']} at {result['budget']}, latency in {backend}"
    yield Sentence("good" if kept["holds"] else "bad", about, str(kept["sentence"]))
    row = next((one for one in result["latency"] if one["backend"] == backend and one.get("speed_up")), None)
    if row is not None and kept["holds"]:
        high, low = (1 / one for one in row["interval"])
        if low > kept["asked"]:
            text = (
                f"Measured once more in the end, the network does not hold the budget: {percent(1 / row['speed_up'])} "
                f"of the latency is left (interval {percent(low)} to {percent(high)}), {percent(kept['asked'])} asked."
            )
            yield Sentence("bad", about, text)


def _about_accuracy(run: Run, result: Record) -> Iterator[Sentence]:
    """What pruning costs, against the unpruned network."""
    scores = result["test_scores"]
    stage = next((one for one in reversed(tuple(WORDS)) if scores.get(one) is not None), None)
    if stage is None:
        return
    gap = difference([scores[stage]], [scores["unpruned"]], run.examples.get("test"))
    about = f"{result['network']} at {result['budget']} by {result['searcher']}, test images"
    figures = f"{percent(scores[stage])} {WORDS[stage]}, {percent(scores['unpruned'])} unpruned ({gap})"
    if gap.tone == "bad":
        yield Sentence("bad", about, f"Pruning costs accuracy: {figures}.")
    elif gap.tone == "good":
        yield Sentence("good", about, f"More accurate than before: {figures}.")
    elif gap.margin is not None:
        yield Sentence("good", about, f"No accuracy lost beyond the noise: {figures}.")
    else:
        yield Sentence("note", about, f"{figures}.")


def _about_finetuning(run: Run, result: Record) -> Sentence:
    """What fine-tuning a saved network gave."""
    scores = result["test_scores"]
    after, before = scores["after_finetuning"], scores["before_finetuning"]
    gap = difference([after], [before], run.examples.get("test"))
    words = {"good": "Fine-tuning helped", "bad": "Fine-tuning did harm"}.get(
        gap.tone, "Fine-tuning changed nothing beyond the noise" if gap.margin is not None else "Fine-tuned"
    )
    about = f"{result['network']}, fine-tuned for {plural(result['epochs'], 'epoch')}, test images"
    return Sentence(gap.tone, about, f"{words}: {percent(before)} before, {percent(after)} after ({gap}).")


def _about_files(result: Record) -> Iterator[Sentence]:
    """How far exported files are from the network they were made of."""
    for one in result["files"]:
        about = f"{result['network']} as {one['format']}"
        text = f"Its outputs differ from the network's by {one['difference']:.1e} at most."
        if one["from_float32"]:
            text += f" {result['dtype']} makes a difference of {one['from_float32']:.1e} by itself."
        yield Sentence("note", about, f"{text} {one['warning']}" if one["warning"] else text)


def _warnings(runs: Sequence[Run]) -> Iterator[Sentence]:
    """What a reader must know before believing a figure."""
    about = "The runs themselves"
    unfinished = [run.label for run in runs if not run.is_finished]
    if unfinished:
        text = f"Not finished: {joined(unfinished)}. Repeat the command with --out and the folder to continue."
        yield Sentence("note", about, text)
    changed = [run.label for run in runs if (run.environment.get("git") or {}).get("dirty")]
    if changed:
        text = f"Made by code that differs from its commit, so that they may not be made again: {joined(changed)}."
        yield Sentence("note", about, text)
