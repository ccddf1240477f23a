"""Training and evaluation mode of networks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
