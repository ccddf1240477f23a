"""Peak activation memory of any plan without running it (what it means: ``memory.py``).

One observed forward pass tells when each piece of memory is made and needed, and the channel labels of the tensor in
it: its size is then a constant times the numbers of channels and heads that are kept.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from prunegym.pruning.deployment.onnx_export import with_batch
from prunegym.pruning.graph import ChannelGraph, Units
from prunegym.pruning.memory import StorageWatch, largest_sum, storage_of
from prunegym.pruning.tracing.labels import Field
from prunegym.pruning.tracing.trace import Trace, trace
from prunegym.pruning.tracing.tracer import Tracer


class MemoryModel:
    """Peak activation memory of all plans of one network, for one example.

    Args:
        model: the unpruned network.
        graph: its channel graph.
        example_inputs: inputs for ``model(*inputs)``; of a batch the first example is taken.
    """

    def __init__(self, model: nn.Module, graph: ChannelGraph, example_inputs: tuple[Any, ...]) -> None:
        inputs = tree_map_only(Tensor, lambda leaf: leaf.clone(), with_batch(example_inputs, 1))
        watch = _LabelledWatch([*model.parameters(), *model.buffers()], inputs)
        seen = trace(model, inputs, beside=watch.beside)
        units = _units_of_roots(seen, graph)
        self._steps = max(1, watch.steps)
        self._pieces: list[tuple[int, int | None, int, list[Units]]] = []
        for address, life in watch.lives.items():
            fields = [units[seen.roots[one]].ravel() for one in watch.labels.get(address, [])]
            fields = [one for one in fields if (one >= 0).any()]
            rest = life.size // prod(len(one) for one in fields)
            self._pieces.append((life.born, life.last, rest, fields))

    def bytes(self, mask: NDArray[np.bool_]) -> int:
        """Peak memory of the plan that keeps the units where ``mask (units,)`` is true, bytes."""
        padded = np.append(mask, True)
        lives = [
            (born, last, rest * prod(int(padded[one].sum()) for one in fields))
            for born, last, rest, fields in self._pieces
        ]
        return largest_sum(lives, self._steps)[0]


class _LabelledWatch(StorageWatch):
    """Notes the labels of the tensor in each piece of memory too."""

    def __init__(self, constants: list[Tensor], inputs: Any) -> None:
        super().__init__(constants)
        self.labels: dict[int, list[Field]] = {}
        self._inputs = [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]

    @contextmanager
    def beside(self, tracer: Tracer) -> Iterator[None]:
        """Watch while a tracer runs, and look up the labels after each operation."""
        self.modules = [""]
        self.begin(self._inputs)

        def after() -> None:
            for tensor in self.made:
                reference = storage_of(tensor)
                if reference is not None:
                    self.labels[reference.cdata] = tracer.record(tensor).fields
            self.made.clear()

        tracer.after = after
        tracer.at_end = self.end
        with self:
            yield


def _units_of_roots(seen: Trace, graph: ChannelGraph) -> Units:
    """Unit of each label's representative in a new trace, by the tensors that both know; -1 if always kept."""
    units = np.full(len(seen.roots) or 1, -1, dtype=np.int64)
    for (name, dim), known in graph.axes.items():
        labels = seen.tensors[name][dim]
        if labels is not None:
            units[seen.roots[labels]] = known
    for mine, theirs in zip(seen.paddings, graph.paddings, strict=True):
        units[seen.roots[mine.before]], units[seen.roots[mine.after]] = theirs.before, theirs.after
    return units
