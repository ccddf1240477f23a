"""The parts of the page about what was asked, rivals and learning.

A part that nothing is known about keeps its heading and says in one sentence which command would give it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import fmean

from prunegym.reporting import charts
from prunegym.reporting.charts import Marks
from prunegym.reporting.gather import Run, Training, texts
from prunegym.reporting.page import Block, Folded, Heading, Pictures, Section, Table, Text
from prunegym.reporting.scores import WORDS, Field, Scored, Scores, by_searcher, data_of
from prunegym.reporting.svg import Gallery, Picture
from prunegym.reporting.verdict import difference
from prunegym.reporting.words import amount, duration, option_rows, percent, signed, suggest

#: Searchers that make a chart of rivals worth while.
_RIVALS = 3


def asked(runs: Sequence[Run]) -> Section:
    """What each run was to do, and where it ran."""
    rows = []
    for run in runs:
        config = run.config
        rows.append(
            {
                "run": run.label,
                "network": ", ".join(run.network_names),
                "data": data_of(run) if config.get("data") else "",
                "budget": ", ".join(texts(config.get("budget"))),
                "recovery": _recovery(run),
                "searcher": ", ".join(texts(config.get("searcher"))) or _searcher(run),
                "seed": str(run.asked.get("seed", "")),
                "evaluations": str(config.get("evaluations", "")) if run.command in ("train", "compare") else "",
                "epochs": str(config.get("epochs") or ""),
                "state": "finished" if run.is_finished else "not finished",
            }
        )
    details = [Folded(f"Options, versions and machine of {run.label}", list(_details(run))) for run in runs]
    return Section("asked", "What was asked", [Table.of(rows), *details])


def _searcher(run: Run) -> str:
    """Who searched; commands that search nothing are put down under their own name."""
    name = str(run.asked.get("searcher") or "")
    return "" if name == run.command else name


def _recovery(run: Run) -> str:
    """What was to follow pruning, by default what suits the epochs after it; nothing where plans are not scored."""
    asked = str(run.config.get("recovery", ""))
    return asked if asked != "auto" else "compensate" if run.config.get("epochs") else "reconstruct"


def _details(run: Run) -> Iterator[Block]:
    """Every option, and where it ran."""
    env = run.environment
    if env:
        git = env.get("git") or {}
        machine = {
            "started": env.get("started"),
            "machine": f"{env.get('cpu')}, {env.get('cpu_count')} cores, {env.get('threads')} threads of PyTorch",
            "device": env.get("device_name") or env.get("device"),
            "system": env.get("platform"),
            "commit": git.get("commit") and f"{git['commit'][:12]}{' with changes' if git.get('dirty') else ''}",
            "versions": ", ".join(f"{name} {one}" for name, one in (env.get("versions") or {}).items() if one),
        }
        yield Table.of([{"where": name, "value": str(value)} for name, value in machine.items() if value])
        if env.get("command"):
            yield Text("Typed:", str(env["command"]))
    yield Table.of(option_rows(run.config))


def front(runs: Sequence[Run], scores: Scores, marks: Marks, gallery: Gallery) -> Section:
    """Accuracy against cost, with all rivals that were run."""
    blocks: list[Block] = []
    for where, rows in scores.fields.items():
        if len({(row.searcher, row.budget) for row in rows}) > 1:
            blocks += [Heading(where.title), *_field_blocks(where, rows, scores, marks, gallery)]
    if not blocks:
        text = "No plans were put beside each other. Rivals at equal evaluations, with seeds and intervals, come from"
        blocks.append(Text(text, suggest(runs, "compare", "--latency")))
    elif not any(row.latency_ratio for row in scores.rows):
        text = "Accuracy against measured latency is missing: no plan's latency was measured. It comes from"
        blocks.append(Text(text, suggest(runs, "compare", "--latency")))
    introduction = (
        "Only scores on the same images, at the same stage, stand in one picture. Marks are means over runs, with the "
        "range of the runs. Searchers with a star score no plan while they search."
    )
    return Section("front", "Accuracy against cost", blocks, introduction if len(blocks) > 1 else "")


def _field_blocks(
    where: Field, rows: Sequence[Scored], scores: Scores, marks: Marks, gallery: Gallery
) -> Iterator[Block]:
    yield Pictures(list(_field_pictures(where, rows, scores, marks, gallery)))
    caption = (
        "Over uniform: points, with the noise that a difference must exceed. Reward: the same plans on the images of "
        "the search. Cost, latency: shares of the unpruned network's that are left."
    )
    yield Table.of(list(_score_rows(where, rows, scores)), caption)


def _field_pictures(
    where: Field, rows: Sequence[Scored], scores: Scores, marks: Marks, gallery: Gallery
) -> Iterator[Picture]:
    unpruned = scores.unpruned_score(where)
    start = None if unpruned is None else (1.0, unpruned)
    about = f"{where.network}-{where.stage}-{where.split}"
    priced = [(row, share) for row in rows if (share := _macs_share(row, scores)) is not None]
    if len({(row.searcher, row.budget) for row, _ in priced}) > 1:
        yield gallery.add(
            f"front-macs-{about}",
            lambda: charts.pareto(priced, start, marks, "MACs kept, %"),
            f"Accuracy {WORDS[where.stage]} against the MACs that are left.",
        )
    measured = [(row, row.latency_ratio) for row in rows if row.latency_ratio is not None]
    for conditions in dict.fromkeys(row.latency_of for row, _ in measured):
        some = [(row, share) for row, share in measured if row.latency_of == conditions]
        if len({(row.searcher, row.budget) for row, _ in some}) > 1:
            yield gallery.add(
                f"front-latency-{about}",
                lambda some=some: charts.pareto(some, start, marks, "measured latency kept, %"),  # type: ignore[misc]
                f"Accuracy {WORDS[where.stage]} against the measured latency that is left"
                f"{f' ({conditions})' if conditions else ''}.",
            )
    for budget in dict.fromkeys(row.budget for row in rows):
        found = by_searcher(rows, budget)
        if len(found) >= _RIVALS:
            lines = "dotted: uniform" if "uniform" in found else ""
            yield gallery.add(
                f"rivals-{about}-{budget}",
                lambda found=found: charts.rivals(found, unpruned, marks),  # type: ignore[misc]
                f"All that were run at {budget}, best first{f' ({lines})' if lines else ''}.",
            )


def _macs_share(row: Scored, scores: Scores) -> float | None:
    """Share of the unpruned network's MACs."""
    known = scores.unpruned.get(row.where.network)
    if row.macs is not None and known is not None and known.macs:
        return row.macs / known.macs
    return row.cost if row.budget.startswith("macs:") else None


def _score_rows(where: Field, rows: Sequence[Scored], scores: Scores) -> Iterator[dict[str, str]]:
    examples = scores.examples(where)
    unpruned = scores.unpruned_score(where)
    if unpruned is not None:
        known = scores.unpruned[where.network]
        cells = {"budget": "", "searcher": "unpruned", "runs": "", "accuracy, %": f"{100 * unpruned:.2f}"}
        cells |= dict.fromkeys(("over uniform", "reward, %", "cost"), "")
        yield {**cells, "MACs": amount(known.macs), "parameters": amount(known.parameters)}
    for budget in dict.fromkeys(row.budget for row in rows):
        found = by_searcher(rows, budget)
        for name, some in found.items():
            values = [row.score for row in some]
            spread = f" ({100 * min(values):.1f}–{100 * max(values):.1f})" if len(set(values)) > 1 else ""
            ratios = [row.latency_ratio for row in some if row.latency_ratio is not None]
            reward = [row.reward_score for row in some if row.reward_score is not None]
            beside = found.get("uniform") if name != "uniform" else None
            gap = difference(values, [row.score for row in beside], examples) if beside else None
            noise = "" if gap is None or gap.margin is None else f" ±{100 * gap.margin:.1f}"
            yield {
                "budget": budget,
                "searcher": name,
                "runs": str(len(some)),
                "accuracy, %": f"{100 * fmean(values):.2f}{spread}",
                "over uniform": "" if gap is None else f"{signed(100 * gap.value)}{noise}",
                "reward, %": f"{100 * fmean(reward):.2f}" if reward and where.stage == "after_recovery" else "",
                "cost": percent(some[0].cost),
                "MACs": amount(some[0].macs),
                "parameters": amount(some[0].parameters),
                "latency": percent(fmean(ratios)) if ratios else "",
                "evaluations": "" if some[0].evaluations is None else str(max(row.evaluations or 0 for row in some)),
                "took": duration(fmean([row.seconds or 0.0 for row in some])),
            }


def learning(runs: Sequence[Run], marks: Marks, gallery: Gallery) -> Section:
    """Learning curves of agents, and what every search of a comparison had after how many evaluations."""
    blocks: list[Block] = []
    groups: dict[tuple[str, str, str], list[tuple[Run, Training]]] = {}
    for run in runs:
        for one in run.trainings:
            groups.setdefault((run.command, one.network, one.budget), []).append((run, one))
    pictures = [_curve(key, some, gallery) for key, some in groups.items()]
    if pictures:
        blocks.append(Pictures(pictures))
    else:
        text = "No agent was trained in these runs. A learning curve comes from"
        blocks.append(Text(text, suggest(runs, "train")))
    for run in runs:
        if run.command == "compare" and run.curves:
            blocks += [Heading(f"Searches of {run.label} over time"), Pictures(list(_searches(run, marks, gallery)))]
    return Section("learning", "Learning", blocks)


def _curve(key: tuple[str, str, str], some: Sequence[tuple[Run, Training]], gallery: Gallery) -> Picture:
    command, network, budget = key
    runs = [run for run, _ in some]
    seeds = sorted({one.seed for _, one in some})
    count = f"{len(some)} trainings" if len(some) > 1 else f"seed {seeds[0]}"
    return gallery.add(
        f"learning-{command}-{network}-{budget}",
        lambda: charts.learning_curve([one for _, one in some], _references(runs)),
        f"{network} at {budget}, {command}, {count}: accuracy on the reward images, which the search sees.",
    )


def _references(runs: Sequence[Run]) -> dict[str, float]:
    """Reward scores of uniform and knapsack, the mean over budgets, as the curves are."""
    found: dict[str, list[float]] = {}
    for run in runs:
        for row in run.rows if run.command == "train" else ():
            if row["searcher"] in ("uniform", "knapsack") and row.get("reward_score") is not None:
                found.setdefault(row["searcher"], []).append(row["reward_score"])
    return {name: fmean(values) for name, values in found.items()}


def _searches(run: Run, marks: Marks, gallery: Gallery) -> Iterator[Picture]:
    pairs = list(dict.fromkeys((str(row["network"]), str(row["budget"])) for row in run.rows))
    searchers = list(dict.fromkeys(str(row["searcher"]) for row in run.rows))
    for pair in pairs:
        curves = [row for row in run.curves if (row["network"], row["budget"]) == pair]
        present = [name for name in searchers if any(row["searcher"] == name for row in curves)]
        rows = [row for row in run.rows if (row["network"], row["budget"]) == pair and row["searcher"] in present]
        seeds = {name: {row["seed"] for row in rows if row["searcher"] == name} for name in present}
        # a comparison that is not finished lacks the runs of some searchers
        whole = [name for name in present if seeds[name] == set().union(*seeds.values())]
        rows = [row for row in rows if row["searcher"] in whole]
        if rows:
            yield gallery.add(
                f"searches-{'-'.join(pair)}",
                lambda rows=rows, curves=curves, whole=whole, pair=pair: charts.anytime(  # type: ignore[misc]
                    rows, curves, whole, pair, marks
                ),
                f"{pair[0]} at {pair[1]}: what each search would have returned, had it been stopped; accuracy after "
                "recovery on the selection images, with the range over seeds.",
            )
