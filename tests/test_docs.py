"""The documentation is true: its code runs as it stands, it knows every command, option and name, its links lead on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import prunegym
from prunegym.agents.cli import main

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md"))


def blocks(page: str) -> list[tuple[str, str]]:
    """Language and content of the code of a page, in order."""
    return re.findall(r"```(python|bash)\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)


def follow(page: str, folder: Path) -> str:
    """Do what a page says, in a folder; its Python is one session.

    Returns:
        What was printed.
    """
    scripts = [f"set -e\n{code}" for language, code in blocks(page) if language == "bash"]
    python = "\n".join(code for language, code in blocks(page) if language == "python")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    printed = ""
    for command in [*(["bash", "-c", script] for script in scripts), [sys.executable, "-c", python]]:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-2000:]
        printed += done.stdout
    return printed


def test_extensions_work_as_they_stand(tmp_path: Path) -> None:
    """A criterion, a searcher, a reward and a rule of one's own."""
    printed = follow("extending.md", tmp_path)

    assert "no rule for grid_sampler_2d" in printed
    assert re.search(r"^first +16 ", printed, flags=re.MULTILINE)


@pytest.mark.slow
def test_tutorial_ends_in_a_faster_onnx_file(tmp_path: Path) -> None:
    """By what it says itself in the end, with both networks timed in turn."""
    printed = follow("tutorial.md", tmp_path)

    assert float(re.findall(r"^faster: ([\d.]+) times", printed, flags=re.MULTILINE)[-1]) > 1.2


@pytest.mark.slow
def test_segmentation_network_is_pruned_by_a_task_of_ones_own(tmp_path: Path) -> None:
    """Through the Python face, with its own loss and score."""
    printed = follow("segmentation.md", tmp_path)
    scores = {name: float(value) for name, value in re.findall(r"'(\w+)': ([\d.]+)", printed)}

    assert scores["unpruned"] > 0.55
    assert scores["after_finetuning"] > scores["unpruned"] - 0.05


@pytest.mark.slow
def test_long_work_ends_with_a_policy(tmp_path: Path) -> None:
    """The loop around the time limit comes to its end."""
    (script,) = (code for language, code in blocks("long_work.md") if language == "bash")
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    done = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )

    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "agent" / "policy.safetensors").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    """Within the documentation and the repository."""
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))

    assert [link for link in links if not (page.parent / link).exists()] == []


def test_reference_knows_every_command_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    """Else scripts/write_reference.py was forgotten."""
    text = (DOCS / "command_line.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## prunegym (\w+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    (commands,) = re.findall(r"\{([a-z,]+)\}", capsys.readouterr().out.splitlines()[0])
    assert list(sections) == commands.split(",")
    for command, section in sections.items():
        with pytest.raises(SystemExit, match="0"):
            main([command, "--help"])
        flags = set(re.findall(r"(?<![\w-])--[a-z][\w-]*", capsys.readouterr().out))
        assert flags <= set(re.findall(r"--[a-z][\w-]*", section)), command


def test_reference_knows_every_public_name() -> None:
    """Else scripts/write_reference.py was forgotten."""
    names = re.findall(r"^## prunegym\.(\w+)", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert sorted(names) == sorted(set(prunegym.__all__) - {"__version__"})
