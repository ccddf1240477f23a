"""Numbers as people read them, and commands to be typed."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from prunegym.reporting.gather import Record, Run, texts

_STEPS = ((1e9, "G"), (1e6, "M"), (1e3, "k"))


def percent(share: float | None, digits: int = 1) -> str:
    """A share in percent; nothing for None."""
    return "" if share is None else f"{100 * share:.{digits}f} %"


def signed(number: float, digits: int = 1) -> str:
    """A number with its sign, a real minus among them."""
    return f"{number:+.{digits}f}".replace("-", "−")


def amount(count: float | None) -> str:
    """A count with a prefix, such as 40.6 M; nothing for None."""
    if count is None:
        return ""
    for size, letter in _STEPS:
        if abs(count) >= size:
            return f"{count / size:.3g} {letter}"
    return f"{count:.3g}"


def plural(count: int, noun: str) -> str:
    """A count with its noun."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def milliseconds(seconds: float) -> str:
    """A time in milliseconds."""
    return f"{1e3 * seconds:.3g} ms"


def duration(seconds: float | None) -> str:
    """How long something took."""
    if seconds is None:
        return ""
    if seconds < 100:
        return f"{seconds:.3g} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def suggest(runs: Sequence[Run], command: str, *more: str) -> str:
    """A command on the same network, data and budgets as the first run that names a network.

    Args:
        runs: Those of the page. If none names a network, as of a saved one, a word stands in its place.
        command: The sub-command.
        more: Further arguments.
    """
    run = next((one for one in runs if texts(one.config.get("network"))), None)
    words = ["prunegym", command]
    if run is None:
        return shlex.join([*words, "--network", "NETWORK", "--data", "DATA", *more])
    for flag in ("network", "weights", "data", "budget"):
        given = texts(run.config.get(flag))
        if flag in ("network", "weights", "budget") and command == "prune":
            given = given[:1]
        for one in given:
            words += [f"--{flag}", one]
    return shlex.join([*words, *more])


def option_rows(options: Record) -> list[dict[str, str]]:
    """Options of a command as a table; those that were not given a value are left out."""
    rows = []
    for name, value in options.items():
        text = ", ".join(texts(value)) if not isinstance(value, dict) else str(value)
        if text:
            rows.append({"option": name.replace("_", "-"), "value": text})
    return rows


def joined(names: Sequence[str], most: int = 3) -> str:
    """A few names, and how many more there are."""
    more = len(names) - most
    return ", ".join(names[:most]) + (f" and {more} more" if more > 0 else "")
