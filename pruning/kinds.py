"""Kinds of networks that cannot be pruned as they are, and what to do about it."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.prune import BasePruningMethod
from torch.utils._pytree import tree_leaves

from prunegym.pruning.copies import duplicate
from prunegym.pruning.errors import PruningError

_SHOWN = 3


def check_kind(model: nn.Module) -> None:
    """Refuse what is compiled: its layers can be neither watched nor replaced.

    Raises:
        PruningError: The model, or a part of it, is.
    """
    for path, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            by, remedy = "torch.jit", "the module that it was made of"
        elif hasattr(module, "_orig_mod"):
            by, remedy = "torch.compile", "its attribute _orig_mod, and compile the pruned network"
        else:
            continue
        raise PruningError(
            f"`network` should be made of modules in Python. Received {type(module).__name__}"
            f"{f' at {path}' if path else ''}, compiled by {by}. Give {remedy}."
        )


def warn_of_masks(model: nn.Module) -> None:
    """Say that masks of :mod:`torch.nn.utils.prune` are in the way: weights under them are computed in each pass."""
    masked = [
        path or type(module).__name__
        for path, module in model.named_modules()
        if any(isinstance(hook, BasePruningMethod) for hook in module._forward_pre_hooks.values())
    ]
    if masked:
        some = ", ".join(masked[:_SHOWN]) + (", ..." if len(masked) > _SHOWN else "")
        warnings.warn(
            f"{some} hold masks of torch.nn.utils.prune, "
            "so what they make and read cannot be pruned: call torch.nn.utils.prune.remove for each of them before.",
            stacklevel=3,
        )


def in_python(model: nn.Module) -> nn.Module:
    """The network, or a copy where its method ``compile`` was called: copies of modules are not compiled."""
    called = any(module._compiled_call_impl is not None for module in model.modules())
    return duplicate(model) if called else model


def cannot_run(model: nn.Module, inputs: tuple[Any, ...], name: str, fault: Exception) -> PruningError:
    """Describe a network that does not run on its example; the error is returned, not raised."""
    tensors = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]
    own, given = _float_types([*model.parameters()]), _float_types(tensors)
    if any(is_lazy(one) for one in (*model.parameters(), *model.buffers())):
        remedy = "Run it once on such inputs, which gives its lazy layers their shape."
    elif own and given and not own & given:
        kinds = (str(*kind).removeprefix("torch.") if len(kind) == 1 else "others" for kind in (given, own))
        remedy = "Inputs are {} and parameters {}: give model.float().".format(*kinds)
    else:
        remedy = "Give the shape that the network takes."
    return PruningError(
        f"`network` should run on its example input. Received {name} on inputs of shape "
        f"{[tuple(one.shape) for one in tensors]}, which raised {type(fault).__name__}: {fault}. {remedy}"
    )


def _float_types(tensors: list[Any]) -> set[torch.dtype]:
    return {one.dtype for one in tensors if one.is_floating_point()}
