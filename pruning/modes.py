"""Modes of networks: training or evaluation, which parameters have gradients, and whether kernels are fused."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def evaluating(model: nn.Module | None) -> Iterator[None]:
    """Put a network in evaluation mode, and afterwards each of its modules back in its own."""
    modes = [] if model is None else [(module, module.training) for module in model.modules()]
    try:
        if model is not None:
            model.train()  # which is where networks drop what they computed once and kept for inference
            model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def training_mode(model: nn.Module) -> Iterator[None]:
    """Put a network in training mode, and afterwards each of its modules back in its own."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.train()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def differentiating(model: nn.Module, parameters: Collection[str] = ()) -> Iterator[None]:
    """Let the named parameters have gradients and no others; afterwards each is as it was."""
    states = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in parameters)
        yield
    finally:
        for parameter, state in states:
            parameter.requires_grad_(state)


@contextmanager
def operation_by_operation() -> Iterator[None]:
    """Let ``nn.TransformerEncoderLayer`` run its layers one by one; its fused kernel would hide them from observers."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
