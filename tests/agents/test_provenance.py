import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prunegym.agents.run_folders import provenance
from prunegym.agents.run_folders.provenance import describe_environment

needs_git = pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A committed file that plays the part of our source; git knows no other repository or settings."""
    for name in [name for name in os.environ if name.startswith("GIT_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    path = tmp_path / "module.py"
    path.write_text("x = 1\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", "module.py")
    git(tmp_path, "-c", "user.name=n", "-c", "user.email=e@x", "commit", "--quiet", "-m", "first")
    monkeypatch.setattr(provenance, "__file__", str(path))
    return path


def git(folder: Path, *arguments: str) -> str:
    """Output of a git command that must succeed."""
    return subprocess.run(
        ["git", "-C", str(folder), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


@needs_git
def test_commit_of_the_code_is_recorded(source: Path) -> None:
    """A result can be traced to the commit that made it."""
    commit = git(source.parent, "rev-parse", "HEAD")

    assert describe_environment("cpu")["git"] == {"commit": commit, "dirty": False}


@needs_git
@pytest.mark.parametrize("name", ["module.py", "new.py"])
def test_uncommitted_code_is_dirty(source: Path, name: str) -> None:
    """Changed and new files alike make the commit an incomplete description."""
    (source.parent / name).write_text("x = 2\n")

    assert describe_environment("cpu")["git"]["dirty"] is True


@needs_git
def test_repository_around_an_installed_package_is_not_taken_for_ours(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An environment inside the user's repository holds our files, but git does not track them."""
    installed = source.parent / "site-packages" / "module.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(provenance, "__file__", str(installed))

    assert describe_environment("cpu")["git"] is None


def test_machine_without_git_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """Git is not a dependency."""
    monkeypatch.setenv("PATH", "")

    assert describe_environment("cpu")["git"] is None


def test_command_line_can_be_pasted_into_a_shell(monkeypatch: pytest.MonkeyPatch) -> None:
    """Arguments with spaces are quoted."""
    monkeypatch.setattr(sys, "argv", ["prunegym", "train", "--out", "my runs/a"])

    assert describe_environment("cpu")["command"] == "prunegym train --out 'my runs/a'"


def test_device_is_the_one_of_the_run() -> None:
    """The device asked for is recorded, not the best of the machine."""
    assert describe_environment("cpu")["device"] == "cpu"
    assert describe_environment()["device"]
