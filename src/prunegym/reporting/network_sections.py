"""The parts of the page about the networks: kept channels, the channel graph with attention, and where time goes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prunegym.reporting import graph_chart, network_charts
from prunegym.reporting.charts import Marks
from prunegym.reporting.gather import Record, Run
from prunegym.reporting.graph_chart import Column, layers_between
from prunegym.reporting.page import Block, Folded, Heading, Pictures, Section, Table, Text
from prunegym.reporting.scores import LEARNED
from prunegym.reporting.svg import Gallery, Picture
from prunegym.reporting.words import milliseconds, percent, suggest

#: Plans that fit into one chart.
_MOST_PLANS = 4
#: Networks and budgets that are shown unfolded.
_SHOWN = 2
_ORDER = (*LEARNED, "uniform", "knapsack")

Counts = Mapping[str, int]


def channels(runs: Sequence[Run], marks: Marks, gallery: Gallery) -> Section:
    """Channels of each group before and after."""
    sizes = group_sizes(runs)
    blocks: list[Block] = []
    pictures = []
    for (network, budget), plans in kept_by(runs).items():
        if network in sizes:
            order = sorted(plans, key=lambda name: (_ORDER.index(name) if name in _ORDER else len(_ORDER), name))
            chosen = {name: plans[name] for name in order[:_MOST_PLANS]}
            pictures.append(_kept_picture(network, budget, sizes[network], chosen, marks, gallery))
    if pictures:
        blocks.append(Pictures(pictures))
    else:
        text = "The runs hold no plans with the widths before. They come from"
        blocks.append(Text(text, suggest(runs, "evaluate", *_policy(runs))))
    introduction = "A group is coupled channels that can only go together. Bars are of the plan that is named first."
    return Section("channels", "Kept channels", blocks, introduction if pictures else "")


def _kept_picture(
    network: str, budget: str, sizes: Counts, plans: Mapping[str, Counts], marks: Marks, gallery: Gallery
) -> Picture:
    return gallery.add(
        f"channels-{network}-{budget}",
        lambda: network_charts.kept_channels(sizes, plans, marks),
        f"{network} at {budget}: channels kept in each group, by {', '.join(plans)}.",
    )


def group_sizes(runs: Sequence[Run]) -> dict[str, dict[str, int]]:
    """Channels of each group before pruning, by network."""
    found: dict[str, dict[str, int]] = {}
    for run in runs:
        for record in run.networks:
            found.setdefault(record["network"], {one["name"]: one["channels"] for one in record["groups"]})
        if result := run.came_to("prune"):
            found.setdefault(result["network"], {name: one["before"] for name, one in result["channels"].items()})
    return found


def kept_by(runs: Sequence[Run]) -> dict[tuple[str, str], dict[str, dict[str, int]]]:
    """Channels that each searcher's plan keeps, by network and budget; of the same searcher the first run's."""
    found: dict[tuple[str, str], dict[str, dict[str, int]]] = {}
    for run in runs:
        if result := run.came_to("prune"):
            kept = {name: one["after"] for name, one in result["channels"].items()}
            found.setdefault((result["network"], result["budget"]), {}).setdefault(result["searcher"], kept)
        for searcher, plans in run.plans.items():
            for name, plan in plans.items():
                network, _, budget = name.rpartition(" ")
                kept = {group: len(indices) for group, indices in plan["kept"].items()}
                found.setdefault((network, budget), {}).setdefault(searcher, kept)
    return found


def graph(runs: Sequence[Run], gallery: Gallery) -> Section:
    """The channel graph of each network, with what the policy looks at."""
    records = {record["network"]: record for run in reversed(runs) for record in run.networks}
    attention = {(one["network"], one["budget"]): one for run in reversed(runs) for one in run.attention}
    kept = kept_by(runs)
    parts: list[tuple[str, list[Block]]] = []
    for network, record in records.items():
        seen: list[Record | None] = [one for (name, _), one in attention.items() if name == network]
        for one in seen or [None]:
            title = f"{network} at {one['budget']}" if one is not None else network
            parts.append((title, list(_graph_blocks(record, one, kept, gallery))))
    blocks: list[Block] = []
    for title, inner in parts[:_SHOWN]:
        blocks += [Heading(title), *inner]
    blocks += [Folded(title, inner) for title, inner in parts[_SHOWN:]]
    if not records:
        text = "The runs do not hold the channel graph. It comes from"
        blocks.append(Text(text, suggest(runs, "evaluate", *_policy(runs))))
    elif not attention:
        blocks.append(Text("No policy was used, so there is no attention. It comes from", suggest(runs, "train")))
    introduction = (
        "Groups are rows, in the order in which the network makes them. An arc to the right is a layer that reads one "
        "group and makes another; dashed ones lead back up, through a shortcut. "
    )
    looked = (
        "The thicker an arc, the more the channels of the two groups listen to each other in the policy's graph "
        "attention (GAT). Arcs to the left lead from each group to the two that the transformer looks at most from "
        "there, which have a dot. Both are what the policy sees before its first cut; attention tells where it looks, "
        "not why it decides."
    )
    return Section("graph", "Channel graph and attention", blocks, introduction + (looked if attention else ""))


def _graph_blocks(
    record: Record,
    seen: Record | None,
    kept: Mapping[tuple[str, str], Mapping[str, Counts]],
    gallery: Gallery,
) -> Iterator[Block]:
    groups = record["groups"]
    names = [group["name"] for group in groups]
    layers = layers_between(groups)
    if seen is None or seen["groups"] != names:
        picture = gallery.add(
            f"graph-{record['network']}",
            lambda: graph_chart.channel_graph(names, layers, cost_columns(groups)),
            f"{record['network']}: channel groups with their channels, and the share of all MACs that pruning each "
            "alone can save.",
        )
        yield Pictures([picture])
        return
    between, links = np.asarray(seen["between"]), np.asarray(seen["links"])
    received = between.mean(axis=0)[1:]
    columns = [Column("is looked at", received / max(received.max(), 1e-9), [percent(one) for one in received])]
    plans = kept.get((seen["network"], seen["budget"]), {})
    name = next((one for one in _ORDER if one in plans), next(iter(plans), None))
    if name is not None:
        left = [plans[name].get(group["name"], group["channels"]) for group in groups]
        shares = [count / max(group["channels"], 1) for count, group in zip(left, groups, strict=True)]
        texts = [f"{count} of {group['channels']}" for count, group in zip(left, groups, strict=True)]
        columns.insert(0, Column("kept", shares, texts))
    about = f"{record['network']} at {seen['budget']}"
    yield Pictures(
        [
            gallery.add(
                f"graph-{record['network']}-{seen['budget']}",
                lambda: graph_chart.channel_graph(names, layers, columns, links=links, between=between[1:, 1:]),
                f"{about}: channel groups{f', what the plan of {name} keeps' if name else ''}, and attention.",
            ),
            gallery.add(
                f"attention-{record['network']}-{seen['budget']}",
                lambda: graph_chart.attention_matrix(names, between),
                f"{about}: attention between groups in the transformer. A row is a group that looks; the darkest "
                f"square is {percent(float(between.max()), 0)} of its attention.",
            ),
        ]
    )


def cost_columns(groups: Sequence[Record]) -> list[Column]:
    """Channels, and what pruning a group alone can save; frozen groups save nothing."""
    widest = max((np.log2(max(group["channels"], 1)) for group in groups), default=1.0)
    most = max((group.get("macs_share", 0.0) for group in groups), default=1.0)
    return [
        Column(
            "channels",
            [float(np.log2(max(group["channels"], 1)) / max(widest, 1.0)) for group in groups],
            [str(group["channels"]) for group in groups],
        ),
        Column(
            "MACs",
            [group["macs_share"] / max(most, 1e-9) if "macs_share" in group else None for group in groups],
            [percent(group["macs_share"]) if "macs_share" in group else "frozen" for group in groups],
        ),
    ]


def time(runs: Sequence[Run], gallery: Gallery) -> Section:
    """Where the time of the networks goes, before and after."""
    blocks: list[Block] = []
    for run in runs:
        result = run.came_to("prune")
        if times := result.get("module_times"):
            title = f"{result['network']} pruned to {result['budget']} by {result['searcher']}"
            blocks += [Heading(title), *_time_blocks(title, times, gallery)]
    if not blocks:
        text = "No network was timed module by module. It comes from"
        return Section("time", "Where the time goes", [Text(text, suggest(runs, "prune"))])
    introduction = (
        "Measured in PyTorch, module by module, both networks in turn; medians. A module's time is its own, without "
        "modules inside it. Reading the clock slows each module by some microseconds, so sums are longer than the "
        "latency above."
    )
    return Section("time", "Where the time goes", blocks, introduction)


def _time_blocks(title: str, times: Record, gallery: Gallery) -> Iterator[Block]:
    before, after = times["before"], times["after"]
    yield Pictures(
        [
            gallery.add(
                f"time-{title}",
                lambda: network_charts.time_by_kind(before, after),
                "Time of a run by kind of module, before and after.",
            ),
            gallery.add(
                f"slowest-{title}",
                lambda: network_charts.slowest_layers(before, after),
                "The modules that took longest before, and what they take now.",
            ),
        ]
    )
    kinds = {kind: (before["kinds"].get(kind, 0.0), after["kinds"].get(kind, 0.0)) for kind in before["kinds"]}
    yield Table.of(
        [
            {
                "kind": kind,
                "before": milliseconds(was),
                "after": milliseconds(now),
                "left": percent(now / was, 0) if was else "",
            }
            for kind, (was, now) in kinds.items()
        ]
    )


def _policy(runs: Sequence[Run]) -> list[str]:
    """A policy file that is there, as a flag."""
    for run in runs:
        path = run.folder / "policy.safetensors"
        if path.is_file():
            return ["--policy", str(path)]
    return []
