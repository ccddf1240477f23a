"""Peak memory of activations: what a forward pass has to hold at once, parameters apart.

Defined for one example and the operations in the order in which the network runs them, in evaluation mode:

- A tensor lives from the operation that makes it to the last operation that reads it; the network's inputs live
  from the start, its outputs to the end.
- At each operation, the bytes of all tensors that live then are added up: its inputs, its outputs, and what later
  operations still need. The largest of these sums is the peak.
- Views share the memory of their base, which lives as long as any of them is read. Operations in place need no
  memory of their own.
- Parameters, buffers and views of them do not count. What an operation returns beside its result and nothing reads
  (the indices of a max pooling) does not count either, nor what a kernel needs while it runs.

So the number depends on the network and not on how long Python variables happen to hold a tensor. PyTorch itself
needs at least as much; runtimes that fuse operations or work in place can need less.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.modes import evaluating, operation_by_operation
from prunegym.pruning.nests import tensors_in

MIB = 2**20


@dataclass(frozen=True)
class PeakMemory:
    """The most that activations of one example take at once."""

    bytes: int
    """In the network's own precision: 4 bytes a number in float32."""
    module: str
    """Path of the module that runs when it is reached; empty for the network itself."""
    operation: str
    """The operation that is reached there, such as ``aten.convolution``."""

    @property
    def mib(self) -> float:
        """In MiB (2^20 bytes)."""
        return self.bytes / MIB


def peak_memory(model: nn.Module, example_inputs: Tensor | tuple[Any, ...]) -> PeakMemory:
    """Peak activation memory of a network for one example, from one observed forward pass.

    Args:
        model: any network; it runs in evaluation mode on its own device and is left as it was found.
        example_inputs: a tensor with a batch dimension, or a tuple of inputs for ``model(*inputs)``; of a batch
            the first example is taken.

    Returns:
        The peak, and where it is reached. 0 bytes for a network that does nothing.
    """
    device = next((one.device for one in model.parameters()), torch.device("cpu"))
    # cloned, because an input that is a part of a larger tensor would bring all of its memory
    inputs = tree_map_only(Tensor, lambda leaf: leaf.to(device, copy=True), with_batch(example_inputs, 1))
    watch = StorageWatch([*model.parameters(), *model.buffers()])
    with evaluating(model), operation_by_operation(), torch.no_grad(), _running_module(model, watch.modules):
        watch.begin([leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)])
        with watch:
            outputs = model(*inputs)
        watch.end(tensors_in(outputs))
    return watch.peak()


@dataclass
class Life:
    """When a piece of memory is made and needed."""

    # while it is held, the address is not given to another storage; the memory itself is free to go
    reference: StorageWeakRef
    size: int
    born: int
    last: int | None = None
    """The last operation that needs it; None if nothing does."""


class StorageWatch(TorchDispatchMode):
    """Sees every operation of a forward pass, and notes when each piece of memory is made and read.

    Args:
        constants: parameters and buffers, whose memory does not count.
    """

    def __init__(self, constants: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.modules: list[str] = [""]
        self.made: list[Tensor] = []
        """Tensors whose memory is new; whoever wants to look at them takes them off."""
        self._steps: list[tuple[str, str]] = []
        self.lives: dict[int, Life] = {}
        self._constants = [reference for one in constants if (reference := storage_of(one)) is not None]
        self._constant_addresses = {reference.cdata for reference in self._constants}

    @property
    def steps(self) -> int:
        """Operations seen so far."""
        return len(self._steps)

    def begin(self, inputs: Sequence[Tensor]) -> None:
        """Note the network's inputs."""
        for tensor in inputs:
            self._note(tensor, 0)

    def end(self, outputs: Sequence[Tensor]) -> None:
        """Note the network's outputs, which live to the end."""
        for tensor in outputs:
            self._read(tensor, max(0, len(self._steps) - 1))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and note what it reads and makes."""
        self.made.clear()
        result = func(*args, **(kwargs or {}))
        outputs = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        new = [tensor for tensor in outputs if not self._knows(tensor)]
        if outputs and not new and not func._schema.is_mutable:
            return result  # a view: nothing is computed, and nothing is read yet
        step = len(self._steps)
        self._steps.append((self.modules[-1], str(func).rpartition(".")[0]))
        for leaf in tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._read(leaf, step)
        for tensor in new:
            self._note(tensor, step)
        return result

    def peak(self) -> PeakMemory:
        """The largest sum of what lives at an operation."""
        steps = self._steps or [("", "")]  # a network that does nothing still has its input
        most, step = largest_sum([(life.born, life.last, life.size) for life in self.lives.values()], len(steps))
        return PeakMemory(most, *steps[step])

    def _knows(self, tensor: Tensor) -> bool:
        reference = storage_of(tensor)
        return reference is None or reference.cdata in self._constant_addresses or reference.cdata in self.lives

    def _note(self, tensor: Tensor, step: int) -> None:
        """A piece of memory that is new at a step."""
        reference = storage_of(tensor)
        if reference is not None and not self._knows(tensor):
            self.lives[reference.cdata] = Life(reference, tensor.untyped_storage().nbytes(), step)
            self.made.append(tensor)

    def _read(self, tensor: Tensor, step: int) -> None:
        """A piece of memory that is needed at a step."""
        reference = storage_of(tensor)
        life = None if reference is None else self.lives.get(reference.cdata)
        if life is not None:
            life.last = step


def largest_sum(lives: Iterable[tuple[int, int | None, int]], steps: int) -> tuple[int, int]:
    """The largest sum of bytes that live at one step, and the first step where it is reached.

    Args:
        lives: of each piece of memory the step that makes it, the last that needs it (None if nothing does) and its
            bytes.
        steps: number of steps.
    """
    changes = [0] * (steps + 1)
    for born, last, size in lives:
        if last is not None:
            changes[born] += size
            changes[last + 1] -= size
    live = list(accumulate(changes[:-1]))
    most = max(live)
    return most, live.index(most)


def storage_of(tensor: Tensor) -> StorageWeakRef | None:
    """A weak reference to a tensor's memory; None where there is none of the usual kind (sparse tensors)."""
    try:
        return StorageWeakRef(tensor.untyped_storage())
    except (NotImplementedError, RuntimeError):
        return None


@contextmanager
def _running_module(model: nn.Module, stack: list[str]) -> Iterator[None]:
    """Keep the path of the running module on ``stack``."""

    def leave(_module: nn.Module, _inputs: Any, _output: Any) -> None:
        stack.pop()

    handles = []
    for name, module in model.named_modules():
        if module is model:
            continue

        def enter(_module: nn.Module, _inputs: Any, name: str = name) -> None:
            stack.append(name)

        handles += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
