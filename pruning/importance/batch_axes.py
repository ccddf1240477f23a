"""Which dimension of what a layer reads counts the examples.

Convolutions read ``(B, C, ...)``. Linear layers read ``(..., C)``, and where the examples are is up to the network:
first in most, second in ``nn.TransformerEncoderLayer`` as it is by default. One batch does not tell, because there may
be as many tokens as examples, or a multiple of them. Two batches of different size do: what grows is the batch.

Where an example has several rows in that dimension (windows, frames), they stand one behind another.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from torch import Tensor

from prunegym.pruning.graph import ChannelGraph, Operation

BATCH_SIZES = (2, 3)
"""Of the batches that are compared. Not 1, where networks drop dimensions."""

ShapesRead: TypeAlias = Mapping[tuple[str, int], Sequence[tuple[int, ...]]]
"""Shapes of what linear layers read in one batch, in order, by weight and by number of dimensions."""


@dataclass(frozen=True)
class BatchAxes:
    """The dimension that counts the examples, for what each linear layer reads."""

    found: Mapping[tuple[str, int], int | None] = field(default_factory=dict)
    """By weight and by number of dimensions; None where no dimension, or more than one, grows with the batch."""

    @classmethod
    def compared(cls, few: int, small: ShapesRead, more: int, large: ShapesRead) -> BatchAxes:
        """From the shapes read in a batch of ``few`` examples and in one of ``more``."""
        found: dict[tuple[str, int], int | None] = {}
        for key in small.keys() & large.keys() if few != more else ():
            # one layer may be used several times, also on what belongs to no example: sizes tell that when it runs
            pairs = zip(small[key], large[key], strict=False)
            axes = {_growing(one, other, few, more) for one, other in pairs} - {None}
            found[key] = axes.pop() if len(axes) == 1 and len(small[key]) == len(large[key]) else None
        return cls(found)

    def of(self, operation: Operation, data: Tensor, examples: int) -> int | None:
        """The dimension of ``data``, read by ``operation`` in a batch of so many examples; None where none is known."""
        key = (str(operation.weight), data.ndim)
        if operation.kind != "linear" or examples == 1:
            axis: int | None = 0
        elif key in self.found:
            axis = self.found[key]
        else:
            exact = [dim for dim, size in enumerate(data.shape[:-1]) if size == examples]
            axis = exact[0] if len(exact) == 1 and data.shape[0] % examples else 0
        return axis if axis is not None and data.shape[axis] % examples == 0 else None


def rows_beside_examples(graph: ChannelGraph) -> bool:
    """Whether some linear layer reads more rows than there are examples; else there is nothing to find out."""
    return any(one.mixes and one.kind == "linear" and one.repeats != 1 for one in graph.operations)


def _growing(one: tuple[int, ...], other: tuple[int, ...], few: int, more: int) -> int | None:
    """The dimension that grows with the batch, best one that equals it; the last holds channels."""
    rows = range(len(one) - 1)
    equal = [dim for dim in rows if (one[dim], other[dim]) == (few, more)]
    in_step = [dim for dim in rows if one[dim] != other[dim] and one[dim] * more == other[dim] * few]
    candidates = equal or in_step
    return candidates[0] if len(candidates) == 1 else None
