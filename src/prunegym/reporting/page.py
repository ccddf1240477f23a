"""A page as data, and from there to HTML: every text is escaped, and the page asks the network for nothing."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from prunegym.reporting.svg import Picture
from prunegym.reporting.template import PAGE, SCRIPT, STYLE
from prunegym.reporting.verdict import Sentence, Tone


def breakable(text: str) -> Markup:
    """A cell whose long names may be broken where their parts meet."""
    return Markup(re.sub(r"(__|[/+])", r"\1<wbr>", str(escape(text))))


@dataclass(frozen=True)
class Text:
    """A paragraph (or one in small type); a command in it, if any, is set apart."""

    text: str
    command: str | None = None
    kind: str = "text"


@dataclass(frozen=True)
class Table:
    """A table; columns of numbers stand to the right."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: frozenset[int] = frozenset()
    """Columns that hold numbers."""
    caption: str = ""
    kind: str = "table"

    @classmethod
    def of(cls, rows: Sequence[dict[str, str]], caption: str = "") -> Table:
        """From rows by column name; a column that is empty in all of them is left out."""
        names = dict.fromkeys(key for row in rows for key in row)
        header = [name for name in names if any(row.get(name) for row in rows)]
        cells = [[row.get(name, "") for name in header] for row in rows]
        numbers = {
            index
            for index in range(len(header))
            if all(not row[index] or row[index].lstrip("+-−±×")[:1].isdigit() for row in cells)
        }
        return cls(header, cells, frozenset(numbers), caption)


@dataclass(frozen=True)
class Pictures:
    """Pictures that stand beside each other where there is room."""

    pictures: Sequence[Picture]
    kind: str = "pictures"


@dataclass(frozen=True)
class Heading:
    """A heading within a section."""

    text: str
    kind: str = "heading"


@dataclass(frozen=True)
class Folded:
    """What is shown when asked for."""

    title: str
    blocks: Sequence[Block]
    kind: str = "folded"


Block: TypeAlias = Text | Table | Pictures | Heading | Folded


@dataclass(frozen=True)
class Section:
    """A part of the page, listed in the contents."""

    name: str
    """Identifier."""
    title: str
    blocks: Sequence[Block]
    introduction: str = ""


@dataclass(frozen=True)
class Card:
    """One figure that a reader should see first."""

    label: str
    value: str
    detail: str = ""
    tone: Tone = "note"


@dataclass(frozen=True)
class Headline:
    """A few figures about one result."""

    title: str
    cards: Sequence[Card]


@dataclass(frozen=True, kw_only=True)
class Page:
    """All of a page."""

    title: str
    subtitle: str
    sections: Sequence[Section]
    headlines: Sequence[Headline] = ()
    sentences: Sequence[Sentence] = ()
    footer: str = ""
    _tones: dict[str, str] = field(
        default_factory=lambda: {"good": "gain", "even": "no gain", "bad": "loss", "note": "note"}, repr=False
    )

    def render(self) -> str:
        """The page as HTML."""
        environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        environment.filters["breakable"] = breakable
        grouped: dict[str, list[Sentence]] = {}
        for sentence in self.sentences:
            grouped.setdefault(sentence.about, []).append(sentence)
        return environment.from_string(PAGE).render(
            page=self, grouped=grouped, tones=self._tones, style=STYLE, script=SCRIPT
        )
