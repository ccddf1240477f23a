"""Tables as text: aligned for a terminal, or in Markdown for a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

#: Numbers whose column is named so are shares and read better as percentages.
_PERCENT = ("cost", "score", "share")


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """Rows below a header, in aligned columns.

    Args:
        rows: One mapping per row.
        columns: Which columns, in order; by default all that occur. Those that no row has are left out.

    Returns:
        Lines without a line break at the end; numbers stand to the right.
    """
    header, cells = _cells(rows, columns)
    widths = [max(map(len, column)) for column in zip(header, *cells, strict=True)]
    right = [_is_number(rows, name) for name in header]
    lines = []
    for line in [header, ["-" * width for width in widths], *cells]:
        padded = [
            text.rjust(width) if flush else text.ljust(width)
            for text, width, flush in zip(line, widths, right, strict=True)
        ]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def markdown_table(rows: Sequence[Row], columns: Sequence[str] | None = None) -> str:
    """The same as a Markdown table."""
    header, cells = _cells(rows, columns)
    marks = ["---:" if _is_number(rows, name) else "---" for name in header]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, marks, *cells])


def format_value(name: str, value: Any) -> str:
    """The text of one cell: shares as percentages, large numbers in thousands, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, float) and any(part in name for part in _PERCENT):
        return f"{100 * value:.2f}%"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _cells(rows: Sequence[Row], columns: Sequence[str] | None) -> tuple[list[str], list[list[str]]]:
    """Header, and the text of every cell."""
    present = dict.fromkeys(name for row in rows for name in row)
    header = [name for name in (columns or present) if name in present]
    return header, [[format_value(name, row.get(name)) for name in header] for row in rows]


def _is_number(rows: Sequence[Row], name: str) -> bool:
    """Whether a column holds numbers."""
    return any(isinstance(row.get(name), int | float) for row in rows)
