"""What the weights of a channel are worth to the loss: those that make it, and those that read it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_leaves

from prunegym.pruning.importance.context import Calibration, Context
from prunegym.pruning.modes import differentiating, evaluating
from prunegym.pruning.task import forward

Slices: TypeAlias = dict[str, list[tuple[int, Tensor]]]
"""For each parameter, dimensions and the unit of each index along them. Indices that are always kept belong to a
unit behind the last."""

GRADIENT_BATCH = 8
"""Examples per gradient. One alone takes twice as long (ResNet-20, one thread); large batches are few, and what
examples disagree about is lost in their means."""


@dataclass(frozen=True)
class WeightChanges:
    r"""Changes of the loss per unit ``(units,)``; units that are gone hold 0.

    :math:`g` is a gradient, :math:`w` a weight, and :math:`E` the mean over batches or examples.
    """

    first: NDArray[np.float64]
    r"""First-order change without what makes the unit: :math:`E_b | \sum_{s \in making} g_{bs} w_s |`."""
    second: NDArray[np.float64]
    r"""Second-order term of what reads it: :math:`\frac 1 2 \sum_{s \in reading} E_n[g_{ns}^2] w_s^2`."""


def collect_weight_changes(context: Context, calibration: Calibration) -> WeightChanges:
    """Run calibration examples forward and backward in small batches, down to the weights.

    Args:
        context: the network, run in eval mode and not changed.
        calibration: the examples.

    Returns:
        Changes of all units.
    """
    making, reading = weight_slices(context)
    parameters = dict(context.model.named_parameters())
    folded = {**{name: parameters[name].detach() for name in making}, **_shifts(context.model)}
    weights = {name: parameters[name] for name in {**making, **reading}}
    examples = batches = 0
    first = torch.zeros(context.graph.units + 1, dtype=torch.float64)
    total, squares = ({name: torch.zeros_like(weights[name].detach()) for name in reading} for _ in range(2))
    with evaluating(context.model), differentiating(context.model, weights), torch.enable_grad():
        for inputs, targets in calibration.batches(GRADIENT_BATCH):
            count = next(len(leaf) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor))
            loss = calibration.task.loss(forward(context.model, inputs), targets)
            gradients = _gradients(loss, weights)
            change = _per_unit({name: gradients[name] * folded[name] for name in making}, making, len(first))
            first += change.abs() * count
            for name in reading:
                total[name].add_(gradients[name], alpha=count)
                squares[name].addcmul_(gradients[name], gradients[name], value=count)
            examples, batches = examples + count, batches + 1
    curvature = {
        name: mean_square(total[name], squares[name], examples, batches) * weights[name].detach().square() / 2
        for name in reading
    }
    second = _per_unit(curvature, reading, len(first))
    return WeightChanges((first / max(examples, 1))[:-1].numpy(), second[:-1].numpy())


def weight_slices(context: Context) -> tuple[Slices, Slices]:
    """The parameters that make channels and those that read them.

    What reads a channel are slices of the next layers' weights. What makes it are the filters of the layers that sum
    other channels up to it, and whatever is added after them: biases, and shifts of batch normalisation. What
    multiplies the channel on its way (scales, depthwise filters, slopes) is neither: the channel is nothing
    already if all that makes it is 0, and to count that again would give weight to some parts of it over others.
    """
    graph = context.graph
    mixing = [one for one in graph.operations if one.mixes]
    reads = {(one.weight, one.reads) for one in mixing}
    makes = {one.weight for one in mixing} | {one.bias for one in graph.operations} | set(_shifts(context.model))
    parameters = dict(context.model.named_parameters())
    making: Slices = defaultdict(list)
    reading: Slices = defaultdict(list)
    for (name, dim), units in graph.axes.items():
        if name in parameters and ((name, dim) in reads or name in makes):
            left = context.remaining(units)
            index = torch.from_numpy(np.where(left < 0, graph.units, left))
            (reading if (name, dim) in reads else making)[name].append((dim, index))
    return dict(making), dict(reading)


def _shifts(model: nn.Module) -> dict[str, Tensor]:
    r"""What each batch normalisation adds, by the name of its bias.

    Folded into the layer before it, it adds :math:`\beta - \gamma \mu / \sigma`. (The filters become
    :math:`\gamma w / \sigma`, and their gradient times weight stays what it was.)
    """
    result = {}
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and module.affine:
            shift = module.bias.detach()
            if module.running_mean is not None and module.running_var is not None:
                deviation = (module.running_var + module.eps).sqrt()
                shift = shift - module.weight.detach() * module.running_mean / deviation
            result[f"{path}.bias"] = shift
    return result


def mean_square(total: Tensor, squares: Tensor, examples: int, batches: int) -> Tensor:
    r"""Mean square over examples of a quantity of which only the means of batches are known.

    The mean of a batch of :math:`b` examples has the variance of one example over :math:`b`, so that of one
    example is estimated by :math:`(\sum_i b_i m_i^2 - N \bar m^2) / (k - 1)`, and the mean square is the
    squared mean plus :math:`1 - 1 / N` times that: unbiased, and exact for batches of one.

    Args:
        total: sum over batches of examples times mean.
        squares: sum over batches of examples times squared mean.
        examples: :math:`N`.
        batches: :math:`k`; of a single one nothing is known but its squared mean.
    """
    mean = total / max(examples, 1)
    if batches < 2:
        return mean.square()
    variance = (squares - examples * mean.square()).clamp(min=0) / (batches - 1)
    return mean.square() + variance * (1 - 1 / examples)


def _gradients(loss: Tensor, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients of all weights; 0 for those that the loss does not depend on."""
    if not loss.requires_grad:
        return {name: torch.zeros_like(weight) for name, weight in weights.items()}
    found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(weights, found, strict=True))


def _per_unit(values: Mapping[str, Tensor], slices: Slices, places: int) -> Tensor:
    """Sum of the elements of each unit's slices ``(places,)``."""
    total = torch.zeros(places, dtype=torch.float64)
    for name, dimensions in slices.items():
        for dim, index in dimensions:
            total.index_add_(0, index, values[name].movedim(dim, 0).reshape(len(index), -1).sum(1).double().cpu())
    return total
