"""Write docs/command_line.md and docs/python.md from what the program says of itself.

python scripts/write_reference.py
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent.parent / "docs"
WIDTH = 120


def main() -> None:
    """Write both pages."""
    (DOCS / "command_line.md").write_text(command_line(), encoding="utf-8")
    (DOCS / "python.md").write_text(python_face(), encoding="utf-8")


def command_line() -> str:
    """Every command with its help."""
    (commands,) = re.findall(r"\{([a-z,]+)\}", help_of().splitlines()[0])
    parts = ["# Command line\n", "Written by `scripts/write_reference.py` from `prunegym COMMAND --help`.\n"]
    parts += [f"## prunegym {name}\n\n```text\n{help_of(name)}\n```\n" for name in commands.split(",")]
    return "\n".join(parts)


def help_of(*command: str) -> str:
    """The help of a command, without its frame."""
    from prunegym.commands.cli import main as prunegym

    os.environ["COLUMNS"] = str(WIDTH)
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        prunegym([*command, "--help"])
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).rstrip() for line in text.getvalue().splitlines()]
    return "\n".join(lines).strip()


def python_face() -> str:
    """Every public name with its signature and documentation."""
    import prunegym

    parts = ["# Python face\n", "Written by `scripts/write_reference.py` from the docstrings of `prunegym`.\n"]
    for name in sorted(one for one in prunegym.__all__ if one != "__version__"):
        thing = getattr(prunegym, name)
        parts.append(f"## prunegym.{name}\n\n```text\n{name}{signature(thing)}\n\n{documentation(thing)}\n```\n")
    return "\n".join(parts)


def signature(thing: Any) -> str:
    """How it is called, one parameter to a line; nothing for what is not called by users."""
    if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
        return ""
    called = inspect.signature(thing)
    parameters = "".join(f"    {one},\n" for one in shown(called))
    returns = "" if called.return_annotation is inspect.Signature.empty else f" -> {bare(called.return_annotation)}"
    return f"(\n{parameters}){returns}" if parameters else f"(){returns}"


def shown(called: inspect.Signature) -> list[str]:
    """Parameters as they are written, with the bare `*` that keyword-only ones stand behind and the `/` of others."""
    texts = []
    kind = None
    for one in called.parameters.values():
        if kind is one.POSITIONAL_ONLY and one.kind is not one.POSITIONAL_ONLY:
            texts.append("/")
        if one.kind is one.KEYWORD_ONLY and kind not in (one.KEYWORD_ONLY, one.VAR_POSITIONAL):
            texts.append("*")
        kind = one.kind
        texts.append(bare(str(one)))
    return [*texts, "/"] if kind is inspect.Parameter.POSITIONAL_ONLY else texts


def bare(annotation: object) -> str:
    """A type without the modules it comes from, and without quotes where it was not evaluated."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    text = re.sub(r": '([^']*)'", r": \1", text)
    return re.sub(r"\b(?:prunegym|collections|torch|pathlib|typing)\.(?:\w+\.)*", "", text)


def documentation(thing: Any) -> str:
    """Its docstring, and for a class those of its public methods."""
    text = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        for name, method in vars(thing).items():
            method = method.fget if isinstance(method, property) else method
            if not name.startswith("_") and inspect.isfunction(method):
                called = inspect.signature(method)
                lines = (inspect.getdoc(method) or "").splitlines()
                text += f"\n\n{name}({', '.join(shown(called))}) -> {bare(called.return_annotation)}\n    {lines[0]}"
    return text


if __name__ == "__main__":
    main()
