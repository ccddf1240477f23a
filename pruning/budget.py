"""Budgets: how much of the network's cost may remain, and the resource that is counted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from prunegym.pruning.cost import CostModel
from prunegym.pruning.errors import InfeasibleBudgetError, PruningError, unknown_name
from prunegym.pruning.widths import Widths

KINDS = ("macs", "params", "latency")
_EXAMPLE = "Write for example `macs:0.5`, `params:0.3`, `latency:0.7` or `latency:12ms`."


@dataclass(frozen=True)
class Budget:
    """Cost kept: a fraction of the unpruned network, or an absolute latency in seconds."""

    kind: str
    value: float
    absolute: bool = False

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read ``macs:0.5``, ``params:0.5``, ``latency:0.7`` or ``latency:12ms``.

        Raises:
            PruningError: no text, unknown kind, not a number, or a fraction outside (0, 1].
        """
        if not isinstance(text, str):
            raise PruningError(f"`budget` should be a text, KIND:NUMBER. Received {text!r}. {_EXAMPLE}")
        kind, _, amount = text.partition(":")
        if kind not in KINDS:
            raise unknown_name("budget", kind, KINDS, _EXAMPLE)
        absolute = amount.endswith("ms")
        try:
            value = float(amount.removesuffix("ms"))
        except ValueError:
            raise PruningError(f"`budget` should be KIND:NUMBER. Received {text!r}. {_EXAMPLE}") from None
        if absolute and kind != "latency":
            raise PruningError(f"`budget` in milliseconds should be a latency. Received {text!r}. {_EXAMPLE}")
        if not np.isfinite(value) or value <= 0 or (not absolute and value > 1):
            rule = "a positive time" if absolute else "a fraction in (0, 1]"
            raise PruningError(f"`budget` should be {rule}. Received {text!r}. {_EXAMPLE}")
        return cls(kind, value / 1000 if absolute else value, absolute)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value * 1000:g}ms" if self.absolute else f"{self.kind}:{self.value:g}"


class LatencyModel(Protocol):
    """Predicts the latency of any plan (see ``latency_table.py``)."""

    @property
    def full(self) -> float:
        """Latency of the unpruned network in seconds."""

    def latency(self, counts: NDArray[np.int64]) -> float:
        """Latency in seconds for kept counts ``(groups,)``."""


@dataclass(frozen=True)
class Limit:
    """A budget applied to one network: a cost function of kept counts and the most it may be."""

    budget: Budget
    value: Callable[[NDArray[np.int64]], float]
    """Cost of kept counts ``(groups,)``: MACs, parameters or seconds."""
    full: float
    most: float

    def fraction(self, counts: NDArray[np.int64]) -> float:
        """Cost as a share of the unpruned network's."""
        return self.value(counts) / self.full

    def holds(self, counts: NDArray[np.int64]) -> bool:
        """True if the counts keep the budget."""
        return self.value(counts) <= self.most

    def tightened(self, share: float) -> Limit:
        """The limit at another share of the unpruned cost (the budget of a round)."""
        return Limit(self.budget, self.value, self.full, share * self.full)


def apply_budget(budget: Budget, costs: CostModel, widths: Widths, latency: LatencyModel | None = None) -> Limit:
    """Apply a budget to a network and refuse what cannot be reached.

    Args:
        budget: what may remain.
        costs: the network's cost model.
        widths: counts that each group may keep.
        latency: latency model; needed for latency budgets.

    Raises:
        InfeasibleBudgetError: even the smallest widths cost more; the message gives the reachable minimum.
    """
    value: Callable[[NDArray[np.int64]], float]
    if budget.kind == "macs":
        value, full = costs.macs, float(costs.full.macs)
    elif budget.kind == "params":
        value, full = costs.parameters, float(costs.full.parameters)
    else:
        if latency is None:
            raise PruningError(
                f"`budget` {budget} needs a latency table. Received none. Measure one (LatencyTable.measure) "
                "or use macs:."
            )
        value, full = latency.latency, latency.full
    most = budget.value if budget.absolute else budget.value * full
    least = value(widths.smallest)
    if least > most:
        # rounded up, so that what is advised is accepted
        unit = f"{_rounded_up(least * 1000):.3g}ms" if budget.absolute else f"{min(1.0, _rounded_up(least / full)):.3g}"
        allowed, looser = (f" ({widths.rules})", ", or loosen these rules") if widths.rules else ("", "")
        raise InfeasibleBudgetError(
            f"`budget` should be reachable by this network. Received {budget}, but with every group at its "
            f"smallest{allowed} the network still has {least / full:.1%} of its {budget.kind}. "
            f"Ask for {budget.kind}:{unit} or more{looser}.",
            reachable=least if budget.absolute else least / full,
        )
    return Limit(budget, value, full, most)


def _rounded_up(number: float) -> float:
    """Three significant digits, a little larger than a positive number."""
    number *= 1 + 1e-9  # else the product with the full cost may round to just below what is needed
    step = 10.0 ** (np.floor(np.log10(number)) - 2)
    return float(np.ceil(number / step) * step)
