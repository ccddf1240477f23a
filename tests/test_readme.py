"""The README is true: its Python runs, its commands exist."""

import re
from pathlib import Path

import pytest

from prunegym.agents.cli import main

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


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


def test_every_flag_of_the_readme_is_a_flag(capsys: pytest.CaptureFixture[str]) -> None:
    """No option is shown that a command does not take."""
    lines = re.findall(r"^prunegym +(\w+) (.*?)(?: #.*)?$", README, flags=re.MULTILINE)
    unknown = []
    for command, rest in lines:
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        text = capsys.readouterr().out
        unknown += [f"{command} {flag}" for flag in re.findall(r"--[\w-]+", rest) if flag not in text]

    assert unknown == []
