"""Residual blocks that can be left out: depth as something to prune, beside width.

A module is a *block* if it gives back its input when its parameters are zero: an identity shortcut around a branch that
is then empty. Removing it replaces it by :class:`RemovedBlock`; its masked twin has its parameters set to zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from prunegym.pruning.copies import duplicate
from prunegym.pruning.graph import ChannelGraph
from prunegym.pruning.modes import evaluating


class RemovedBlock(nn.Module):
    """Stands where a residual block was: gives back its first argument."""

    def forward(self, x: Tensor, *_args: Any, **_kwargs: Any) -> Tensor:
        """Return ``x``."""
        return x


def find_blocks(model: nn.Module, graph: ChannelGraph, inputs: tuple[Any, ...]) -> tuple[str, ...]:
    """Paths of the blocks of a network, in the order in which they run.

    Of blocks inside one another the innermost count; blocks without layers that cost anything do not.

    Args:
        model: any network; run in eval mode and not changed.
        graph: its channel graph.
        inputs: example inputs.
    """
    shared = _shared_parameters(model)
    costly = [operation.module for operation in graph.operations]
    found: list[str] = []

    def look(path: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Modules finish from the inside out, so an inner block is found before the outer one is asked."""
        if not args or not isinstance(args[0], Tensor) or not isinstance(output, Tensor):
            return
        inner = any(inside(one, path) for one in found)
        if inner or args[0].shape != output.shape or not any(inside(one, path) for one in costly):
            return
        if any(id(one) in shared for one in module.parameters()) or path in runs:
            return
        runs.add(path)
        twin = emptied(duplicate(module))
        for part in twin.modules():  # copied with the hooks that brought us here
            part._forward_hooks.clear()
        if torch.equal(twin(*args, **kwargs), args[0]):
            found.append(path)

    runs: set[str] = set()
    with evaluating(model), torch.no_grad(), _watching(model, look):
        model(*inputs)
    return tuple(found)


@contextmanager
def _watching(model: nn.Module, look: Any) -> Iterator[None]:
    """Call ``look`` after each module that has run, except the network itself."""
    handles = []
    for path, module in model.named_modules():
        if path and any(True for _ in module.parameters()):

            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any, path: str = path) -> None:
                look(path, module, args, kwargs, output)

            handles.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shared_parameters(model: nn.Module) -> set[int]:
    """Parameters that have several names."""
    seen: dict[int, int] = {}
    for _, one in model.named_parameters(remove_duplicate=False):
        seen[id(one)] = seen.get(id(one), 0) + 1
    return {key for key, count in seen.items() if count > 1}


def emptied(module: nn.Module) -> nn.Module:
    """The module with all its parameters set to zero, in place."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    return module


def remove_blocks(model: nn.Module, paths: Collection[str]) -> None:
    """Put :class:`RemovedBlock` in the place of blocks, in place."""
    for path in paths:
        parent, _, leaf = path.rpartition(".")
        owner = model.get_submodule(parent)
        owner._modules[leaf] = RemovedBlock()  # works for containers too, whose children have numbers for names


def inside(path: str, block: str) -> bool:
    """Whether a module path is that of a block or of something in it."""
    return path == block or path.startswith(f"{block}.")


def in_any(path: str, blocks: Collection[str]) -> bool:
    """Whether a module or tensor path lies in one of several blocks."""
    return any(inside(path, block) for block in blocks)
