"""Group attention: gates on channels, trained for a moment beside the frozen network.

Channels of a group are split into *attention groups* of a few neighbours. What each channel carries in an
example, pooled over positions, goes through a small gate in the manner of squeeze and excitation, which the
attention groups share; its output, in (0, 1), multiplies the channel wherever it is read. Network and data stay
as they are; only the gates learn, from the loss of the task and a penalty on their sum. What the task needs
stays open. The mean gate over the calibration examples is the channel's score.

This is our reading of the abstract of Yang et al., "Data-Aware Adaptive Pruning Model Compression Algorithm Based
on a Group Attention Mechanism and Reinforcement Learning", IEEE Access 2022; the excitation follows Hu et al.,
"Squeeze-and-Excitation Networks", CVPR 2018. The method's other half, reinforcement learning of how much each
layer keeps, is the agent: ``prunegym train --criterion group_attention``. Our own are the offset that each channel
has in its gate (channels of like activations could not part without it) and one gate for all reads of a channel,
because it is removed from all of them together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from prunegym.pruning.attention import headwise
from prunegym.pruning.graph import Operation
from prunegym.pruning.importance.batch_axes import BatchAxes
from prunegym.pruning.importance.context import Calibration, Context, Scores
from prunegym.pruning.importance.reading import Reader, all_readers
from prunegym.pruning.importance.statistics import find_batch_axes
from prunegym.pruning.modes import differentiating, evaluating
from prunegym.pruning.task import Inputs, Task, forward


@dataclass(frozen=True, kw_only=True)
class GateSettings:
    """Sizes and training of the gates."""

    channels: int = 16
    """Channels of an attention group."""
    hidden: int = 8
    """Width inside a gate."""
    steps: int = 32
    """Optimiser steps."""
    batch_size: int = 32
    learning_rate: float = 0.05
    penalty: float = 1.0
    """Factor on the mean gate in the loss. The unit is what all channels together are worth: by how much the loss
    rises when every gate is shut. With 1, a channel is to be worth more than the average one to stay open."""
    start: float = 2.0
    """Logit of every gate before training: open, but where it can still move."""


def mean_gates(context: Context, calibration: Calibration, settings: GateSettings | None = None) -> Scores:
    """Train gates on calibration examples and average them there.

    Args:
        context: the network, run in eval mode and not changed, and the seed of the gates' first weights.
        calibration: the examples.
        settings: sizes and training.

    Returns:
        Mean gate of each unit ``(units,)`` in (0, 1); 0 for units that are gone or that no module reads.
    """
    settings = settings or GateSettings()
    model = context.model
    gates = _GatedReads(context, settings, calibration.device)
    scores, examples = torch.zeros(context.graph.units + 1, dtype=torch.float64), 0
    if not len(gates.gated):
        return scores[:-1].numpy()
    gated = gates.gated.cpu()
    with evaluating(model), headwise(model), differentiating(model):
        gates.axes = find_batch_axes(model, context.graph, calibration.batches)
        with gates.attached():
            with torch.enable_grad():
                _train(gates, model, calibration)
            with torch.no_grad():
                for inputs, _ in calibration.batches(settings.batch_size):
                    gates.run(model, inputs)
                    scores[gated] += gates.open.sum(0, dtype=torch.float64).cpu()[gated]
                    examples += len(gates.open)
    return (scores / max(examples, 1))[:-1].numpy()


def _train(gates: _GatedReads, model: nn.Module, calibration: Calibration) -> None:
    """Let the gates learn what the task needs."""
    settings = gates.settings
    optimiser = torch.optim.Adam(gates.parameters(), lr=settings.learning_rate)
    penalty = None
    for inputs, targets in islice(_again_and_again(calibration, settings.batch_size), settings.steps):
        if penalty is None:
            penalty = settings.penalty * _worth(gates, model, calibration.task, inputs, targets)
        outputs = gates.run(model, inputs)
        # gates are positive: their mean is their L1 norm over their number
        loss = calibration.task.loss(outputs, targets) + penalty * gates.open[:, gates.gated].mean()
        optimiser.zero_grad()
        if loss.requires_grad:  # else no gated layer ran: there is nothing to learn
            loss.backward()
            optimiser.step()


def _worth(gates: _GatedReads, model: nn.Module, task: Task, inputs: Inputs, targets: Any) -> float:
    """By how much the loss of a batch rises when every gate is shut; 0 if it does not."""
    with torch.no_grad():
        shut, wide = (float(task.loss(gates.run(model, inputs, gate), targets)) for gate in (0.0, 1.0))
    return max(shut - wide, 0.0)


def _again_and_again(calibration: Calibration, batch_size: int) -> Iterator[tuple[Inputs, Any]]:
    """The batches without end; none if there are none."""
    empty = False
    while not empty:
        empty = True
        for batch in calibration.batches(batch_size):
            empty = False
            yield batch


class _Gate(nn.Module):
    """Gates of the channels of one group, from what they carry.

    Args:
        channels: of the group, those that are left.
        settings: sizes.
        generator: source of the first weights.
    """

    def __init__(self, channels: int, settings: GateSettings, generator: torch.Generator) -> None:
        super().__init__()
        width, hidden = min(settings.channels, channels), settings.hidden
        self.squeeze = nn.Parameter(torch.randn(width, hidden, generator=generator) / width**0.5)
        self.bias = nn.Parameter(torch.zeros(hidden))
        # zero, so that all gates start equal and open
        self.excite = nn.Parameter(torch.zeros(hidden, width))
        self.offset = nn.Parameter(torch.full((channels,), settings.start))

    def forward(self, pooled: Tensor) -> Tensor:
        """Map pooled activations ``(B, channels)`` to gates ``(B, channels)`` in (0, 1)."""
        channels, width = pooled.shape[1], len(self.squeeze)
        # layers differ in scale; what matters is how the channels of an example differ
        carried = F.pad(F.layer_norm(pooled, (channels,)), (0, -channels % width))
        attention_groups = carried.unflatten(1, (-1, width))  # (B, groups, width)
        excited = F.relu(attention_groups @ self.squeeze + self.bias) @ self.excite
        return (excited.flatten(1)[:, :channels] + self.offset).sigmoid()


class _GatedReads:
    """Multiplies what layers read by the gates of its channels.

    Args:
        context: the network.
        settings: of the gates.
        device: of the network.
    """

    def __init__(self, context: Context, settings: GateSettings, device: torch.device | str) -> None:
        graph, generator = context.graph, torch.Generator().manual_seed(context.seed)
        self.settings = settings
        self.axes = BatchAxes()
        """Where the examples are in what is read."""
        self._readers: list[tuple[Operation, Reader, Tensor]] = []
        for operation, module in all_readers(graph, context.model):
            units = context.remaining(operation.inputs)
            places = torch.from_numpy(np.where(units < 0, graph.units, units)).to(device)
            self._readers.append((operation, module, places))
        read = np.unique(np.concatenate([np.empty(0, np.int64), *(units.cpu() for *_, units in self._readers)]))
        self.gated = torch.from_numpy(read[read < graph.units]).to(device)
        """Units that have a gate."""
        self._group_of = torch.from_numpy(graph.group_of).to(device)
        self._members = {
            int(group): self.gated[self._group_of[self.gated] == group] for group in self._group_of[self.gated].unique()
        }
        self._gates = {
            group: _Gate(len(units), settings, generator).to(device) for group, units in self._members.items()
        }
        self.open = torch.ones(0, graph.units + 1, device=device)
        """Gates of the examples of the last batch ``(B, units + 1)``; 1 for units that have none, and for the last
        place, which stands for channels that are always kept."""
        self._waiting: set[int] = set()

    def parameters(self) -> list[nn.Parameter]:
        """What can be learned."""
        return [parameter for gate in self._gates.values() for parameter in gate.parameters()]

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Let the gates work while the network runs."""
        with ExitStack() as stack:
            for operation, module, units in self._readers:
                stack.callback(module.register_forward_pre_hook(self._hook(operation, units)).remove)
            yield

    def run(self, model: nn.Module, inputs: Inputs, gate: float | None = None) -> Any:
        """Outputs of the gated network for a batch, with all gates at ``gate`` if it is given."""
        count = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
        self.open = torch.ones(count, self.open.shape[1], device=self.open.device)
        if gate is not None:
            self.open[:, self.gated] = gate
        self._waiting = set(self._gates) if gate is None else set()
        return forward(model, inputs)

    def _hook(self, operation: Operation, units: Tensor) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
        """For a layer that reads these units, one per input channel."""
        read = set(self._group_of[units[units < len(self._group_of)]].tolist())
        last = operation.kind == "linear"  # where the channels are; else they are second

        def gate(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
            data = args[0]
            axis = self.axes.of(operation, data, len(self.open))
            for group in sorted(read & self._waiting):
                self._decide(group, _pooled(data.detach().float(), len(self.open), axis, last), units)
            factor = self.open[:, units]  # (B, C)
            if axis is None:
                factor = factor.mean(0, keepdim=True)
            else:
                # several rows per example (windows, frames) stand one behind another
                factor = factor.repeat_interleave(data.shape[axis] // len(factor), 0)
            shape = [1] * data.ndim
            shape[axis or 0], shape[-1 if last else 1] = factor.shape
            return (data * factor.reshape(shape).to(data.dtype), *args[1:])

        return gate

    def _decide(self, group: int, pooled: Tensor, units: Tensor) -> None:
        """Set the gates of a group where it is first read; later reads get the same."""
        places = self.open.shape[1]
        # a channel may stand in several places (flattened positions): their mean
        often = torch.zeros(places, device=units.device).index_add_(0, units, torch.ones_like(units).float())
        carried = pooled.new_zeros(len(pooled), places).index_add_(1, units, pooled) / often.clamp(min=1)
        members = self._members[group]
        self.open = self.open.index_copy(1, members, self._gates[group](carried[:, members]))
        self._waiting.remove(group)


def _pooled(data: Tensor, examples: int, axis: int | None, last: bool) -> Tensor:
    """Mean over positions of what a layer reads, ``(examples, C)``; over examples too where ``axis`` tells of none."""
    data = data.movedim(axis or 0, 0)
    rows = data.flatten(1, -2).mean(1) if last and data.ndim > 2 else data
    rows = rows if last else data.flatten(2).mean(2)
    if axis is not None:
        return rows.reshape(examples, -1, rows.shape[1]).mean(1)
    return rows.mean(0, keepdim=True).expand(examples, -1)
