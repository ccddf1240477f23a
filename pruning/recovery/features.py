"""Features at the end of each stage, in the unpruned network and in the pruned one.

A stage ends where the number of positions falls: at a convolution with a stride, at a pooling, where one token of many
is taken. Of all tensors with one number of positions the last to be shrunk is the end of that stage. They are found by
watching the unpruned network, and met again in the pruned one by their places.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.recovery.watching import Call, Place, Watch
from prunegym.pruning.task import Inputs


@dataclass(frozen=True)
class Stage:
    """The end of a stage."""

    place: Place
    """The call that shrinks its last tensor."""
    func: Any
    channels: int
    kept: Tensor | None
    """Channels of the tensor that the pruned network has; None for all."""

    def error(self, present: Tensor, wanted: Tensor) -> Tensor | None:
        """Squared error of the present features as a share of the variance of the wanted ones: a scalar.

        None where they do not belong together, as of a block that training skips.
        """
        if present.shape != wanted.shape:
            # the channels are the dimension that has shrunk, wherever it is
            differing = [dim for dim, size in enumerate(present.shape[: wanted.ndim]) if size != wanted.shape[dim]]
            if self.kept is None or present.ndim != wanted.ndim or len(differing) != 1:
                return None
            (dim,) = differing
            if (present.shape[dim], wanted.shape[dim]) != (len(self.kept), self.channels):
                return None
            wanted = wanted.index_select(dim, self.kept.to(wanted.device))
        wanted = wanted.float()
        return F.mse_loss(present.float(), wanted) / wanted.var().clamp(min=1e-6)


def find_stages(model: nn.Module, graph: ChannelGraph, mask: NDArray[np.bool_], inputs: Inputs) -> dict[Place, Stage]:
    """The ends of the stages of the unpruned network whose channels are known in the pruned one.

    Args:
        model: the unpruned network.
        graph: its channel graph.
        mask: units kept ``(units,)``.
        inputs: of a few examples.
    """
    watch = _StageWatch(model, graph)
    with torch.no_grad():
        watch.run(inputs)
    stages = {}
    padded = np.append(mask, True)
    for end in watch.ends.values():
        units = watch.units.get(end.place)
        if units is None:
            continue
        # one of its dimensions, or the second if that has been flattened together with the positions
        channels = len(units) if len(units) in end.shape[1:] else end.shape[1]
        if len(units) % channels:
            continue
        kept = np.flatnonzero(padded[units[:: len(units) // channels]])
        whole = len(kept) == channels
        stages[end.place] = Stage(end.place, end.func, channels, None if whole else torch.from_numpy(kept))
    return stages


class StageFeatures(Watch):
    """Collects the features at the ends of stages while a network runs.

    Args:
        model: the unpruned or the pruned network.
        stages: from :func:`find_stages`.
    """

    def __init__(self, model: nn.Module, stages: Mapping[Place, Stage]) -> None:
        super().__init__(model)
        self.stages = stages
        self.features: dict[Place, Tensor] = {}

    def forward(self, *inputs: Tensor) -> Any:
        """Outputs of the network, seen; features of runs before are dropped."""
        self.features = {}
        return super().forward(*inputs)

    def before(self, call: Call) -> None:
        """Keep what the call is about to shrink."""
        stage = self.stages.get(call.place)
        if stage is not None and stage.func is call.func and call.tensors:
            self.features[call.place] = call.tensors[0]


class _StageWatch(Watch):
    def __init__(self, model: nn.Module, graph: ChannelGraph) -> None:
        super().__init__(model)
        self.inputs = {one.weight: one.inputs for one in graph.operations if one.weight is not None}
        self.ends: dict[int, _End] = {}
        """By number of positions, the last tensor of so many that a call shrinks."""
        self.units: dict[Place, NDArray[np.int64]] = {}
        """Units of its channels, as the layer tells that reads it, or what becomes of it."""
        self._ends_in: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def after(self, call: Call, result: Tensor) -> None:
        """Note calls that shrink a tensor, and follow what they give to the layer that reads it."""
        if not call.tensors or not call.tensors[0].is_floating_point():
            return
        source = call.tensors[0]
        known: tuple[_End, ...] = self._ends_in.get(source, ())
        if not result.ndim:
            return
        if source.ndim > 2 and len(result) == len(source) and _positions(result) < _positions(source):
            before = self.ends.get(_positions(source))
            # a shortcut shrinks the same tensor once more
            if before is None or before.tensor() is not source:
                end = _End(call.place, call.func, tuple(source.shape), weakref.ref(source))
                self.ends[_positions(source)] = end
                known = (*known, end)
        units = self.inputs.get(call.part.name) if call.part is not None else None
        for end in known:
            if units is not None:
                self.units.setdefault(end.place, units)
        if call.read is None and result is not source:
            still = tuple(end for end in known if _may_hold(result, end.shape))
            if still:
                self._ends_in[result] = still


@dataclass(frozen=True)
class _End:
    """A call that shrinks a tensor."""

    place: Place
    func: Any
    shape: tuple[int, ...]
    tensor: weakref.ref[Tensor]


def _positions(tensor: Tensor) -> int:
    """Positions of one example: pixels of a map, or tokens of a sequence."""
    return prod(tensor.shape[2:]) if tensor.ndim > 3 else tensor.shape[1] if tensor.ndim == 3 else 1


def _may_hold(result: Tensor, shape: tuple[int, ...]) -> bool:
    """Whether a tensor may have the channels of another: as many in a dimension, or flattened with the positions."""
    sizes = result.shape[1:]
    return any(size in shape[1:] or size % shape[1] == 0 for size in sizes)
