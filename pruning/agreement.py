"""How far apart the outputs of two networks are that should compute the same; NaN never passes for equality."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch

from prunegym.pruning.nests import tensors_in

#: Outputs below this count as of this size, where a difference is seen as a share.
_SMALLEST = 1e-6


@dataclass(frozen=True)
class Gap:
    """How far outputs are from those that were expected, at worst."""

    absolute: float
    """Largest absolute difference; infinite where shapes differ, or a number stands against none."""
    relative: float
    """Largest difference as a share of the largest finite output of the same tensor."""
    numbers: bool
    """False if NaN was expected somewhere: that nothing differs then says little."""
    compared: bool = True
    """False if neither side has a tensor; then both differences are infinite."""

    def within(self, tolerance: float) -> bool:
        """Whether all are numbers, and differ by no more than a share of the largest."""
        return self.numbers and self.relative <= tolerance

    def __str__(self) -> str:
        if not self.compared:
            return "outputs without any tensor that could be compared"
        if not self.numbers:
            return "outputs that are no numbers (NaN)"
        if math.isinf(self.absolute):
            return "outputs of another shape, or that are not finite where the others are"
        return f"outputs that differ by {self.absolute:.2g} ({self.relative:.2g} of the largest)"


def gap_between(expected: Any, found: Any, *, smallest: float = _SMALLEST) -> Gap:
    """Compare the tensors in two nests (:func:`~prunegym.pruning.nests.tensors_in`).

    Args:
        expected: What should come out.
        found: What came out; on the same device.
        smallest: Largest outputs below this count as of this size.
    """
    ours, theirs = (tensors_in(one) for one in (expected, found))
    if not ours and not theirs:
        return Gap(math.inf, math.inf, numbers=True, compared=False)
    ours, theirs = ([one for one in side if one.numel()] for side in (ours, theirs))
    if len(ours) != len(theirs) or any(a.shape != b.shape for a, b in zip(ours, theirs, strict=True)):
        return Gap(math.inf, math.inf, numbers=True)
    absolute = relative = 0.0
    numbers = True
    for one, other in zip(ours, theirs, strict=True):
        a, b = one.double(), other.double()
        same = (a == b) | (a.isnan() & b.isnan())  # infinities of one sign are the same too
        # NaN is what the difference of a number and NaN is
        gaps = torch.where(same, 0.0, (a - b).abs()).nan_to_num(nan=math.inf, posinf=math.inf)
        gap, size = float(gaps.max()), float(torch.where(a.isfinite(), a.abs(), 0.0).max())
        absolute, relative = max(absolute, gap), max(relative, gap / max(size, smallest))
        numbers = numbers and not bool(a.isnan().any())
    return Gap(absolute, relative, numbers)
