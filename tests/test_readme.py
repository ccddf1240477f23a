"""The README is true: its Python runs, its commands exist; so do the options on every page."""

import re
from pathlib import Path

import pytest

from prunegym.agents.cli import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCS = [page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").glob("*.md"))]


def test_python_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a reader would paste gives a smaller network that loads again."""
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    names: dict[str, object] = {}

    exec(code, names)

    sizes = [sum(one.numel() for one in names[name].parameters()) for name in ("model", "smaller")]  # type: ignore[attr-defined]
    assert sizes[1] < sizes[0]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"^prunegym +(\w+)", README, flags=re.MULTILINE))))
def test_commands_of_the_readme_have_help(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every command that is shown explains itself."""
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])

    assert f"prunegym {command}" in capsys.readouterr().out


@pytest.mark.parametrize("page", [README, *DOCS], ids=lambda text: text.splitlines()[0])
def test_every_flag_that_is_shown_is_a_flag(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    """No option is shown that the command does not take, nor one that is cut short."""
    shown = "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL)).replace("\\\n", " ")
    unknown = []
    for command, rest in re.findall(r"^prunegym +(\w+) ([^#\n]*)", shown, flags=re.MULTILINE):
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
        unknown += [f"{command} {flag}" for flag in re.findall(r"--[\w-]+", rest) if flag not in flags]

    assert unknown == []
