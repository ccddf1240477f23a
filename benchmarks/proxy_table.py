"""From the rows of `proxy.py` to its tables: how much there is to win, how noisy it is, and which proxy ranks well.

Every figure is about the allocations whose pieces are all there, so that the tables can be written at any time.
"""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import kendalltau
from sklearn.linear_model import RidgeCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from prunegym.agents.tables import markdown_table
from prunegym.pruning.files import replacing

Row = Mapping[str, str]
Array = NDArray[np.float64]

RESAMPLES = 1000
LEVEL = 0.95
_FEWEST = 4
"""Allocations below which nothing can be ranked."""
_EDGE = 0.01
RECOVERED = "accuracy, compensated and recalibrated"
"""The score of the post-training regime: what training steps cost is spent for what they rank better than this."""
#: Readings of a row as a proxy, higher is better: what it is called by measure, and what is read.
_READINGS = {
    "pruned": "right after pruning",
    "recalibrated": "batch norm recalibrated",
    "compensated": "compensated and recalibrated",
}


@dataclass(frozen=True)
class Study:
    """The allocations of one network, budget and setup for which every piece is there.

    Args:
        target: Accuracy after fine-tuning with the first seed ``(allocations,)``.
        repeats: For each allocation that was fine-tuned with several seeds, its accuracies.
        proxies: Name -> values ``(allocations,)``, higher should be better.
        seconds: Name -> mean seconds per allocation.
    """

    network: str
    budget: str
    setup: str
    epochs: str
    target: Array
    repeats: list[list[float]]
    proxies: dict[str, Array]
    seconds: dict[str, float]

    @property
    def noise(self) -> float | None:
        """Standard deviation between fine-tuning seeds of one allocation, pooled; None without repeats."""
        if not self.repeats:
            return None
        squares = sum(float(np.var(one, ddof=1)) * (len(one) - 1) for one in self.repeats)
        return float(np.sqrt(squares / sum(len(one) - 1 for one in self.repeats)))


def write_tables(rows: Sequence[Row], folder: Path, name: str) -> str:
    """Write the taus as CSV and all figures as Markdown.

    Args:
        rows: Rows of `proxy.py`.
        folder: Where to.
        name: Of the tables: ``{name}_taus.csv`` and ``{name}.md``.

    Returns:
        The Markdown.
    """
    studies = [(study, tau_rows(study)) for study in studies_of(rows)]
    taus = [tau for _, found in studies for tau in found]
    text = "\n\n".join(["# Which reward", *(section(study, found) for study, found in studies)]) + "\n"
    if taus:
        with replacing(folder / f"{name}_taus.csv") as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=list(taus[0]))
            writer.writeheader()
            writer.writerows(taus)
        with replacing(folder / f"{name}.md") as temporary:
            temporary.write_text(text, encoding="utf-8")
    return text


def studies_of(rows: Sequence[Row]) -> list[Study]:
    """One study for each network, budget and setup with enough whole allocations."""
    found = []
    for key in dict.fromkeys((row["network"], row["budget"], row["setup"]) for row in rows):
        mine = [row for row in rows if (row["network"], row["budget"], row["setup"]) == key]
        study = _study(key, mine)
        if study is not None:
            found.append(study)
    return found


def _study(key: tuple[str, str, str], rows: Sequence[Row]) -> Study | None:
    pieces: dict[str, dict[tuple[str, str], Row]] = {}
    for row in rows:
        pieces.setdefault(row["counts"], {})[row["measure"], row["seed"]] = row
    first = [measure for measure in dict.fromkeys(row["measure"] for row in rows)]
    whole = [one for one in pieces.values() if all((measure, "0") in one for measure in first)]
    if len(whole) < _FEWEST or "finetuned" not in first:
        return None
    values = {
        (measure, reading): np.array([float(one[measure, "0"][reading]) for one in whole])
        for measure in first
        for reading in ("score", "loss", "seconds")
    }
    proxies, seconds = {}, {}
    for measure in (one for one in first if one != "finetuned"):
        for name, value in _read(measure, values[measure, "score"], values[measure, "loss"]).items():
            proxies[name] = value
            seconds[name] = float(values[measure, "seconds"].mean())
    target = values["finetuned", "score"]
    keep = np.array([[float(ratio) for ratio in one["finetuned", "0"]["keep"].split()] for one in whole])
    proxies["regression on the allocation"] = leave_one_out(keep, target)
    tuned = [[float(row["score"]) for (measure, _), row in one.items() if measure == "finetuned"] for one in whole]
    return Study(
        *key,
        epochs=whole[0]["finetuned", "0"]["epochs"],
        target=target,
        repeats=[one for one in tuned if len(one) > 1],
        proxies=proxies,
        seconds={**seconds, "fine-tuning": float(values["finetuned", "seconds"].mean())},
    )


def _read(measure: str, score: Array, loss: Array) -> dict[str, Array]:
    """The two proxies that a measure gives, higher is better."""
    if measure == "importance":
        return {"Taylor importance kept": score, "squared Taylor importance kept": 1 - loss}
    name = _READINGS.get(measure) or f"after {measure.removeprefix('steps ')} training steps"
    return {f"accuracy, {name}": score, f"loss, {name}": -loss}


def leave_one_out(keep: Array, target: Array) -> Array:
    """What a ridge regression on the other allocations says of each.

    The features are the logits of the keep ratios. Only their contribution is predicted, not the mean of the others:
    that mean is the lower the better the one left out, and would rank the allocations backwards on its own.

    Args:
        keep: Keep ratios ``(allocations, groups)``.
        target: ``(allocations,)``.

    Returns:
        Predictions ``(allocations,)``, up to a constant.
    """
    inner = np.clip(keep, _EDGE, 1 - _EDGE)
    features = np.log(inner / (1 - inner))
    predicted = np.empty(len(target))
    for index in range(len(target)):
        others = np.arange(len(target)) != index
        model = make_pipeline(StandardScaler(), RidgeCV(alphas=np.logspace(-2, 4, 13)))
        model.fit(features[others], target[others])
        predicted[index] = model.predict(features[[index]])[0] - target[others].mean()
    return predicted


def tau_rows(study: Study) -> list[dict[str, Any]]:
    """Kendall's tau of every proxy with its bootstrap interval, over all allocations and the better half.

    Beside it what it is above that of :data:`RECOVERED`, paired: on the same resampled allocations.
    """
    top = np.argsort(-study.target, kind="stable")[: max(_FEWEST, (len(study.target) + 1) // 2)]
    rows = []
    for name, values in study.proxies.items():
        tau, low, high = tau_interval(values, study.target)
        top_tau, top_low, top_high = tau_interval(values[top], study.target[top])
        others = study.proxies.get(RECOVERED)
        gain = (None,) * 3 if others is None else tau_gain(values, others, study.target)
        rows.append(
            {
                "network": study.network,
                "budget": study.budget,
                "epochs": study.epochs,
                "setup": study.setup,
                "proxy": name,
                "allocations": len(study.target),
                "tau": tau,
                "low": low,
                "high": high,
                "top_tau": top_tau,
                "top_low": top_low,
                "top_high": top_high,
                **dict(zip(("gain", "gain_low", "gain_high"), gain, strict=True)),
                "seconds": study.seconds.get(name),
            }
        )
    return rows


def tau_interval(values: Array, target: Array, *, seed: int = 0) -> tuple[float, float, float]:
    """Kendall's tau-b of two rankings, with a percentile bootstrap interval over what is ranked.

    A constant ranks nothing: its tau is taken to be 0.
    """
    low, high = _quantiles(weighted_taus(values, target, _drawn(len(target), seed)))
    return _tau(values, target), low, high


def tau_gain(values: Array, others: Array, target: Array, *, seed: int = 0) -> tuple[float, float, float]:
    """What tau of ``values`` with the target is above that of ``others``, with a paired bootstrap interval."""
    drawn = _drawn(len(target), seed)
    low, high = _quantiles(weighted_taus(values, target, drawn) - weighted_taus(others, target, drawn))
    return _tau(values, target) - _tau(others, target), low, high


def _tau(values: Array, target: Array) -> float:
    return float(kendalltau(values, target).statistic) if np.ptp(values) > 0 and np.ptp(target) > 0 else 0.0


def _drawn(count: int, seed: int) -> NDArray[np.int64]:
    """How often each is drawn in each sample ``(samples, count)``."""
    return np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=RESAMPLES)


def _quantiles(sampled: Array) -> tuple[float, float]:
    low, high = np.quantile(sampled, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)).tolist()
    return low, high


def weighted_taus(values: Array, target: Array, counts: NDArray[np.int64]) -> Array:
    """Kendall's tau-b where what is ranked occurs several times, for many such samples at once.

    Args:
        values: ``(n,)``.
        target: ``(n,)``.
        counts: How often each occurs in each sample ``(samples, n)``.

    Returns:
        ``(samples,)``; 0 where all values of a sample, or all targets, are equal.
    """
    first, second = (np.sign(one[:, None] - one) for one in (values, target))
    concordance, untied, others = (
        ((counts @ matrix) * counts).sum(axis=1) for matrix in (first * second, np.abs(first), np.abs(second))
    )
    taus: Array = concordance / np.sqrt(np.maximum(untied * others, 1))
    return taus


def section(study: Study, taus: Sequence[Mapping[str, Any]]) -> str:
    """Spread, noise, and the table of proxies, from :func:`tau_rows`."""
    target = 100 * study.target
    spread = (
        f"After fine-tuning for {study.epochs} epochs, {len(target)} allocations of equal cost reach "
        f"{target.min():.2f} to {target.max():.2f} % on the selection split: a spread of {np.ptp(target):.2f} points, "
        f"standard deviation {target.std(ddof=1):.2f}."
    )
    noise = "Between fine-tuning seeds: not measured."
    if study.noise is not None:
        share = min(1.0, (100 * study.noise) ** 2 / max(float(target.var(ddof=1)), 1e-12))
        noise = (
            f"Between fine-tuning seeds of one allocation: standard deviation {100 * study.noise:.2f} "
            f"({len(study.repeats)} allocations), {share:.0%} of the variance."
        )
    lines = [
        {
            "proxy": row["proxy"],
            "Kendall's tau": f"{row['tau']:.2f} ({row['low']:.2f} to {row['high']:.2f})",
            "among the better half": f"{row['top_tau']:.2f} ({row['top_low']:.2f} to {row['top_high']:.2f})",
            "minus recovery": ""
            if row["proxy"] == RECOVERED or row["gain"] is None
            else f"{row['gain']:+.2f} ({row['gain_low']:+.2f} to {row['gain_high']:+.2f})",
            "seconds per plan": "" if row["seconds"] is None else f"{row['seconds']:.3g}",
        }
        for row in sorted(taus, key=lambda row: -float(row["tau"]))
    ]
    return "\n\n".join(
        [
            f"## {study.network}, {study.budget} (setup {study.setup})",
            f"{spread} {noise} Fine-tuning takes {study.seconds['fine-tuning']:.3g} seconds per plan.",
            f"Intervals: {LEVEL:.0%} percentile bootstrap over allocations. Differences are to "
            f"\"{RECOVERED}\", paired.",
            markdown_table(lines),
        ]
    )
