import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from importlib import metadata
from itertools import chain
from pathlib import Path

import pytest

import prunegym

ROOT = Path(__file__).resolve().parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
PROJECT = tomllib.loads(PYPROJECT)["project"]
REQUIREMENTS = sorted({*PROJECT["dependencies"], *chain(*PROJECT["optional-dependencies"].values())})
needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")


def run_python(code: str, folder: Path) -> str:
    """Standard output of a fresh interpreter started in a folder."""
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run make in the repository, without the settings of a make that runs these tests."""
    own = {key: value for key, value in os.environ.items() if key not in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL")}
    return subprocess.run(["make", *arguments], cwd=ROOT, env=own, capture_output=True, text=True, timeout=60)


def test_every_public_name_exists() -> None:
    """`__all__` promises nothing that is not there."""
    for name in prunegym.__all__:
        assert getattr(prunegym, name) is not None


def test_public_names_are_the_same_for_users_and_for_type_checkers() -> None:
    """Lazy names are written three times; the three agree."""
    tree = ast.parse((ROOT / "src" / "prunegym" / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = [node for node in block.body if isinstance(node, ast.ImportFrom)]
    typed = {alias.asname or alias.name: node.module for node in imports for alias in node.names}

    assert typed == prunegym._HOME
    assert set(prunegym.__all__) == {*prunegym._HOME, "__version__"}
    assert set(prunegym.__all__) <= set(dir(prunegym))


def test_unknown_public_name_is_an_attribute_error() -> None:
    """`hasattr` and `from prunegym import x` work as everywhere."""
    with pytest.raises(AttributeError, match="module 'prunegym' has no attribute 'nothing'"):
        _ = prunegym.nothing


def test_version_is_that_of_the_installed_distribution() -> None:
    """The version is written in pyproject.toml only."""
    assert prunegym.__version__ == metadata.version("prunegym") == PROJECT["version"]


def test_import_is_quick_and_works_from_any_folder(tmp_path: Path) -> None:
    """Importing the face loads none of the heavy libraries."""
    code = "import sys, prunegym; print([m for m in ('torch', 'gymnasium', 'numpy') if m in sys.modules])"

    assert run_python(code, tmp_path) == "[]"


def test_subpackages_import_from_any_folder(tmp_path: Path) -> None:
    """The folders at the top are found under `prunegym`, not only from the root of the repository."""
    assert run_python("import prunegym.pruning.errors as e; print(e.__name__)", tmp_path) == "prunegym.pruning.errors"


def test_type_checkers_see_the_packages_of_an_editable_install(tmp_path: Path) -> None:
    """And editors, which look in the same places: paths that the interpreter knows, not a hook."""
    probe = tmp_path / "probe.py"
    probe.write_text("from prunegym.agents.evaluations.store import Clock\n\nreveal_type(Clock()())\n")
    command = [sys.executable, "-m", "mypy", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), str(probe)]

    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)

    assert 'Revealed type is "float"' in done.stdout.replace("builtins.", "")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("requirement", REQUIREMENTS)
def test_dependency_has_a_lower_bound_with_a_reason_and_no_upper_bound(requirement: str) -> None:
    """A cap breaks users who never meet the problem it guards against."""
    line = next(line for line in PYPROJECT.splitlines() if f'"{requirement}"' in line)

    extras = requirement.startswith("prunegym[")
    assert extras or re.fullmatch(r"[\w-]+>=[\d.]+", requirement)
    assert extras or "#" in line


def test_continuous_integration_runs_the_tests() -> None:
    """`.ci/run` is a program, and it is `make test`."""
    script = ROOT / ".ci" / "run"

    assert os.access(script, os.X_OK)
    assert "make test" in script.read_text(encoding="utf-8")


@needs_make
def test_make_refuses_an_old_python(tmp_path: Path) -> None:
    """The message names the variable, the rule, what was received and the remedy; nothing is installed."""
    old = tmp_path / "python3"
    old.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1 && exit 0\nexit 1\n')
    old.chmod(0o755)

    done = make("test", f"PYTHON={old}", f"VENV={tmp_path / 'venv'}")

    assert done.returncode == 2
    assert "PYTHON should be Python 3.11 or newer. Received" in done.stderr
    assert "Python 3.9.1" in done.stderr
    assert "make PYTHON=python3.12 test" in done.stderr
    assert not (tmp_path / "venv").exists()


@needs_make
def test_make_installs_only_when_pyproject_changed(tmp_path: Path) -> None:
    """The stamp makes a second `make` quick."""
    arguments = ["--dry-run", "lint", f"VENV={tmp_path}"]
    first = make(*arguments).stdout
    stamp = re.search(r"touch (\S+)", first)
    assert stamp is not None
    Path(stamp[1]).touch()

    second = make(*arguments).stdout

    assert "pip install" in first
    assert "pip install" not in second
    assert "ruff check" in second
