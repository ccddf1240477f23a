"""The channel graph: channel groups, the layers they tie together, and the tensor slices of each channel.

A *unit* is the smallest thing that can be removed: one channel with every slice of every tensor that carries
it. A *channel group* collects units that occur in the same places, so that all units of a group cost the
same. Units of prunable groups are numbered from 0 through the network, group after group; ``-1`` stands for
"always kept".
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.errors import PruningError
from prunegym.pruning.tracing.labels import varying
from prunegym.pruning.tracing.size_tags import Place
from prunegym.pruning.tracing.trace import Trace
from prunegym.pruning.tracing.tracer import TracedOperation

Units = NDArray[np.int64]


@dataclass(frozen=True)
class ChannelGroup:
    """Coupled channels that can only be removed together, all alike in where they occur."""

    name: str
    """Path of the layer that first makes these channels."""
    size: int
    start: int
    """Number of the group's first unit; -1 for frozen groups."""
    frozen: str | None
    """Why the group may not be pruned, or None."""
    producers: tuple[str, ...]
    """Layers that make these channels (their output dimension shrinks)."""
    consumers: tuple[str, ...]
    """Layers that read these channels (their input dimension shrinks)."""
    carriers: tuple[str, ...] = ()
    """Modules with a vector that has one number for each of these channels, such as norms."""

    @property
    def units(self) -> slice:
        """The group's units among those of the network."""
        return slice(self.start, self.start + self.size)

    def matches(self, pattern: str) -> bool:
        """True if a regular expression matches in full what makes or carries them, or a module around it."""
        paths = {one for path in (self.name, *self.producers, *self.carriers) for one in path_and_around(path)}
        return any(re.fullmatch(pattern, path) for path in paths)


@dataclass(frozen=True)
class Operation:
    """A layer that costs multiply-accumulates. Unit arrays hold ``-1`` for channels that are always kept."""

    module: str
    kind: str
    weight: str | None
    bias: str | None
    inputs: Units
    """Unit of each input channel ``(C_in,)``; all -1 where they are frozen."""
    outputs: Units
    """Unit of each output channel ``(C_out,)``."""
    fan_in: int
    """``C_in / groups`` of the unpruned layer."""
    repeats: float
    batch: tuple[Units, ...]
    """Units of the rows or heads that the operation runs on, which its cost shrinks with."""
    reads: int
    """Dimension of the weight that holds the input channels."""
    groups: int
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    kernel: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def mixes(self) -> bool:
        """True for layers that sum over their input channels and hold the weights of that sum."""
        return self.weight is not None and self.groups == 1


@dataclass(frozen=True)
class Padding:
    """A module whose ``channel_padding`` follows the units it pads with."""

    module: str
    before: Units
    after: Units


@dataclass(frozen=True)
class SizeRule:
    """An attribute of a module that holds a number of channels or heads, and follows the units it counts."""

    place: Place
    units: Units
    """Unit of each channel or head that is counted."""


@dataclass(frozen=True)
class ChannelGraph:
    """Everything about a network that pruning needs to know, without its weights."""

    groups: tuple[ChannelGroup, ...]
    """Prunable groups, in the order in which the network makes them."""
    frozen: tuple[ChannelGroup, ...]
    operations: tuple[Operation, ...]
    axes: dict[tuple[str, int], Units]
    """Unit of each index of a tensor's dimension, for the dimensions that can shrink."""
    paddings: tuple[Padding, ...]
    size_rules: tuple[SizeRule, ...]
    group_of: NDArray[np.int64]
    """Group number of each unit ``(units,)``."""
    unknown_operations: dict[str, str]
    folds: tuple[tuple[str, str], ...]
    """Pairs (convolution, batch normalisation) that can be folded into one for evaluation."""

    @property
    def units(self) -> int:
        """Number of units that can be removed."""
        return len(self.group_of)

    @property
    def sizes(self) -> NDArray[np.int64]:
        """Units in each group ``(groups,)``."""
        return np.array([group.size for group in self.groups], dtype=np.int64)

    def group(self, name: str) -> ChannelGroup:
        """The prunable group of that name.

        Raises:
            KeyError: there is none.
        """
        return next(group for group in self.groups if group.name == name)


def path_and_around(path: str) -> Iterator[str]:
    """The path of a module, and those of the modules around it: ``layer1``, ``layer1.0``, ``layer1.0.conv1``."""
    return accumulate(path.split("."), "{}.{}".format)


def build_graph(trace: Trace, keep: Sequence[str] = (), frozen_groups: dict[str, str] | None = None) -> ChannelGraph:
    """Collect the labels of a trace into channel groups.

    Args:
        trace: what one forward pass showed.
        keep: regular expressions; a group that matches one (:meth:`ChannelGroup.matches`) is frozen.
        frozen_groups: further groups to freeze by name, with the reason (found by the check after surgery).
    """
    _check_patterns(keep)
    classes = _Classes(trace)
    groups = _name_groups(trace, classes)
    reasons = dict(frozen_groups or {})
    prunable: list[ChannelGroup] = []
    frozen: list[ChannelGroup] = []
    unit_of_root = np.full(len(trace.roots) or 1, -1, dtype=np.int64)
    group_of: list[int] = []
    start = 0
    for group, roots in groups:
        reason = group.frozen or reasons.get(group.name) or _kept_by_request(group, keep) or _all_or_nothing(group)
        if reason is not None:
            frozen.append(replace(group, frozen=reason, start=-1))
            continue
        unit_of_root[roots] = np.arange(start, start + group.size)
        group_of += [len(prunable)] * group.size
        prunable.append(replace(group, start=start))
        start += group.size
    axes: dict[tuple[str, int], Units] = {}
    for name, dims in trace.tensors.items():
        for dim, labels in enumerate(dims):
            if labels is not None and (units := unit_of_root[trace.roots[labels]]).max(initial=-1) >= 0:
                axes[name, dim] = units
    return ChannelGraph(
        tuple(prunable),
        tuple(frozen),
        tuple(_operation(trace, unit_of_root, one) for one in trace.operations),
        axes,
        tuple(
            Padding(one.module, unit_of_root[trace.roots[one.before]], unit_of_root[trace.roots[one.after]])
            for one in trace.paddings
        ),
        tuple(_size_rules(trace, unit_of_root)),
        np.array(group_of, dtype=np.int64),
        trace.unknown_operations,
        tuple(trace.folds),
    )


def _size_rules(trace: Trace, unit_of_root: Units) -> Iterator[SizeRule]:
    """Attributes whose dimension indeed shrinks, each once."""
    seen: set[Place] = set()
    for one in trace.sizes:
        roots = trace.roots[one.labels]
        if one.axis not in varying(roots):
            continue  # the product shrinks along another of its dimensions
        place = tuple(slice(None) if axis == one.axis else 0 for axis in range(roots.ndim))
        units = unit_of_root[roots[place]]
        if (units >= 0).any() and one.place not in seen:
            seen.add(one.place)
            yield SizeRule(one.place, units)


class _Classes:
    """Label classes that a layer produced, sorted into groups of equal occurrence."""

    def __init__(self, trace: Trace) -> None:
        slots = [
            (trace.roots[labels], (name, dim))
            for name, dims in trace.tensors.items()
            for dim, labels in enumerate(dims)
            if labels is not None
        ]
        # padded channels before and after cost the same: one group
        slots += [(trace.roots[np.append(one.before, one.after)], (one.module, -1)) for one in trace.paddings]
        # one random number per place; its sum over a class's occurrences identifies the multiset of places
        rng = np.random.Generator(np.random.PCG64(20_240_601))
        signature = np.zeros(len(trace.roots) or 1, dtype=np.uint64)
        for roots, _place in slots:
            np.add.at(signature, roots, rng.integers(1, 2**63, dtype=np.uint64))
        hashes = {reason: rng.integers(1, 2**63, dtype=np.uint64) for reason in sorted(set(trace.reasons.values()))}
        for root, reason in trace.reasons.items():
            signature[root : root + 1] += hashes[reason]  # as an array, so that it wraps around
        # a product of activations has no tensor, and may have only some of a layer's channels: they cost more
        free = np.ones(len(signature), dtype=np.bool_)
        free[list(trace.reasons)] = False
        for one in trace.operations:
            for labels in (one.inputs, one.outputs, *one.batch):
                roots = trace.roots[labels] if labels is not None else np.empty(0, dtype=np.int64)
                np.add.at(signature, roots[free[roots]], rng.integers(1, 2**63, dtype=np.uint64))
        first = np.full(len(signature), len(signature), dtype=np.int64)
        np.minimum.at(first, trace.roots, np.arange(len(trace.roots)))
        roots = np.flatnonzero(trace.produced)
        members: dict[int, list[int]] = defaultdict(list)
        for root in roots[np.argsort(first[roots], kind="stable")].tolist():
            members[int(signature[root])].append(root)
        self.groups = [np.array(one, dtype=np.int64) for one in members.values()]


def _name_groups(trace: Trace, classes: _Classes) -> list[tuple[ChannelGroup, NDArray[np.int64]]]:
    """Name each group after the layer that first makes its channels; list who makes and who reads them."""
    owner = np.full(len(trace.roots) or 1, -1, dtype=np.int64)
    for index, roots in enumerate(classes.groups):
        owner[roots] = index
    makers: list[dict[str, None]] = [{} for _ in classes.groups]
    readers: list[dict[str, None]] = [{} for _ in classes.groups]
    carriers: list[dict[str, None]] = [{} for _ in classes.groups]
    for one in trace.operations:
        for labels, sides in ((one.outputs, makers), (one.inputs, readers)):
            if labels is not None:
                for index in np.unique(owner[trace.roots[labels]]).tolist():
                    if index >= 0:
                        sides[index].setdefault(one.module)
    for tensor, dims in trace.tensors.items():
        if len(dims) == 1 and dims[0] is not None:
            for index in np.unique(owner[trace.roots[dims[0]]]).tolist():
                if index >= 0:
                    carriers[index].setdefault(tensor.rpartition(".")[0])
    seen: dict[str, int] = defaultdict(int)
    named = []
    for index, roots in enumerate(classes.groups):
        name = next(iter(makers[index]), "network") or _parameter_name(trace, owner, index)
        seen[name] += 1
        unique = name if seen[name] == 1 else f"{name}#{seen[name]}"
        reason = next((trace.reasons[root] for root in roots.tolist() if root in trace.reasons), None)
        places = (tuple(one[index]) for one in (makers, readers, carriers))
        group = ChannelGroup(unique, len(roots), -1, reason, *places)
        named.append((group, roots))
    return named


def _parameter_name(trace: Trace, owner: NDArray[np.int64], index: int) -> str:
    """Name of a group whose channels the outermost module makes itself: that of the parameter it makes them with."""
    reading = {(one.weight, one.reads) for one in trace.operations}
    for name, dims in trace.tensors.items():
        making = [part for dim, part in enumerate(dims) if part is not None and (name, dim) not in reading]
        if any((owner[trace.roots[labels]] == index).any() for labels in making):
            return name
    return "network"


def _all_or_nothing(group: ChannelGroup) -> str | None:
    return "its channels can only go all together" if group.size == 1 else None


def _check_patterns(keep: Sequence[str]) -> None:
    for pattern in keep:
        try:
            re.compile(pattern)
        except re.error as fault:
            raise PruningError(
                f"`keep` should be regular expressions. Received {pattern!r} ({fault}). "
                "Write for example 'layer1.*', or escape the special characters."
            ) from fault


def _kept_by_request(group: ChannelGroup, keep: Sequence[str]) -> str | None:
    return next((f"kept by request ({pattern})" for pattern in keep if group.matches(pattern)), None)


def _operation(trace: Trace, unit_of_root: Units, one: TracedOperation) -> Operation:
    def units(labels: NDArray[np.int64] | None, count: int) -> Units:
        return np.full(count, -1, dtype=np.int64) if labels is None else unit_of_root[trace.roots[labels]]

    return Operation(
        one.module,
        one.kind,
        one.weight,
        one.bias,
        units(one.inputs, one.input_count * one.groups),
        units(one.outputs, one.output_count),
        one.input_count,
        one.repeats,
        tuple(unit_of_root[trace.roots[labels]] for labels in one.batch),
        one.reads,
        one.groups,
        one.input_shape,
        one.output_shape,
        one.kernel,
        one.stride,
    )
