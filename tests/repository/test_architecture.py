"""The module map is the architecture: these tests keep it true."""

import ast
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
#: Package -> the packages of ours that it may import, apart from itself.
ALLOWED = {"pruning": set(), "envs": {"pruning"}, "agents": {"pruning", "envs"}}
#: The import name itself; it may use everything; nothing of ours uses it (it would be half-made).
FACE = "prunegym"
FACE_FOLDER = f"src/{FACE}"
FOLDERS = [FACE_FOLDER, *ALLOWED]


def our_imports(source: str, package: str) -> set[str]:
    """What of ours a module of ``prunegym.{package}`` imports.

    Returns:
        Sub-package names, ``prunegym`` for the face, and ``bare {name}`` for a folder's own name.
    """
    found = set()
    for module in imported_modules(ast.parse(source), package):
        first, *rest = module.split(".")
        if first == FACE:
            found.add(rest[0] if rest and rest[0] in ALLOWED else FACE)
        elif first in ALLOWED:
            found.add(f"bare {first}")
    return found


def imported_modules(tree: ast.AST, package: str) -> set[str]:
    """Absolute names of all modules and names imported anywhere in a syntax tree, lazily or not."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ["prunegym", package][: 3 - node.level] if node.level else []
            found |= {".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names}
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if name in ("import_module", "__import__"):
                found.add(str(node.args[0].value))
    return found


def sources(folder: str) -> list[Path]:
    """Python files below a folder of the repository."""
    return sorted(path for path in (ROOT / folder).rglob("*.py") if "__pycache__" not in path.parts)


@pytest.mark.parametrize("package", ALLOWED)
def test_package_imports_only_what_it_may(package: str) -> None:
    """`pruning` knows no reinforcement learning, `envs` no agents; nobody imports the face."""
    for source in sources(package):
        extra = our_imports(source.read_text(encoding="utf-8"), package) - ALLOWED[package] - {package}

        assert not extra, f"{source.relative_to(ROOT)} must not import {sorted(extra)}"


@pytest.mark.parametrize("package", ALLOWED)
def test_folders_below_a_package_do_not_import_each_other_both_ways(package: str) -> None:
    """Of two folders one is the lower one, and can be understood without the other."""
    arrows = set()
    for source in sources(package):
        folder = source.parent.relative_to(ROOT / package).as_posix()
        for module in imported_modules(ast.parse(source.read_text(encoding="utf-8")), package):
            parts = module.split(".")
            if parts[:2] == [FACE, package] and len(parts) > 3 and (ROOT / package / parts[2]).is_dir():
                arrows.add((folder, parts[2]))

    mutual = {(one, other) for one, other in arrows if one < other and (other, one) in arrows}
    assert not mutual


def test_no_file_imports_itself_through_others() -> None:
    """Nor by imports inside functions, which only hide a loop; those for type checkers alone do not count."""
    files = {_module(path): path for folder in FOLDERS for path in sources(folder)}
    arrows = {}
    for name, path in files.items():
        tree = _without_type_checking(ast.parse(path.read_text(encoding="utf-8")))
        found = imported_modules(tree, "")
        # `from a import b` is of the module a.b if there is one, else of a
        modules = {one if one in files else one.rpartition(".")[0] for one in found}
        arrows[name] = modules & set(files) - {name}

    TopologicalSorter(arrows).prepare()  # names the loop if there is one


def _module(path: Path) -> str:
    relative = (
        path.relative_to(ROOT / "src") if path.is_relative_to(ROOT / "src") else Path(FACE) / path.relative_to(ROOT)
    )
    return ".".join(relative.with_suffix("").parts).removesuffix(".__init__")


def _without_type_checking(tree: ast.Module) -> ast.Module:
    tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))]
    return tree


@pytest.mark.parametrize("folder", [FACE_FOLDER, "tests", "benchmarks"])
def test_nothing_is_imported_by_its_bare_name(folder: str) -> None:
    """`import envs` beside `import prunegym.envs` makes two copies of each class."""
    for source in sources(folder):
        bare = {name for name in our_imports(source.read_text(encoding="utf-8"), "") if " " in name}

        assert not bare, f"{source.relative_to(ROOT)} imports {sorted(bare)}; write prunegym.x"


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("import torch, numpy.linalg", set()),
        ("import prunegym.envs.actions", {"envs"}),
        ("from prunegym import envs", {"envs"}),
        ("from prunegym.agents.policies import ppo", {"agents"}),
        ("from prunegym.commands.cli import main", {"prunegym"}),
        ("from prunegym import PruningError", {"prunegym"}),
        ("import prunegym", {"prunegym"}),
        ("def f():\n    import prunegym.agents as a", {"agents"}),
        ("from . import plan", {"pruning"}),
        ("from .plan import Plan", {"pruning"}),
        ("from ..envs import actions", {"envs"}),
        ("from .. import envs", {"envs"}),
        ("import importlib\nimportlib.import_module('prunegym.envs.actions')", {"envs"}),
        ("from envs.actions import decode", {"bare envs"}),
        ("import environs", set()),
    ],
)
def test_every_form_of_import_is_seen(source: str, expected: set[str]) -> None:
    """The tests above are worth what this helper is worth."""
    assert our_imports(source, "pruning") == expected


def test_every_folder_with_code_is_a_package() -> None:
    """A sub-package without a first file is silently missing from the wheel."""
    folders = {path.parent for folder in FOLDERS for path in sources(folder)}

    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel of this tree, built from a copy: setuptools leaves folders behind, with old files in them."""
    folder = tmp_path_factory.mktemp("wheel")
    skipped = shutil.ignore_patterns("__pycache__")
    for name in ["src", *ALLOWED]:
        shutil.copytree(ROOT / name, folder / name, ignore=skipped, symlinks=True)
    for name in ["pyproject.toml", "README.md", "LICENSE"]:
        shutil.copy(ROOT / name, folder)
    code = "import sys, setuptools.build_meta as backend; sys.stderr.write(backend.build_wheel('.'))"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as built:
        yield built


def test_wheel_holds_every_source_file_and_no_other(wheel: zipfile.ZipFile) -> None:
    """What users get is what is tested."""
    on_disk = {
        source.relative_to(ROOT / "src").as_posix()
        if folder == FACE_FOLDER
        else f"{FACE}/{source.relative_to(ROOT).as_posix()}"
        for folder in FOLDERS
        for source in sources(folder)
    }

    assert {name for name in wheel.namelist() if ".dist-info/" not in name} == on_disk | {f"{FACE}/py.typed"}


def test_wheel_has_licence_and_command(wheel: zipfile.ZipFile) -> None:
    """`pip install prunegym` gives the `prunegym` command."""
    metadata = {Path(name).name: name for name in wheel.namelist() if ".dist-info/" in name}

    assert "LICENSE" in metadata
    assert b"prunegym = prunegym.commands.cli:main" in wheel.read(metadata["entry_points.txt"])
