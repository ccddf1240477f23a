"""Reconstruction: each layer is fitted to what the unpruned network computes at the same place, from what it gets.

Layers are met in the order in which they run. When one is reached, its whole kernel and bias become the ridge
least-squares fit from its *present* input, which carries the errors of earlier layers, to the output of the unpruned
network, shrunk towards the weights it has; then it runs with its new weights. One pass over the calibration examples
does it, without labels and without gradients.

He et al., "Channel Pruning for Accelerating Very Deep Neural Networks", ICCV 2017, fit each layer to the unpruned one
from its pruned input, and a branch to the sum minus the present shortcut; Luo et al., "ThiNet", ICCV 2017, sample
positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.errors import PruningError
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.recovery.reads import Read
from prunegym.pruning.recovery.targets import Fitting, Target, Targets
from prunegym.pruning.recovery.watching import Call, Place, Watch

_CHUNK = 1 << 24
"""Numbers in the rows that are gathered at a time (64 MiB)."""
_SMALLEST_SCALE = 1e-2
"""Channels whose scale is smaller than this share of the largest cannot make up for the other branch of a sum."""


@dataclass
class Reconstruction:
    """What became of the layers of a network."""

    errors: dict[str, tuple[float, float]] = field(default_factory=dict)
    """Squared error of each layer's output before and after, as a share of its target's variance, by parameter; from
    sums in float64 only."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Parameters that keep the weights they had, with the reason."""


def reconstruct(
    model: nn.Module,
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    batches: Iterable[Targets],
    settings: Fitting | None = None,
    *,
    exact: dict[str, Tensor] | None = None,
) -> Reconstruction:
    r"""Fit the layers of a pruned network to the unpruned one, in place.

    With ``X`` a layer's present inputs at ``R`` positions, ``T`` its targets there and ``W_0`` its weights,

    .. math:: W = W_0 + (X^\top X + \lambda I)^{-1} X^\top (T - X W_0),

    with ``X`` and ``T`` centred where the layer has a bias or a normalisation that can take the intercept. Where there
    are several batches, the sums behind ``X'X`` and ``X'T`` grow from batch to batch.

    Args:
        model: the pruned network, usually compensated; its normalisation statistics those of the unpruned network.
        graph: channel graph of the unpruned network.
        mask: units kept ``(units,)``.
        batches: targets of the unpruned network, from :func:`.observe_targets`.
        settings: how layers are fitted.
        exact: weights and biases by name where those of ``model`` are rounded for speed; replaced as the layers are.

    Returns:
        Errors before and after, and what was left as it was.
    """
    fits: dict[Place, _Fit] = {}
    result = Reconstruction()
    for targets in batches:
        result.skipped.update(targets.skipped)
        solver = _Solver(model, graph, mask, targets, fits, settings or Fitting(), {} if exact is None else exact)
        with torch.no_grad():
            solver.run(targets.inputs)
            solver.finish()
        missed = {target.part.name for place, target in targets.layers.items() if place not in fits}
        result.skipped.update(dict.fromkeys(missed, "the pruned network does not run it where the unpruned one does"))
    result.errors = {fit.name: fit.errors for fit in fits.values() if fit.errors is not None}
    return result


class _Fit:
    """The normal equations of one layer; they grow with batches.

    Rows are held as they are for as long as they are fewer than the unknowns, and the system is solved in its dual
    form, one equation for each row; else only their sums are.
    """

    def __init__(
        self, name: str, read: Read, weight: Tensor, bias: Tensor | None, *, intercept: bool, double: bool
    ) -> None:
        self.name = name
        self.intercept = intercept
        self.start = read.matrix(weight).float().clone()  # (G, O, U)
        self.bias = None if bias is None else bias.float().clone()
        groups, outputs, unknowns = self.start.shape
        kind, device = (torch.float64, _exact_device(weight.device)) if double else (torch.float32, weight.device)
        exact = partial(torch.zeros, dtype=kind, device=device)
        self.square, self.cross = exact(groups, unknowns, unknowns), exact(groups, unknowns, outputs)
        self.inputs, self.gaps = exact(groups, unknowns), exact(groups, outputs)
        self.energy, self.target_energy, self.target_sum = exact(()), exact(()), exact(groups, outputs)
        self.rows = 0
        self.held: list[tuple[Tensor, Tensor]] = []
        """Rows and gaps that are not in ``square`` and ``cross`` yet."""
        self.errors: tuple[float, float] | None = None

    def add(self, rows: Tensor, targets: Tensor) -> None:
        """Take in rows ``(G, R, U)`` with their targets ``(G, R, O)``."""
        gaps = targets - rows @ self.start.mT
        if self.bias is not None:
            gaps -= self.bias.unflatten(0, (len(rows), 1, -1))
        sums = {
            "inputs": rows.sum(1),
            "gaps": gaps.sum(1),
            "energy": gaps.square().sum(),
            "target_energy": targets.square().sum(),
            "target_sum": targets.sum(1),
        }
        for name, value in sums.items():
            total: Tensor = getattr(self, name)
            total += value.to(total.device)
        few = self.rows == sum(held.shape[1] for held, _ in self.held)
        self.held.append((rows, gaps))
        self.rows += rows.shape[1]
        if not few or self.rows >= rows.shape[2]:
            for some, missing in self.held:
                self.square += (some.mT @ some).to(self.square.device)
                self.cross += (some.mT @ missing).to(self.cross.device)
            self.held.clear()

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The new weights ``(G, O, U)``, and what is added to each output ``(C,)``."""
        inputs, gaps = self.inputs / self.rows, self.gaps / self.rows
        if not self.intercept:
            inputs, gaps = torch.zeros_like(inputs), torch.zeros_like(gaps)
        change, gained = (self._dual if self.held else self._primal)(ridge, inputs, gaps)
        shift = gaps - (change.mT @ inputs.unsqueeze(2)).squeeze(2)
        if change.dtype == torch.float64:
            self._note_errors(float(gained + gaps.square().sum()))
        return self.start + change.mT.to(self.start), shift.flatten().to(self.start)

    def _primal(self, ridge: float, inputs: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """The change ``(G, U, O)`` around the means, and by how much it lowers a row's squared error."""
        square = self.square / self.rows - inputs.unsqueeze(2) * inputs.unsqueeze(1)
        cross = self.cross / self.rows - inputs.unsqueeze(2) * gaps.unsqueeze(1)
        change = _solved(square, cross, ridge * square.diagonal(dim1=1, dim2=2).mean(1))
        return change, 2 * (change * cross).sum() - (change * (square @ change)).sum()

    def _dual(self, ridge: float, inputs: Tensor, gaps: Tensor) -> tuple[Tensor, Tensor]:
        """The same from the rows themselves: ``X' (XX' + λI)^-1 T`` is ``(X'X + λI)^-1 X'T``."""
        rows, wanted = (torch.cat(parts, 1).to(self.square) for parts in zip(*self.held, strict=True))
        rows, wanted = rows - inputs.unsqueeze(1), wanted - gaps.unsqueeze(1)
        square = rows @ rows.mT / self.rows
        shrinkage = ridge * square.diagonal(dim1=1, dim2=2).sum(1) / rows.shape[2]
        change = rows.mT @ _solved(square, wanted, shrinkage) / self.rows
        met = rows @ change
        return change, (2 * (met * wanted).sum() - met.square().sum()) / self.rows

    def _note_errors(self, gained: float) -> None:
        """Keep the squared error before and after, given by how much it falls for each row."""
        before, energy = float(self.energy) / self.rows, float(self.target_energy) / self.rows
        variance = max(energy - float((self.target_sum / self.rows).square().sum()), 1e-12)
        self.errors = (before / variance, (before - gained) / variance)


def _solved(square: Tensor, wanted: Tensor, shrinkage: Tensor) -> Tensor:
    """Solve ``(square + shrinkage I) x = wanted`` for each group."""
    system = square.clone()
    system.diagonal(dim1=1, dim2=2).add_(shrinkage.clamp(min=1e-12).unsqueeze(1))
    factor, failed = torch.linalg.cholesky_ex(system)
    return torch.cholesky_solve(wanted, factor) if not failed.any() else torch.linalg.lstsq(system, wanted).solution


def _exact_device(device: torch.device) -> torch.device:
    """Where float64 is: not on Apple's graphics processors."""
    return torch.device("cpu") if device.type == "mps" else device


@dataclass
class _Layer:
    """A layer of the pruned network that has been reached."""

    call: Call
    read: Read
    name: str
    """Of its weight."""
    target: Target
    outputs: Tensor
    """Which of the unpruned layer's outputs are kept."""

    def zeros(self) -> Tensor:
        """What stands for its output until the sum that it ends in is met."""
        source, channels = self.read.input, len(self.outputs)
        if self.target.last:
            return source.new_zeros(*source.shape[:-1], channels)
        zeros = source.new_zeros(len(source), channels, *self.target.size)
        last = source.ndim == 4 and source.is_contiguous(memory_format=torch.channels_last)
        return zeros.contiguous(memory_format=torch.channels_last) if last else zeros


class _Solver(Watch):
    """Fits each layer of a pruned network when it is reached; one that ends in a sum, when that is."""

    def __init__(
        self,
        model: nn.Module,
        graph: ChannelGraph,
        mask: NDArray[np.bool_],
        targets: Targets,
        fits: dict[Place, _Fit],
        settings: Fitting,
        exact: dict[str, Tensor],
    ) -> None:
        super().__init__(model)
        self.graph, self.kept, self.targets, self.fits = graph, np.append(mask, True), targets, fits
        self.settings, self.exact = settings, exact
        self.buffers = dict(model.named_buffers())
        self.pending: dict[Place, _Layer] = {}
        """Layers that run at the sum that they end in, when its other branch is known."""
        self.late: list[_Layer] = []
        """Layers that are changed at the end."""

    def before(self, call: Call) -> Callable[[], Tensor] | None:
        """Fit the layer that this call is, or whose output it adds to another branch."""
        if call.place in self.pending:
            self._run_at_sum(self.pending.pop(call.place), call.tensors)
        target = self.targets.layers.get(call.place)
        if target is None or call.read is None or call.part is None or call.part.name != target.part.name:
            return None
        layer = _Layer(call, call.read, call.part.name, target, self._outputs(target))
        if target.sum is not None:
            self.pending[target.sum.place] = layer
            return layer.zeros
        self._collect(layer, target.values[:, layer.outputs])
        if self.settings.follow:
            self._set(layer)
        else:
            self.late.append(layer)
        return None

    def finish(self) -> None:
        """Change the layers that were left for later.

        Raises:
            PruningError: a sum was not met, so that what ran after its layer is wrong.
        """
        if self.pending:
            raise PruningError(
                "`recovery` should fit the network. Received reconstruct, but the pruned network does not run the sums "
                f"of the unpruned one ({next(iter(self.pending.values())).name}). Choose compensate."
            )
        for layer in self.late:
            self._set(layer)

    def _run_at_sum(self, layer: _Layer, operands: list[Tensor]) -> None:
        """Fit a layer to the sum minus the present other branch, and add its output to where it sent zeros."""
        target, found = layer.target, layer.target.sum
        assert found is not None
        other = found.branch_at(operands[1 - found.operand], target.positions, target.last).float()
        missing = found.other[:, layer.outputs] - other
        scale = None if found.trail.scale is None else found.trail.scale[layer.outputs]
        if scale is not None:
            usable = scale.abs() > _SMALLEST_SCALE * scale.abs().max()
            missing = torch.where(usable, missing / torch.where(usable, scale, 1.0), 0.0)
        self._collect(layer, target.values[:, layer.outputs] + missing)
        shift = None
        if self.settings.follow:
            shift = self._set(layer)
        else:
            self.late.append(layer)
        output = _scaled(layer.call.run(), scale, shift, target.last)
        for step in found.trail.redo:
            output = step(output)
        operands[found.operand].add_(output)

    def _outputs(self, target: Target) -> Tensor:
        """Which of the unpruned layer's outputs are kept."""
        width = target.values.shape[1]
        operations = [one for one in self.graph.operations if one.weight == target.part.name]
        if len(operations) == 1 and len(operations[0].outputs) == width:
            units = operations[0].outputs
        else:
            axis = self.graph.axes.get((target.part.name, target.outputs))
            units = np.full(width, -1) if axis is None else axis[target.part.first : target.part.first + width]
        return torch.from_numpy(np.flatnonzero(self.kept[units])).to(target.values.device)

    def _collect(self, layer: _Layer, wanted: Tensor) -> None:
        """Add what is wanted of a layer at its positions ``(R, C)`` to its equations."""
        read, target = layer.read, layer.target
        fit = self.fits.get(layer.call.place)
        if fit is None:
            fit = self.fits[layer.call.place] = self._fit(layer)
        groups, width, unknowns = fit.start.shape
        count = min(len(target.positions), self.settings.rows(unknowns))
        step = max(1, _CHUNK // (groups * unknowns))
        for first in range(0, count, step):
            part = slice(first, min(first + step, count))
            rows = read.rows(target.size, target.positions[part])
            fit.add(rows, wanted[part].unflatten(1, (groups, width)).transpose(0, 1))

    def _fit(self, layer: _Layer) -> _Fit:
        """Equations that start from the layer's present weights."""
        bias, mean = layer.read.bias, layer.target.mean
        name = None if bias is None else self.names.get(id(_base(bias)))
        intercept = name is not None
        bias = self.exact.get(name, bias) if name is not None else bias
        if bias is None and mean is not None and mean.name in self.buffers:
            # a mean that has changed since is a bias in its place
            bias, intercept = mean.values[layer.outputs] - self.buffers[mean.name], True
        weight = self.exact.get(layer.name, layer.read.weight)
        return _Fit(layer.name, layer.read, weight, bias, intercept=intercept, double=self.settings.double)

    def _set(self, layer: _Layer) -> Tensor | None:
        """Solve a layer's equations and give it the solution.

        Returns:
            What a changed mean of the normalisation behind it adds to the layer's output ``(C,)``.
        """
        fit, read = self.fits[layer.call.place], layer.read
        matrix, shift = fit.solve(self.settings.ridge)
        weight = read.weight_of(matrix)
        if layer.name in self.exact:
            self.exact[layer.name] = weight.to(self.exact[layer.name].dtype).contiguous()
        read.weight.copy_(weight)
        if not fit.intercept:
            return None
        assert fit.bias is not None
        if read.bias is not None:
            bias = fit.bias + shift
            read.bias.copy_(bias)
            name = self.names[id(_base(read.bias))]
            if name in self.exact:
                self.exact[name] = bias.to(self.exact[name].dtype)
            return None
        assert layer.target.mean is not None
        mean = self.buffers[layer.target.mean.name]
        before = mean.clone()
        mean.copy_(layer.target.mean.values[layer.outputs] - fit.bias - shift)
        return before - mean


def _scaled(output: Tensor, scale: Tensor | None, shift: Tensor | None, last: bool) -> Tensor:
    """``scale (output + shift)``, channel by channel."""
    if last:
        output = output if shift is None else output + shift.to(output.dtype)
        return output if scale is None else output * scale.to(output.dtype)
    channels = output.shape[1]
    mean = torch.zeros(channels, device=output.device) if shift is None else -shift.float()
    ones = torch.ones(channels, device=output.device)
    # one fused kernel, several times as fast as two broadcast operations
    return torch.batch_norm(output, scale, None, mean, ones, False, 0.0, 0.0, False)


def _base(tensor: Tensor) -> Tensor:
    return tensor if tensor._base is None else tensor._base
