"""The README is true: its Python runs, its commands and options exist as on every page."""

import re
from pathlib import Path

import pytest

from prunegym.commands.cli import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMAND = r"(?<![\w./`-])prunegym +([a-z]+) ([^#\n]*)"


def typed(page: str) -> list[tuple[str, str]]:
    """Commands that a page shows in blocks of code, with their arguments."""
    shown = "\n".join(re.findall(r"```(?:bash|console)\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ")
    return re.findall(COMMAND, shown)


FILES = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
PAGES = {str(page.relative_to(ROOT)): page.read_text(encoding="utf-8") for page in FILES}
SHOWING = sorted(name for name, text in PAGES.items() if typed(text))


def test_python_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader would paste gives a smaller network that loads again."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}

    exec(code, names)

    sizes = [sum(one.numel() for one in names[name].parameters()) for name in ("model", "smaller")]  # type: ignore[attr-defined]
    assert sizes[1] < sizes[0]


def test_pages_that_show_commands_are_known() -> None:
    """The test below is worth what it sees; a command is seen in a variable and behind a prompt too."""
    assert {"README.md", "docs/tutorial.md", "docs/long_work.md"} <= set(SHOWING)
    assert {command for command, _ in typed(PAGES["README.md"])} >= {"inspect", "train", "compare", "export", "report"}
    assert len(typed(PAGES["docs/long_work.md"])) == 3


@pytest.mark.parametrize("page", SHOWING)
def test_every_flag_that_is_shown_is_a_flag(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is shown that the command does not take, nor one that is cut short."""
    unknown = []
    for command, rest in typed(PAGES[page]):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
        unknown += [f"{command} {flag}" for flag in re.findall(r"--[\w-]+", rest) if flag not in flags]

    assert unknown == []
