"""Copies of networks."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves

from prunegym.pruning.errors import PruningError

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))


def duplicate(model: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """A deep copy of a network that may have run.

    What its code computed and kept in attributes, such as features or normalised weights, comes along without its
    history of gradients, which PyTorch does not copy.

    Args:
        model: The network; it is not changed.
        memo: Objects to take in place of others, by their ``id``.

    Raises:
        PruningError: Something in the network cannot be copied.
    """
    known = dict(memo or {})
    for tensor in (*model.buffers(), *_kept(model)):
        if isinstance(tensor, FakeTensor):  # of a run under torch.export: it holds nothing
            known.setdefault(id(tensor), None)
        elif not tensor.is_leaf:
            known.setdefault(id(tensor), tensor.detach().clone())
    try:
        return copy.deepcopy(model, known)
    except Exception as fault:  # whatever the objects in its attributes may raise
        raise PruningError(
            f"`network` should be one that copy.deepcopy copies. Received {type(model).__name__}, which raised "
            f"{type(fault).__name__}: {fault}. Take what is no part of it out of its attributes, such as open files, "
            "locks and generators."
        ) from fault


def _kept(model: nn.Module) -> Iterator[Tensor]:
    """Tensors in attributes of modules that are neither parameters nor buffers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if name not in _OF_EVERY_MODULE and isinstance(value, Tensor | dict | list | tuple):
                yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor))
