"""The errors prunegym raises on purpose.

::

    ValueError
    └── PruningError               what was asked for cannot be done; the message says what to do instead
        ├── InfeasibleBudgetError  no plan is cheap enough; carries the smallest budget within reach
        └── UnsupportedLayerError  a layer, or the way layers are joined, cannot be pruned

Every message names the argument, the rule, the value received and the remedy, in that order.
"""

import difflib
from collections.abc import Iterable
from itertools import takewhile

#: Names listed in full in a message; of a longer list only the nearest are shown.
_LISTED_IN_FULL = 12
#: Nearest names shown when the list is too long to be printed.
_NEAREST_SHOWN = 5
#: Similarity (difflib ratio, 0 to 1) below which a suggestion would only puzzle.
_LIKENESS = 0.6


class PruningError(ValueError):
    """What was asked for cannot be done; the message holds the remedy."""


class InfeasibleBudgetError(PruningError):
    """No plan within the rules is cheap enough for the budget.

    Args:
        message: Argument, rule, value and remedy.
        reachable: The smallest budget that can be reached, in the unit of the budget asked for
            (a fraction of the unpruned network, or seconds of latency); None when it is not known.
    """

    def __init__(self, message: str, *, reachable: float | None = None) -> None:
        super().__init__(message)
        self.reachable = reachable


class UnsupportedLayerError(PruningError):
    """A layer, or the way layers are joined, cannot be pruned."""


def unknown_name(argument: str, value: str, choices: Iterable[str], remedy: str = "") -> PruningError:
    """Describe a name that is not among the known ones, with the nearest one as a suggestion.

    The error is returned, not raised: the caller's ``raise`` stays visible to readers and type checkers.

    Args:
        argument: The argument as the user typed it, e.g. ``--network``; quoted in the message.
        value: The name received.
        choices: The known names, in any order.
        remedy: One more sentence on what to do, e.g. how to list all names.

    Returns:
        The error to raise.
    """
    names = sorted(set(choices))
    near = _nearest(value, names)
    suggestion = f"Did you mean '{near[0]}'?" if near else ""
    sentences = [f"`{argument}` {_rule(names, near)}.", f"Received '{value}'.", suggestion, remedy]
    return PruningError(" ".join(sentence for sentence in sentences if sentence))


def _rule(names: list[str], near: list[str]) -> str:
    """Say which names are allowed: all of them if few, else how many and the nearest."""
    if not names:
        return "has no known names"
    quoted = ", ".join(f"'{name}'" for name in (names if len(names) <= _LISTED_IN_FULL else near))
    if len(names) <= _LISTED_IN_FULL:
        return f"should be one of {quoted}"
    listed = f" (nearest: {quoted})" if quoted else ""
    return f"should be one of {len(names)} known names{listed}"


def _nearest(value: str, names: list[str]) -> list[str]:
    """Names that resemble ``value``, most alike first, ignoring case.

    A name that contains ``value`` counts as alike too: ``resnet20`` should find ``cifar_resnet20``.
    """
    lowered: dict[str, str] = {}
    for name in names:
        lowered.setdefault(name.lower(), name)
    wanted = value.strip().lower()
    likeness = {name: difflib.SequenceMatcher(None, wanted, name).ratio() for name in lowered}
    alike = [name for name in lowered if likeness[name] >= _LIKENESS]
    # among equals the one that begins alike: `resnet2o` means resnet20 rather than resnet32
    alike.sort(key=lambda name: (likeness[name], _same_beginning(wanted, name)), reverse=True)
    if len(wanted) > 2:
        # shortest first: the plainest of the names that contain what was typed
        alike += sorted((name for name in lowered if wanted in name), key=len)
    return [lowered[name] for name in dict.fromkeys(alike)][:_NEAREST_SHOWN]


def _same_beginning(one: str, other: str) -> int:
    """Number of characters that two names begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
