"""Memory layout of images and weights: channels last, which convolutions prefer, where a network's code bears it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import overload

import torch
from torch import Tensor, nn

from prunegym.pruning.modes import evaluating, training_mode
from prunegym.pruning.task import Inputs, Task

CHANNELS_LAST, CONTIGUOUS = torch.channels_last, torch.contiguous_format


def layout_for(model: nn.Module, inputs: Inputs, *, training: bool = False) -> torch.memory_format:
    """The layout in which a network should run: one forward pass of two examples tells.

    ``x.view(len(x), -1)``, which flattens images in much code, raises on what is laid out with channels last. Weights
    are laid out too: images of one channel are the same in either layout, and what a convolution gives is not.

    Args:
        model: The network; it is left as it is.
        inputs: A batch in any layout.
        training: Ask in training mode, where other code may run.

    Returns:
        ``torch.channels_last`` for a tensor of images that the network takes so, ``torch.contiguous_format`` else.
    """
    if isinstance(inputs, tuple) or inputs.ndim != 4:
        return CONTIGUOUS
    tensors = {name: one.detach().clone() for name, one in model.named_buffers()}  # training changes them
    if _takes_layouts(model):
        tensors |= {name: laid_out(one.detach(), CHANNELS_LAST) for name, one in model.named_parameters()}
    generators, mode = range(torch.cuda.device_count()), training_mode if training else evaluating
    with mode(model), torch.no_grad(), torch.random.fork_rng(devices=generators):
        try:
            torch.func.functional_call(model, tensors, (laid_out(inputs[:2], CHANNELS_LAST),))
        except Exception:  # what else is wrong shows when the network runs in the ordinary layout
            return CONTIGUOUS
    return CHANNELS_LAST


def layout_on(model: nn.Module, task: Task, split: str, device: torch.device | str) -> torch.memory_format:
    """The layout in which to train a network on a task, as :func:`layout_for`; global generators stay as they are."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        batch = next(iter(task.batches(split, batch_size=2, limit=2, device=device)), None)
    return CONTIGUOUS if batch is None else layout_for(model, batch[0], training=True)


def common(layouts: Iterable[torch.memory_format]) -> torch.memory_format:
    """The layout that suits all: channels last if that is what each should run in."""
    return CHANNELS_LAST if all(one is CHANNELS_LAST for one in layouts) else CONTIGUOUS


@overload
def laid_out(inputs: Tensor, memory_format: torch.memory_format) -> Tensor: ...


@overload
def laid_out(inputs: Inputs, memory_format: torch.memory_format) -> Inputs: ...


def laid_out(inputs: Inputs, memory_format: torch.memory_format) -> Inputs:
    """A tensor of images in a layout; other inputs as they are."""
    if isinstance(inputs, Tensor) and inputs.ndim == 4:
        return inputs.contiguous(memory_format=memory_format)
    return inputs


def lay_out(model: nn.Module, memory_format: torch.memory_format) -> None:
    """Change the layout of 4-D weights, in place; networks with 5-D ones keep theirs."""
    if _takes_layouts(model):
        model.to(memory_format=memory_format)


def _takes_layouts(model: nn.Module) -> bool:
    return all(parameter.ndim < 5 for parameter in model.parameters())
