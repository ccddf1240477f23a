"""What option classes are made of: their base, and the checks that refuse a flag's value."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TypeAlias

import tyro

from prunegym.pruning.errors import PruningError

Names: TypeAlias = tyro.conf.UseAppendAction[tuple[str, ...]]
"""Texts that are given by repeating the flag."""


def require(holds: bool, flag: str, rule: str, value: object, remedy: str = "") -> None:
    """Refuse the value of a flag that breaks its rule.

    Args:
        holds: Whether the value keeps the rule.
        flag: The flag as it is typed, without dashes.
        rule: How the value should be, to follow "should be".
        value: The value received.
        remedy: What to do; by default to correct it or to leave it out.

    Raises:
        PruningError: It does not.
    """
    if not holds:
        remedy = remedy or "Correct it, or leave it out for the default."
        raise PruningError(f"`--{flag}` should be {rule}. Received {value}. {remedy}")


def only_with(config: Options, holds: bool, what: str, *names: str) -> None:
    """Refuse options that would change nothing: whoever gives one believes that it does.

    Args:
        config: The configuration.
        holds: Whether the options are used.
        what: What they are used with, as it is typed.
        names: Fields of the configuration; one that has its default counts as not given.

    Raises:
        PruningError: One is given and not used.
    """
    if holds:
        return
    for one in fields(config):
        value = getattr(config, one.name)
        alone = one.name not in names or value == one.default
        remedy = "Leave it out: it would change nothing."
        require(alone, one.name.replace("_", "-"), f"given with {what}", value, remedy)


def at_least(config: object, least: int, *names: str) -> None:
    """Check that numbers, where they are given, are large enough."""
    for name in names:
        value = getattr(config, name)
        require(value is None or value >= least, name.replace("_", "-"), f"at least {least}", value)


def positive(config: object, *names: str) -> None:
    """Check that numbers are above 0 and finite."""
    for name in names:
        value = getattr(config, name)
        require(0 < value < math.inf, name.replace("_", "-"), "above 0 and finite", value)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every configuration is: checked when it is made."""

    def __post_init__(self) -> None:
        """Overridden by each group, which calls the next."""
