"""Options about how wide pruned layers may be."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from prunegym.agents.configuration.option_rules import Names, Options, at_least

if TYPE_CHECKING:
    from prunegym.pruning.widths import WidthRules


@dataclass(frozen=True, kw_only=True)
class WidthOptions(Options):
    """How wide pruned layers may be."""

    align: int = 1
    """Widths of pruned layers are multiples of this where possible, such as 8 for what a device computes
    side by side. A group of fewer channels is not pruned."""
    min_channels: int = 1
    """Fewest channels that each group keeps; a group that has fewer keeps all."""
    bound: Names = ()
    """Least and most that some groups keep, as PATTERN=LOW..HIGH: a regular expression of module paths, and
    shares of the channels ('layer1.*=0.5..1') or channels ('stem=16ch..'); one end may be left out. All that
    match a group hold together."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(self, 1, "align", "min_channels")
        if self.bound:
            self.width_rules  # noqa: B018 (refuses what is no bound)

    @property
    def width_rules(self) -> WidthRules:
        """The same, as :mod:`prunegym.pruning.widths` takes it."""
        from prunegym.pruning.widths import Bound, WidthRules

        return WidthRules(self.align, self.min_channels, tuple(map(Bound.parse, self.bound)))
