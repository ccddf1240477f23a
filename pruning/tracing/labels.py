"""Channel labels: which indices of which tensors are one channel.

A *field* is an integer array with as many dimensions as the tensor it describes, each either 1 (the label
does not depend on this dimension) or of full size. The activation ``(B, C, H, W)`` of a convolution carries
one field of shape ``(1, C, 1, 1)``; a weight ``(O, I, kH, kW)`` carries one field per dimension. A tensor may
carry several fields as long as no two of them vary along the same dimension.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Field: TypeAlias = NDArray[np.int64]
Shape: TypeAlias = Sequence[int]


class LabelBook:
    """Issues labels and remembers which are the same channel and which may not be removed.

    Unions are only noted while the network runs and resolved once at the end, which is linear in their
    number.
    """

    def __init__(self) -> None:
        self.count = 0
        self._left: list[NDArray[np.int64]] = []
        self._right: list[NDArray[np.int64]] = []
        self._frozen: list[tuple[NDArray[np.int64], str]] = []
        self._produced: list[NDArray[np.int64]] = []
        self._products: list[NDArray[np.int64]] = []

    def fresh(self, count: int) -> NDArray[np.int64]:
        """``count`` labels never used before, ``(count,)``."""
        labels = np.arange(self.count, self.count + count, dtype=np.int64)
        self.count += count
        return labels

    def unite(self, left: NDArray[np.int64], right: NDArray[np.int64]) -> None:
        """Declare two broadcastable arrays of labels equal, element by element."""
        a, b = np.broadcast_arrays(left, right)
        self._left.append(a.ravel())
        self._right.append(b.ravel())

    @property
    def unions(self) -> int:
        """How often labels were declared equal."""
        return len(self._left)

    def freeze(self, labels: NDArray[np.int64], reason: str) -> None:
        """These channels may not be removed, and why. The first reason given is the one reported."""
        self._frozen.append((labels.ravel(), reason))

    def produce(self, labels: NDArray[np.int64]) -> None:
        """Mark labels as made by a layer: only those are candidates for pruning."""
        self._produced.append(labels.ravel())

    def product(self, labels: NDArray[np.int64]) -> None:
        """What stays of this array, which varies along several dimensions, must be a box."""
        self._products.append(labels.squeeze())

    def resolve(self) -> tuple[NDArray[np.int64], dict[int, str], NDArray[np.bool_]]:
        """Close the book.

        Returns:
            The representative of each label ``(labels,)``; the reason of each frozen representative; whether
            a representative was produced by a layer ``(labels,)``.
        """
        roots = self._components()
        for product in self._products:
            axes = varying(roots[product])
            if len(axes) > 1:
                # undecided: the last dimension shrinks, as it does where groups of channels are a constant of the code
                for axis in axes[:-1]:
                    self.unite(product, product.take([0], axis=axis))
                roots = self._components()
        reasons: dict[int, str] = {}
        for labels, reason in self._frozen:
            for root in np.unique(roots[labels]).tolist():
                reasons.setdefault(root, reason)
        produced = np.zeros(self.count, dtype=np.bool_)
        produced[roots[_concatenated(self._produced)]] = True
        return roots, reasons, produced

    def _components(self) -> NDArray[np.int64]:
        left, right = _concatenated(self._left), _concatenated(self._right)
        links = coo_matrix((np.ones(len(left), dtype=np.int8), (left, right)), shape=(self.count, self.count))
        roots: NDArray[np.int64] = connected_components(links, directed=False)[1].astype(np.int64)
        return roots


def varying(values: NDArray[np.int64]) -> list[int]:
    """Axes along which an array is not constant."""
    return [axis for axis in range(values.ndim) if (values != values.take([0], axis=axis)).any()]


def _concatenated(parts: Iterable[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([np.empty(0, dtype=np.int64), *parts])


def along(labels: NDArray[np.int64], dim: int, ndim: int) -> Field:
    """The field of a tensor with ``ndim`` dimensions whose dimension ``dim`` bears ``labels``."""
    shape = [1] * ndim
    shape[dim] = len(labels)
    return labels.reshape(shape)


def support(field: Field) -> frozenset[int]:
    """The dimensions along which a field varies."""
    return frozenset(dim for dim, size in enumerate(field.shape) if size > 1)


def lifted(field: Field, ndim: int) -> Field:
    """The field with leading dimensions added, as broadcasting does."""
    return field.reshape((1,) * (ndim - field.ndim) + field.shape)


def reshaped(field: Field, old: Shape, new: Shape) -> Field:
    """Follow ``tensor.view(new)`` of a tensor of shape ``old``.

    Dimensions are matched in blocks of equal product, and within a block the field is spelled out and
    reshaped; a dimension along which the result turns out constant is folded back to 1.
    """
    shape: list[int] = []
    expanded: list[int] = []
    for old_block, new_block in _blocks(old, new):
        varies = any(field.shape[dim] > 1 for dim in old_block)
        expanded += [old[dim] if varies else 1 for dim in old_block]
        shape += [new[dim] if varies else 1 for dim in new_block]
    result = np.broadcast_to(field, expanded).reshape(shape) if expanded else field.reshape(shape)
    for dim, size in enumerate(result.shape):
        if size > 1:
            first = result.take([0], axis=dim)
            if (result == first).all():
                result = first
    return np.ascontiguousarray(result)


def _blocks(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Minimal runs of old and new dimensions with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a = b = 1
        if i < len(old):
            left.append(i)
            a *= old[i]
            i += 1
        if j < len(new):
            right.append(j)
            b *= new[j]
            j += 1
        while a != b:
            if a < b:
                left.append(i)
                a *= old[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        blocks.append((left, right))
    return blocks
