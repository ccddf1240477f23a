"""Calls that read a tensor with a weight, as linear maps of sampled rows.

A convolution, transposed convolution, linear layer or matrix product gives, at each *position* of its output, a linear
map of the inputs that its kernel covers there. :class:`Read` holds one call; its rows are gathered at chosen positions
only, so that memory does not depend on the size of the images.

Shapes: ``R`` rows, ``G`` groups, ``U`` unknowns of a group (kernel positions × input channels of a group), ``C`` output
channels, ``O = C / G``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

_CONVOLUTIONS = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_TRANSPOSED = {torch.conv_transpose1d: 1, torch.conv_transpose2d: 2, torch.conv_transpose3d: 3}
_PRODUCTS = {torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm}
_BIASED_PRODUCTS = {torch.addmm, Tensor.addmm}
_CONVOLUTION_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class Read:
    """One call: what it reads, with which weight, and the geometry of its kernel."""

    input: Tensor
    weight: Tensor
    """The parameter, or a view of it: changed in place, the call sees it."""
    bias: Tensor | None
    columns: bool = False
    """The weight is ``(in, out)``, not ``(out, in)``: a matrix product."""
    spatial: int = 0
    """Dimensions of the kernel; 0 for linear layers, whose channels are the last dimension."""
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    """Zeros before the first position of each dimension."""
    dilation: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False

    @property
    def unknowns(self) -> int:
        """``U``: numbers in the kernel of one output channel."""
        if not self.spatial:
            return self.input.shape[-1]
        return self.input.shape[1] // self.groups * prod(self.weight.shape[2:])

    def matrix(self, weight: Tensor) -> Tensor:
        """A weight of this call's shape as ``(G, O, U)``."""
        if not self.spatial:
            return (weight.T if self.columns else weight).unsqueeze(0)
        taps: Tensor = weight.flatten(2).unflatten(0, (self.groups, -1))
        # of a transposed convolution (G, inputs, O, taps), else (G, O, inputs, taps)
        return (taps.permute(0, 2, 3, 1) if self.transposed else taps.transpose(2, 3)).flatten(2)

    def weight_of(self, matrix: Tensor) -> Tensor:
        """The reverse of :meth:`matrix`."""
        if not self.spatial:
            return matrix[0].T if self.columns else matrix[0]
        kernel = self.weight.shape[2:]
        taps: Tensor = matrix.unflatten(2, (prod(kernel), -1))
        order = taps.permute(0, 3, 1, 2) if self.transposed else taps.transpose(2, 3)
        return order.flatten(0, 1).reshape(-1, order.shape[2], *kernel)

    def rows(self, output: tuple[int, ...], positions: Tensor) -> Tensor:
        """What the kernel covers at some positions of an output of that spatial size: ``(G, R, U)`` in float32."""
        if not self.spatial:
            return self.input.reshape(-1, self.input.shape[-1])[positions].float().unsqueeze(0)
        source, kernel, size = self.input, self.weight.shape[2:], prod(output)
        example, place = positions // size, positions % size
        flat = example.unsqueeze(1)  # (R, taps), grows from the first dimension to the last
        inside = torch.ones_like(flat, dtype=torch.bool)
        for dim in range(self.spatial):
            size //= output[dim]
            index = place // size % output[dim]
            taps = torch.arange(kernel[dim], device=positions.device) * self.dilation[dim]
            if self.transposed:
                index = index.unsqueeze(1) + self.padding[dim] - taps
                hit = index % self.stride[dim] == 0
                index = index.div(self.stride[dim], rounding_mode="floor")
            else:
                index = index.unsqueeze(1) * self.stride[dim] - self.padding[dim] + taps
                hit = torch.ones_like(index, dtype=torch.bool)
            length = source.shape[2 + dim]
            hit &= (index >= 0) & (index < length)
            # each dimension multiplies the number of taps
            flat = (flat.unsqueeze(2) * length + index.clamp(0, length - 1).unsqueeze(1)).flatten(1)
            inside = (inside.unsqueeze(2) & hit.unsqueeze(1)).flatten(1)
        pixels = source.movedim(1, -1).reshape(-1, source.shape[1])
        covered = pixels.index_select(0, flat.flatten()).float().reshape(*flat.shape, -1)  # (R, taps, C_in)
        covered *= inside.unsqueeze(2)
        if self.groups == 1:
            return covered.flatten(1).unsqueeze(0)
        return covered.reshape(*flat.shape, self.groups, -1).permute(2, 0, 1, 3).flatten(2)


def read_of(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Read | None:
    """The read that a call of a torch function is; None for anything else, and for inputs without a batch."""
    if func is F.linear:
        given = _named(("input", "weight", "bias"), args, kwargs)
        return Read(given["input"], given["weight"], given.get("bias"))
    if func in _CONVOLUTIONS:
        return _convolution(_named(_CONVOLUTION_ARGUMENTS, args, kwargs), _CONVOLUTIONS[func], transposed=False)
    if func in _TRANSPOSED:
        return _convolution(_named(_TRANSPOSED_ARGUMENTS, args, kwargs), _TRANSPOSED[func], transposed=True)
    if func in _PRODUCTS and len(args) == 2 and isinstance(args[1], Tensor) and args[1].ndim == 2:
        return Read(args[0], args[1], None, columns=True)
    if func in _BIASED_PRODUCTS and len(args) == 3 and not kwargs and args[0].ndim == 1:
        return Read(args[1], args[2], args[0], columns=True)
    return None


def _named(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _convolution(given: dict[str, Any], spatial: int, *, transposed: bool) -> Read | None:
    source, weight = given["input"], given["weight"]
    if source.ndim != spatial + 2:
        return None

    def each(name: str, default: int) -> tuple[int, ...]:
        value = given.get(name, default)
        return (value,) * spatial if isinstance(value, int) else tuple(value) * (spatial // len(value))

    dilation, padding = each("dilation", 1), given.get("padding", 0)
    if padding == "same":
        before = tuple(step * (size - 1) // 2 for step, size in zip(dilation, weight.shape[2:], strict=True))
    else:
        before = (0,) * spatial if padding == "valid" else each("padding", 0)
    groups = int(given.get("groups", 1))
    return Read(
        source, weight, given.get("bias"), False, spatial, each("stride", 1), before, dilation, groups, transposed
    )


def sampled(values: Tensor, positions: Tensor, last: bool) -> Tensor:
    """Channels of a tensor at some positions ``(R, C)``; channels are its last dimension or its second."""
    if last:
        return values.reshape(-1, values.shape[-1])[positions]
    flat = values.flatten(2)
    size = flat.shape[2]
    return flat[positions // size, :, positions % size]


def count_positions(shape: tuple[int, ...], last: bool) -> int:
    """Positions of an output of that shape: everything but its channels."""
    return prod(shape[:-1]) if last else shape[0] * prod(shape[2:])
