"""One observed forward pass: operations, channel labels, and what could not be followed.

The network runs once on an example input under a ``TorchDispatchMode``. Every ATen operation is seen with the
real tensors; a rule (``rules.py``) says how the labels of its inputs become those of its outputs. Parameters
and buffers are recognised by identity, so each label knows the slices of the tensors that carry it. An
operation without a rule freezes the labels that enter it; it never stops the trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from prunegym.pruning.attention import headwise
from prunegym.pruning.errors import PruningError
from prunegym.pruning.modes import evaluating, operation_by_operation
from prunegym.pruning.nests import tensors_in
from prunegym.pruning.tracing.labels import Field, varying
from prunegym.pruning.tracing.rules import rule_for
from prunegym.pruning.tracing.size_tags import Place, tagged
from prunegym.pruning.tracing.tracer import ChannelPadding, SizeAttribute, TracedOperation, Tracer


@dataclass
class Trace:
    """Everything one forward pass showed, with labels resolved to representatives."""

    roots: NDArray[np.int64]
    reasons: dict[int, str]
    produced: NDArray[np.bool_]
    tensors: dict[str, list[Field | None]]
    """Label of every index of every dimension of each parameter and buffer; None for dimensions of size 1."""
    operations: list[TracedOperation]
    paddings: list[ChannelPadding]
    sizes: list[SizeAttribute]
    batch_size: int
    unknown_operations: dict[str, str] = field(default_factory=dict)
    """Operations without a rule, with the module path where each was first met."""
    folds: list[tuple[str, str]] = field(default_factory=list)
    """Pairs (convolution, batch normalisation) of modules where the second is all that reads the first."""


def trace(
    model: nn.Module,
    inputs: tuple[Any, ...],
    beside: Callable[[Tracer], AbstractContextManager[Any]] = lambda _: nullcontext(),
) -> Trace:
    """Run ``model(*inputs)`` once and return everything seen.

    Args:
        model: any network; it is run in eval mode without gradients and left as it was found.
        inputs: example inputs; the first dimension of the first tensor is the batch.
        beside: gives another mode that sees the operations too.

    Raises:
        PruningError: what the model returns holds no tensor, so that nothing would tell what must stay.
    """
    leaves = tensors_in(inputs)
    tracer = Tracer(model, leaves[0].shape[0] if leaves and leaves[0].ndim else 1, rule_for)
    with _as_traced(model, tracer.modules), torch.no_grad(), tracer.watch, beside(tracer), tracer:
        for leaf in leaves:
            tracer.note_input(leaf)
        outputs = _outputs(model, inputs)
        for leaf in outputs:
            tracer.freeze(tracer.record(leaf).fields, "network output")
            tracer.note_read(leaf)
        tracer.at_end(outputs)
        tracer.freeze_unread()
    roots, reasons, produced = _resolved(tracer)
    return Trace(
        roots,
        reasons,
        produced,
        tracer.tensors,
        tracer.operations,
        tracer.paddings,
        tracer.sizes,
        tracer.batch_size,
        tracer.unknown,
        tracer.folds(),
    )


def _outputs(model: nn.Module, inputs: tuple[Any, ...]) -> list[Tensor]:
    """The tensors that a model returns."""
    returned = model(*inputs)
    outputs = tensors_in(returned)
    if not outputs:
        raise PruningError(
            "`network` should return tensors: one, or several in tuples, lists, mappings, dataclasses or other objects "
            f"with attributes. Received {type(model).__name__}, which returned {type(returned).__name__} without any. "
            "Return those that the loss and the score are computed from."
        )
    return outputs


def _resolved(tracer: Tracer) -> tuple[NDArray[np.int64], dict[int, str], NDArray[np.bool_]]:
    """Close the book; channels and heads that one attribute counts in several places go together."""
    while True:
        roots, reasons, produced = tracer.book.resolve()
        counted: dict[Place, Field] = {}
        before = tracer.book.unions
        for one in tracer.sizes:
            if one.axis not in varying(roots[one.labels]):
                continue
            place = tuple(slice(None) if axis == one.axis else 0 for axis in range(one.labels.ndim))
            labels = one.labels[place]
            first = counted.setdefault(one.place, labels)
            # the size of something frozen equals that of something else by chance, or else the check will find it
            frozen = any(root in reasons for root in (*roots[first].tolist(), *roots[labels].tolist()))
            if len(first) == len(labels) and not frozen and (roots[first] != roots[labels]).any():
                tracer.book.unite(first, labels)
        if tracer.book.unions == before:
            return roots, reasons, produced


@contextmanager
def _as_traced(model: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """In eval mode, unfused, attention by heads, sizes tagged, and the path of the running module on ``stack``."""
    with evaluating(model), operation_by_operation(), headwise(model), tagged(model), _module_paths(model, stack):
        yield


@contextmanager
def _module_paths(model: nn.Module, stack: list[tuple[str, nn.Module]]) -> Iterator[None]:
    """Keep the path of the running module on ``stack``."""
    handles = []
    for name, module in model.named_modules():
        if module is model:
            continue

        def enter(module: nn.Module, _inputs: Any, name: str = name) -> None:
            stack.append((name, module))

        def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            stack.pop()

        handles.append(module.register_forward_pre_hook(enter))
        handles.append(module.register_forward_hook(leave))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
