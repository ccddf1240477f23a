"""Whole networks of random widths, measured: as a whole beside the unpruned network, and operation by operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from prunegym.pruning.allocation import project
from prunegym.pruning.budget import Budget, Limit
from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.network import PrunableNetwork
from prunegym.pruning.plan import PruningPlan
from prunegym.pruning.timing.latency import LatencySettings, ready_to_measure, take_turns
from prunegym.pruning.timing.operation_profiles import QUANTILE, Probe, Profile, Widths, make_probe
from prunegym.pruning.widths import WidthRules

Counts = NDArray[np.int64]
Floats = NDArray[np.float64]

#: Shares of the unpruned network's MACs between which networks are drawn.
MACS = (0.2, 0.95)
#: Least keep ratio that a group is asked to have before the network is brought to its share of MACs.
_KEEP = 0.1
#: Multiples that the widths of networks are drawn in, one after another: a searcher that knows the table finds the
#: widths that a kernel likes, one that does not finds any.
_ALIGNMENTS = (1, 16, 1, 8, 1, 4)
#: Keep ratio in all groups of the smallest network: what no pruning removes shows there. (A single channel everywhere
#: would show it best, but breaks networks that squeeze dimensions of size 1.)
_SMALL = 0.125
#: Turns beside the unpruned network, and watched runs, of each network.
_TURNS, _WATCHED = 10, 20


@dataclass(frozen=True)
class Sample:
    """One network, measured."""

    counts: Counts
    """Channels that each group kept ``(groups,)``."""
    seconds: float
    """Per run of the whole network."""
    operations: Floats
    """Seconds of each operation and what follows it ``(operations,)``; with what is outside of operations they add up
    to the whole."""


class Sampler(Protocol):
    """Measures networks of one kind; tests bring their own."""

    def __call__(self, counts: Counts) -> Sample:
        """Measure the network that keeps these counts ``(groups,)``."""


def draw_counts(network: PrunableNetwork, amount: int, rng: np.random.Generator) -> Iterator[Counts]:
    """Counts ``(groups,)`` of the networks to measure: the unpruned one, a very small one, and random ones."""
    sizes = network.graph.sizes
    yield sizes
    yield np.maximum(1, np.rint(_SMALL * sizes)).astype(np.int64)
    for number in range(max(0, amount - 2)):
        yield random_counts(network, rng, align=_ALIGNMENTS[number % len(_ALIGNMENTS)])


def random_counts(
    network: PrunableNetwork, rng: np.random.Generator, *, align: int = 1, macs: tuple[float, float] = MACS
) -> Counts:
    """Random counts ``(groups,)`` of a network with a random share of MACs.

    Args:
        network: the network.
        rng: generator.
        align: widths are multiples of this where possible.
        macs: least and most share of the unpruned network's MACs.
    """
    widths = WidthRules(align=align).apply(network.graph)
    full = float(network.full_cost.macs)
    least = network.costs.macs(widths.smallest) / full
    share = rng.uniform(max(least, macs[0]), max(least, macs[1]))
    limit = Limit(Budget("macs", 1.0), network.costs.macs, full, share * full)
    return project(rng.uniform(_KEEP, 1.0, len(network.graph.sizes)), limit, widths)


class RealSampler:
    """Measures networks by running them.

    The unpruned network runs beside each, so that the machine may drift between one and the next.

    Args:
        network: what is pruned.
        settings: how to measure.
    """

    def __init__(self, network: PrunableNetwork, settings: LatencySettings) -> None:
        self.network = network
        self.settings = settings
        self._inputs = with_batch(network.example_inputs, settings.batch_size)
        self._unpruned: Probe | None = None
        self._reference = 0.0  # seconds of the unpruned network when it ran first, whatever the machine did later

    def __call__(self, counts: Counts) -> Sample:
        """Measure the network that keeps these counts ``(groups,)``."""
        with ready_to_measure(self.settings) as settings:
            if self._unpruned is None:
                self._unpruned = self._probe(self.network.graph.sizes, settings)
            probe = self._probe(counts, settings)
            few = replace(settings, repeats=_TURNS, warmup=2)
            times = take_turns({"unpruned": self._unpruned.run, "pruned": probe.run}, few)
            profile = probe.profile(_WATCHED)
        # of all turns the quick ones count, as for operations: interruptions only ever add time
        before, after = (float(np.quantile(one, QUANTILE)) for one in times.values())
        self._reference = self._reference or before
        whole = self._reference * after / before
        return Sample(counts, whole, without_watching(profile, whole))

    def _probe(self, counts: Counts, settings: LatencySettings) -> Probe:
        network = self.network
        plan = PruningPlan.from_counts(network.graph, counts)
        inputs, outputs = (np.rint(one).astype(np.int64) for one in network.costs.widths(counts))
        widths = Widths(inputs, outputs)
        with torch.no_grad():
            return make_probe(network.pruned(plan), network.graph.operations, widths, self._inputs, settings)


def without_watching(profile: Profile, whole: float) -> Floats:
    """Seconds of each operation without what it cost to take the time.

    Args:
        profile: of a watched network.
        whole: seconds per run of the same network when nobody watches.

    Returns:
        Seconds ``(operations,)`` that add up to no more than the whole.
    """
    seconds = profile.seconds
    surplus = float(seconds.sum()) - whole
    if surplus <= 0:
        return seconds
    # the same for each moment at which time was taken, but no operation gets faster than half of what was seen
    cost = np.minimum(surplus * profile.events / max(1, profile.events.sum()), seconds / 2)
    shorter: Floats = (seconds - cost) * whole / max(float((seconds - cost).sum()), 1e-12)
    return shorter
