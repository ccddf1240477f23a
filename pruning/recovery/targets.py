"""What the unpruned network computes at the layers of the pruned one: the targets of reconstruction.

A layer whose output ends in a sum is also asked for what the other branch of the sum misses. The sum, and the
normalisation, scaling and reordering on the way to it, are found by following the layer's output from function to
function, for any network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from prunegym.pruning.recovery.reads import Read, count_positions, sampled
from prunegym.pruning.recovery.watching import Call, Place, Watch, WeightPart
from prunegym.pruning.task import Inputs

MAX_UNKNOWNS = 4608
"""Layers with more unknowns for an output channel (512 channels under a 3x3 kernel) keep what compensation gives."""
MAX_ROWS = 20_000
"""Most positions that a layer is fitted on."""
RIDGE = 0.1
"""Shrinkage towards the present weights, as a share of the mean variance of a layer's inputs."""
_SUMS = {torch.add, Tensor.add, Tensor.add_, Tensor.__add__, Tensor.__radd__, Tensor.__iadd__}
_PRODUCTS = {torch.mul, Tensor.mul, Tensor.mul_, Tensor.__mul__, Tensor.__rmul__, Tensor.__imul__}
_PERMUTES = {torch.permute, Tensor.permute}
_REORDERS = {*_PERMUTES, torch.transpose, Tensor.transpose}


@dataclass(frozen=True, kw_only=True)
class Fitting:
    """How the layers of a pruned network are fitted."""

    per_unknown: float = 20
    """Positions for each unknown of a layer: some thousand rows, not every pixel. Eight are enough for a score."""
    fewest: int = 2000
    """Positions of a layer with few unknowns, such as a depthwise one, if it has so many."""
    most: int = MAX_ROWS
    """Most positions of a layer."""
    numbers: float = float("inf")
    """Most numbers in the rows of a layer, at ``fewest`` positions or more: a wide layer can do with fewer of them."""
    ridge: float = RIDGE
    double: bool = True
    """Sum and solve in float64. In float32 it takes half the time, and the ridge keeps it sound enough for a score."""
    follow: bool = True
    """Fit each layer to what the layers before it, already fitted, give. False, to see what that is worth: to what
    they gave before any was changed."""

    def rows(self, unknowns: int) -> int:
        """Positions for a layer with so many unknowns for an output channel."""
        return int(min(self.most, max(self.fewest, min(self.per_unknown, self.numbers / unknowns**2) * unknowns)))


@dataclass(frozen=True)
class Trail:
    """How a tensor comes from a layer's output: normalised, scaled, reordered. The map is affine for each channel."""

    layer: Place
    number: int
    """Of the layer, in the order in which they run."""
    channels: int
    """Dimension of the channels."""
    scale: Tensor | None = None
    """By which the layer's output is multiplied on the way ``(C,)``."""
    redo: tuple[Callable[[Tensor], Tensor], ...] = ()
    """The reorderings, first to last."""
    undo: tuple[Callable[[Tensor], Tensor], ...] = ()
    """Their reverses, last to first."""

    def scaled(self, scale: Tensor) -> Trail:
        """Further, by a multiplication."""
        return replace(self, scale=scale if self.scale is None else self.scale * scale)

    def reordered(self, order: list[int]) -> Trail:
        """Further, by a permutation of the dimensions."""
        back = [order.index(dim) for dim in range(len(order))]
        return replace(
            self,
            channels=order.index(self.channels),
            redo=(*self.redo, lambda output: output.permute(order)),
            undo=(lambda branch: branch.permute(back), *self.undo),
        )


@dataclass(frozen=True)
class Sum:
    """The sum that a layer's output ends in, and nothing else reads."""

    place: Place
    operand: int
    """Which of the two operands comes from the layer."""
    other: Tensor
    """What the other branch gives in the unpruned network, at the layer's positions ``(R, C)``."""
    trail: Trail

    def branch_at(self, branch: Tensor, positions: Tensor, last: bool) -> Tensor:
        """The other branch ``(R, C)`` at positions of the layer's output."""
        for step in self.trail.undo:
            branch = step(branch)
        return sampled(branch, positions, last)


@dataclass(frozen=True)
class Mean:
    """The running mean of a batch normalisation."""

    name: str
    """Of the buffer."""
    values: Tensor
    """In the unpruned network ``(C,)``."""


@dataclass(frozen=True)
class Target:
    """What one layer of the unpruned network computes."""

    part: WeightPart
    outputs: int
    """Dimension of the parameter that holds the output channels."""
    last: bool
    """Channels are the last dimension of the output, not the second."""
    size: tuple[int, ...]
    """Sizes of the output's dimensions after the channels."""
    positions: Tensor
    """Positions of the output ``(R,)``, in an order that makes any first few of them a fair sample."""
    values: Tensor
    """The output there ``(R, C)``."""
    sum: Sum | None = None
    mean: Mean | None = None
    """What the layer's output is centred by, and nothing else: it can take the layer's intercept."""


@dataclass
class Targets:
    """Targets of a network on one batch, by place."""

    inputs: Inputs
    layers: dict[Place, Target] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Parameters that are read and have no target, with the reason."""


def observe_targets(
    model: nn.Module, inputs: Inputs, fitting: Fitting | None = None, *, sums: bool = True, seed: int = 0
) -> Targets:
    """Run the unpruned network once and keep what its layers compute at some positions.

    Args:
        model: the unpruned network; not changed.
        inputs: of calibration examples, on the network's device.
        fitting: how many positions are kept.
        sums: ask layers that end in a sum for what its other branch misses.
        seed: of the positions.
    """
    watch = _TargetWatch(model, fitting or Fitting(), sums, seed)
    with torch.no_grad():
        watch.run(inputs)
    return watch.targets(inputs)


class _TargetWatch(Watch):
    def __init__(self, model: nn.Module, fitting: Fitting, sums: bool, seed: int) -> None:
        super().__init__(model)
        self.fitting, self.sums = fitting, sums
        self.generator = torch.Generator().manual_seed(seed)
        self.buffers = {id(tensor): name for name, tensor in model.named_buffers()}
        self.layers: dict[Place, Target] = {}
        self.skipped: dict[str, str] = {}
        self.parts: dict[WeightPart, Place] = {}
        self.means: dict[str, list[tuple[Place, Tensor]]] = {}
        self.readers: dict[Place, int] = {}
        """How often a layer's output, and what it is turned into, is read on the way to a sum."""
        self.steps: dict[Place, int] = {}
        self.direct: dict[Place, int] = {}
        """How often the output itself is read."""
        self._trails: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def before(self, call: Call) -> None:
        operands = call.tensors
        plain = call.func in _SUMS and len(operands) == 2 and not call.kwargs
        if self.sums and plain and operands[0].shape == operands[1].shape:
            self._note_sum(call.place, operands)

    def _note_sum(self, place: Place, operands: list[Tensor]) -> None:
        """The layer that runs later takes over what the other branch misses."""
        trails = {index: trail for index, one in enumerate(operands) if (trail := self._trails.get(one)) is not None}
        if not trails:
            return
        index, trail = max(trails.items(), key=lambda item: item[1].number)
        target = self.layers.get(trail.layer)
        if target is None or target.sum is not None:
            return
        found = Sum(place, index, operands[0], trail)
        other = found.branch_at(operands[1 - index], target.positions, target.last).float()
        self.layers[trail.layer] = replace(target, sum=replace(found, other=other))

    def after(self, call: Call, result: Tensor) -> None:
        known = {id(one): (one, trail) for one in call.tensors if (trail := self._trails.get(one)) is not None}
        for _, trail in known.values():
            self.readers[trail.layer] += 1
            if trail.scale is None and not trail.redo:
                self.direct[trail.layer] += 1
        self._trails.pop(result, None)  # changed in place, it is something else
        if call.read is not None and call.part is not None:
            self._note_layer(call.place, call.read, call.part, result)
        elif len(known) == 1:
            ((data, trail),) = known.values()
            further = self._normalised(call, trail) if call.func is F.batch_norm else _further(call, data, trail)
            if further is not None:
                self._trails[result] = further
                self.steps[further.layer] += 1

    def _note_layer(self, place: Place, read: Read, part: WeightPart, result: Tensor) -> None:
        if part in self.parts:
            self.skipped[part.name] = "its weight is read more than once"
            self.layers.pop(self.parts[part], None)
            return
        self.parts[part] = place
        if read.unknowns > MAX_UNKNOWNS:
            self.skipped[part.name] = f"{read.unknowns} unknowns for an output channel are more than {MAX_UNKNOWNS}"
            return
        last = not read.spatial
        total = count_positions(tuple(result.shape), last)
        wanted = min(total, self.fitting.rows(read.unknowns))
        positions = self._positions(total, wanted).to(result.device)
        turned = read.columns and read.weight.stride() != read.weight.contiguous().stride()
        outputs = int((read.columns and not turned) or read.transposed)
        values = sampled(result, positions, last).float()
        self.layers[place] = Target(part, outputs, last, tuple(result.shape[2:]), positions, values)
        self.readers[place] = self.steps[place] = self.direct[place] = 0
        channels = result.ndim - 1 if last else 1
        self._trails[result] = Trail(place, len(self.parts), channels)

    def _positions(self, total: int, wanted: int) -> Tensor:
        if total <= 4 * wanted:
            return torch.randperm(total, generator=self.generator)[:wanted]
        return torch.randint(total, (wanted,), generator=self.generator)

    def _normalised(self, call: Call, trail: Trail) -> Trail | None:
        """The trail after batch normalisation by running statistics, which can take the layer's intercept."""
        names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        mean, variance, weight = given.get("running_mean"), given.get("running_var"), given.get("weight")
        if mean is None or variance is None or given.get("training") or trail.channels != 1:
            return None
        if trail.scale is None and not trail.redo:
            self.means.setdefault(self.buffers.get(id(mean), ""), []).append((trail.layer, mean.clone()))
        scale = torch.rsqrt(variance.float() + given.get("eps", 1e-5))
        return trail.scaled(scale if weight is None else scale * weight.float())

    def targets(self, inputs: Inputs) -> Targets:
        """What was seen, without sums that a layer's output does not go to alone."""
        once = {name: runs[0] for name, runs in self.means.items() if name and len(runs) == 1}
        means = {place: Mean(name, values) for name, (place, values) in once.items()}
        layers: dict[Place, Target] = {}
        for place, target in self.layers.items():
            alone = self.readers[place] == self.steps[place] + 1
            mean = means.get(place) if self.direct[place] == 1 else None
            layers[place] = replace(target, sum=target.sum if alone else None, mean=mean)
        return Targets(inputs, layers, self.skipped)


def _further(call: Call, data: Tensor, trail: Trail) -> Trail | None:
    """The trail after a function that scales channels, moves dimensions, or does nothing in evaluation mode."""
    if call.func is F.dropout:
        return trail
    if call.func in _PRODUCTS and len(call.tensors) == 2:
        factor = call.tensors[1] if data is call.tensors[0] else call.tensors[0]
        wide = [dim for dim in range(-factor.ndim, 0) if factor.shape[dim] > 1]
        if factor.ndim <= data.ndim and all(dim % data.ndim == trail.channels for dim in wide):
            return trail.scaled(factor.float().flatten().expand(data.shape[trail.channels]))
    if call.func in _REORDERS and len(call.args) > 1:
        ndim, given = call.tensors[0].ndim, call.args[1:]
        dims = [dim % ndim for dim in (given[0] if isinstance(given[0], tuple | list) else given)]
        if call.func in _PERMUTES:
            return trail.reordered(dims)
        order = list(range(ndim))
        order[dims[0]], order[dims[1]] = dims[1], dims[0]
        return trail.reordered(order)
    return None
