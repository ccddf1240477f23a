"""The page of ``prunegym inspect --html``: one network before anything is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import metadata

from prunegym.reporting.gather import Record
from prunegym.reporting.graph_chart import channel_graph, layers_between
from prunegym.reporting.network_sections import cost_columns
from prunegym.reporting.page import Block, Card, Headline, Page, Pictures, Section, Table, Text
from prunegym.reporting.svg import Gallery
from prunegym.reporting.words import amount, joined, milliseconds, percent, plural

#: Layers and groups that are named in a cell.
_NAMED = 3


def inspection_page(content: Record, gallery: Gallery | None = None) -> Page:
    """The channel graph of a network, its costs, and what is frozen and why.

    Args:
        content: As of :meth:`prunegym.agents.inspect.Inspection.to_json`.
        gallery: Makes the picture.
    """
    gallery = gallery or Gallery()
    sections = [_graph(content, gallery), _groups(content), _frozen(content)]
    if content["blocks"]:
        sections.append(_blocks(content))
    if content["unknown_operations"]:
        rows = [{"operation": name, "where": path} for name, path in content["unknown_operations"].items()]
        text = "What passes through these is frozen."
        sections.append(Section("unknown", "Operations without a rule", [Table.of(rows)], text))
    groups, frozen = len(content["groups"]), len(content["frozen"])
    return Page(
        title=f"Channel graph of {content['network']}",
        subtitle=(
            f"{plural(groups, 'group')} of coupled channels can be pruned, {plural(frozen, 'group')} cannot. Channels "
            "of a group can only be removed together."
        ),
        headlines=[Headline("The network as it is", list(_cards(content)))],
        sections=sections,
        footer=f"Made by prunegym {metadata.version('prunegym')}; it loads nothing.",
    )


def _cards(content: Record) -> Iterator[Card]:
    reachable = content["reachable"]
    yield Card("MACs", amount(content["macs"]), f"for one example; down to {percent(reachable['macs'])}")
    yield Card("parameters", amount(content["parameters"]), f"down to {percent(reachable['params'])}")
    memory = content["memory"]
    where = memory["module"] or "the network"
    yield Card("peak memory", f"{memory['bytes'] / 2**20:.3g} MiB", f"of activations, in {where}")
    if content.get("latency_seconds"):
        least = f"down to {percent(reachable['latency'])}" if "latency" in reachable else ""
        origin = "measured" if content.get("latency_measured") else "predicted"
        yield Card("latency", milliseconds(content["latency_seconds"]), f"{origin}, unpruned; {least}")
    channels = sum(group["channels"] for group in content["groups"])
    yield Card("prunable groups", str(len(content["groups"])), f"{channels:,} channels")
    if content["blocks"]:
        yield Card("residual blocks", str(len(content["blocks"])), "can be left out")


def _graph(content: Record, gallery: Gallery) -> Section:
    order = {layer: place for place, layer in enumerate(content["layers"])}
    groups = sorted(
        [*content["groups"], *(group for group in content["frozen"] if group["made_by"])],
        key=lambda group: min((order[layer] for layer in group["made_by"] if layer in order), default=len(order)),
    )
    frozen = [index for index, group in enumerate(groups) if "reason" in group]
    names = [group["name"] for group in groups]
    picture = gallery.add(
        f"graph-{content['network']}",
        lambda: channel_graph(names, layers_between(groups), cost_columns(groups), frozen=frozen),
        "Channels of each group, and the share of all MACs that pruning the group alone can save.",
    )
    text = (
        "Groups are rows, in the order in which the network makes them, named after the layer that first makes them; "
        "frozen ones are grey. "
        "An arc is a layer that reads one group and makes another, thicker where there are several; dashed ones lead "
        "back up, through a shortcut."
    )
    return Section("graph", "Channel graph", [Pictures([picture])], text)


def _groups(content: Record) -> Section:
    rows = []
    for group in content["groups"]:
        step = f" by {group['step']}" if group["step"] > 1 else ""
        rows.append(
            {
                "group": group["name"],
                "channels": str(group["channels"]),
                "may keep": f"{group['smallest']} to {group['largest']}{step}",
                "MACs": percent(group["macs_share"], 2),
                "parameters": percent(group["parameters_share"], 2),
                "made by": joined(group["made_by"], _NAMED),
                "read by": joined(group["read_by"], _NAMED),
                **({} if group["kept"] is None else {"kept": str(group["kept"])}),
            }
        )
    text = (
        "Layers that make the channels of one group are coupled: their outputs are added, or one works on the other's "
        "channel by channel. MACs and parameters: the share of the network's that pruning this group alone can save."
    )
    if content.get("width_rules"):
        text += f" Rules: {content['width_rules']}."
    return Section("groups", "Groups that can be pruned", [Table.of(rows)], text)


def _frozen(content: Record) -> Section:
    """Frozen groups by reason: a large network freezes many for the same."""
    reasons: dict[str, list[Record]] = {}
    for group in content["frozen"]:
        reasons.setdefault(group["reason"], []).append(group)
    rows = [
        {
            "why": reason,
            "groups": str(len(groups)),
            "channels": str(sum(group["channels"] for group in groups)),
            "which": joined([group["name"] for group in groups], _NAMED),
        }
        for reason, groups in reasons.items()
    ]
    blocks: list[Block] = [Table.of(rows)] if rows else [Text("Nothing: every group can be pruned.")]
    return Section("frozen", "What is frozen, and why", blocks)


def _blocks(content: Record) -> Section:
    rows = [
        {
            "block": block["name"],
            "MACs": percent(block["macs_share"], 2),
            "parameters": percent(block["parameters_share"], 2),
            **({} if block["left_out"] is None else {"plan": "left out" if block["left_out"] else "stays"}),
        }
        for block in content["blocks"]
    ]
    text = "Residual blocks with an identity shortcut; MACs and parameters: the share that leaving one out saves."
    return Section("blocks", "Blocks that can be left out", [Table.of(rows)], text)
