"""``--time-limit``: stop in time, with everything kept, instead of being stopped."""

from __future__ import annotations

import math
import multiprocessing
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from prunegym.agents.configuration.option_rules import Options, require
from prunegym.pruning.errors import PruningError

_SECONDS = {"d": 86400, "h": 3600, "m": 60, "s": 1}
_NUMBER = r"\d+(?:\.\d+)?"
_DURATION = re.compile("".join(rf"(?:(?P<{unit}>{_NUMBER}){unit})?" for unit in _SECONDS))


TIME_UP = 124
"""Exit code of what the time limit ended, that of `timeout`."""


class TimeUp(BaseException):
    """The time limit is reached; like an interruption, nobody but the command line should handle it."""


class TimeLimit:
    """When work should stop.

    Work calls :meth:`check` where it can stop without losing anything: after an evaluation, an epoch, a row.

    Args:
        seconds: That it may take.
        started: When it began, by :func:`time.monotonic`; by default now.
    """

    def __init__(self, seconds: float = math.inf, started: float | None = None) -> None:
        self.end = (time.monotonic() if started is None else started) + seconds

    @property
    def reached(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() >= self.end

    @property
    def left(self) -> float:
        """Seconds that are left; infinity without a limit."""
        return self.end - time.monotonic()

    def check(self) -> None:
        """Stop if the time is up.

        Raises:
            TimeUp: It is.
            SystemExit: It is, and this is a process that another one started: see :meth:`heeded`.
        """
        if self.reached:
            if multiprocessing.parent_process() is not None:
                raise SystemExit(TIME_UP)
            raise TimeUp

    @contextmanager
    def heeded(self) -> Iterator[None]:
        """For work that may be done in other processes: what ends one of them in time is no error.

        Raises:
            TimeUp: The time is up, and something ended the work.
        """
        try:
            yield
        except PruningError:
            self.check()
            raise


NO_LIMIT = TimeLimit()
"""For work that may take as long as it takes."""


@dataclass(frozen=True, kw_only=True)
class TimeLimitOption(Options):
    """How long a command may run."""

    time_limit: str | None = None
    """Stop after so long, as 90m, 2h, 1h30m, or in seconds: after the evaluation or epoch under way, with exit code 124
    and the command that goes on from there."""

    def __post_init__(self) -> None:
        super().__post_init__()
        limit = self.time_limit
        rule, remedy = "a time above 0, such as 90m, 2h, 1h30m or 3600", "Leave it out for no limit."
        require(limit is None or seconds_of(limit) > 0, "time-limit", rule, limit, remedy)

    @property
    def limit_seconds(self) -> float:
        """Seconds that the command may run; infinity without a limit."""
        return math.inf if self.time_limit is None else seconds_of(self.time_limit)


def seconds_of(text: str) -> float:
    """Seconds of a duration such as ``1h30m`` or ``3600``; 0 if it is none."""
    text = text.strip().lower()
    found = _DURATION.fullmatch(f"{text}s" if re.fullmatch(_NUMBER, text) else text)
    if found is None:
        return 0.0
    return sum(float(number) * _SECONDS[unit] for unit, number in found.groupdict().items() if number)
