"""From a plan and a network to a smaller network, and the masked twin that proves it right."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from prunegym.pruning.attention import can_be_headwise, lost_channels, make_headwise
from prunegym.pruning.blocks import emptied, remove_blocks
from prunegym.pruning.copies import duplicate
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.modes import evaluating


def kept_indices(graph: ChannelGraph, mask: NDArray[np.bool_]) -> dict[tuple[str, int], NDArray[np.int64]]:
    """Indices that stay, for each tensor dimension that shrinks under ``mask (units,)``."""
    padded = np.append(mask, True)  # unit -1 is always kept
    return {axis: np.flatnonzero(padded[units]) for axis, units in graph.axes.items() if not padded[units].all()}


def sliced_tensors(
    model: nn.Module,
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    replacements: Mapping[str, Tensor] | None = None,
) -> dict[str, Tensor]:
    """The parameters and buffers that shrink, cut to the channels kept.

    Args:
        model: the unpruned network.
        graph: its channel graph.
        mask: units kept ``(units,)``.
        replacements: tensors to cut instead of the network's own, such as compensated weights; a dimension
            that has been cut already is left alone.
    """
    tensors = dict([*model.named_parameters(), *model.named_buffers()])
    result: dict[str, Tensor] = dict(replacements or {})
    for (name, dim), indices in kept_indices(graph, mask).items():
        source = result.get(name, tensors[name].detach())
        if source.shape[dim] != len(indices):
            result[name] = source.index_select(dim, torch.from_numpy(indices).to(source.device))
    return result


def rebuilt(
    model: nn.Module,
    graph: ChannelGraph,
    mask: NDArray[np.bool_],
    tensors: Mapping[str, Tensor],
    removed: Collection[str] = (),
) -> nn.Module:
    """A copy of the network with ``tensors`` in place of its own and every size attribute put right.

    Args:
        model: the unpruned network; it is not changed.
        graph: its channel graph.
        mask: units kept ``(units,)``.
        tensors: replacements by name, as from :func:`sliced_tensors`; others are cloned.
        removed: paths of residual blocks to leave out.
    """
    memo: dict[int, object] = {}
    for name, parameter in model.named_parameters():
        data = tensors[name] if name in tensors else parameter.detach().clone()
        memo[id(parameter)] = nn.Parameter(data, requires_grad=parameter.requires_grad)
    for name, buffer in model.named_buffers():
        memo[id(buffer)] = tensors[name] if name in tensors else buffer.detach().clone()
    smaller = duplicate(model, memo)
    remove_blocks(smaller, removed)
    modules = dict(smaller.named_modules())
    padded = np.append(mask, True)
    for padding in (one for one in graph.paddings if one.module in modules):
        amounts = (int(padded[padding.before].sum()), int(padded[padding.after].sum()))
        setattr(modules[padding.module], "channel_padding", amounts)  # noqa: B010
    set_sizes(smaller, graph, mask)
    for module in modules.values():
        refresh_sizes(module)
    return smaller


def set_sizes(model: nn.Module, graph: ChannelGraph, mask: NDArray[np.bool_]) -> None:
    """Make attributes that hold numbers of channels or heads follow the units kept."""
    modules = dict(model.named_modules())
    padded = np.append(mask, True)
    for module in modules.values():
        if can_be_headwise(module) and lost_channels(module):
            make_headwise(module)
    for rule in graph.size_rules:
        module, count = modules.get(rule.place.module), int(padded[rule.units].sum())
        if module is None or count == len(rule.units):
            continue
        name, index = rule.place.name, rule.place.index
        before = getattr(module, name)
        parts = [count if at == index else one for at, one in enumerate(before)] if index is not None else []
        setattr(module, name, count if index is None else type(before)(parts))


def refresh_sizes(module: nn.Module) -> None:
    """Make a layer's size attributes agree with the shapes of its tensors."""
    if is_parametrized(module):
        # to look at a computed weight is to compute it, which spectral normalisation remembers in training mode
        with evaluating(module):
            _refresh_sizes(module, getattr(module, "weight", None))
    else:
        _refresh_sizes(module, getattr(module, "weight", None))


def _refresh_sizes(module: nn.Module, weight: object) -> None:
    if isinstance(module, nn.modules.conv._ConvNd) and isinstance(weight, Tensor):
        transposed = module.transposed
        first, second = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if transposed else (second, first)
    elif isinstance(module, nn.Linear) and isinstance(weight, Tensor):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.modules.batchnorm._NormBase):
        tensor = weight if isinstance(weight, Tensor) else module.running_mean
        if isinstance(tensor, Tensor):
            module.num_features = tensor.shape[0]
    elif isinstance(module, nn.GroupNorm) and isinstance(weight, Tensor):
        module.num_channels = weight.shape[0]


def prune_network(
    model: nn.Module, graph: ChannelGraph, mask: NDArray[np.bool_], removed: Collection[str] = ()
) -> nn.Module:
    """The physically smaller network: same class, same interface, fewer channels, and without some blocks."""
    return rebuilt(model, graph, mask, sliced_tensors(model, graph, mask), removed)


def masked_network(
    model: nn.Module, graph: ChannelGraph, mask: NDArray[np.bool_], removed: Collection[str] = ()
) -> nn.Module:
    """The network at full size with every use of a removed channel, and every removed block, set to zero.

    Only the weights that *read* a removed channel are zeroed, so this computes by other means what the
    smaller network must compute: the check of surgery.
    """
    twin = duplicate(model)
    tensors = dict(twin.named_parameters())
    padded = np.append(mask, True)
    with torch.no_grad():
        for operation in graph.operations:
            if not operation.mixes or operation.weight is None:
                continue
            gone = torch.from_numpy(np.flatnonzero(~padded[operation.inputs]))
            weight = tensors[operation.weight]
            weight.index_fill_(operation.reads, gone.to(weight.device), 0.0)
    for path in removed:
        emptied(twin.get_submodule(path))
    return twin
