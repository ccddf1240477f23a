"""The documentation is true: its code runs as it stands, it knows every command, option and name, its links lead on."""

import dataclasses
import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import prunegym
from prunegym.agents.configuration import config
from prunegym.agents.evaluations.config import EvaluationsConfig
from prunegym.agents.searching.searchers import SEARCHERS
from prunegym.commands.cli import main
from prunegym.experiments.comparison.config import CompareConfig
from prunegym.experiments.deployment.config import ExportConfig, FinetuneConfig, MeasureConfig
from prunegym.pruning.scoring import RECOVERIES
from prunegym.reporting.config import ReportConfig

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
#: A link within the repository: file and heading.
LINK = r"\]\((?!\w+:)([^)#]*)(?:#([^)]*))?\)"
PAGES = [*sorted(DOCS.glob("*.md")), ROOT / "README.md", ROOT / "runs" / "README.md", ROOT / "benchmarks" / "LOG.md"]
LINKED = [page for page in PAGES if re.search(LINK, page.read_text(encoding="utf-8"))]
FLAG = r"(?<![\w-])--[a-z][\w-]*"
CONFIGS = (
    {
        name: vars(config)[f"{name.capitalize()}Config"]
        for name in ("inspect", "pretrain", "train", "evaluate", "transfer", "prune", "demo")
    }
    | {"compare": CompareConfig, "finetune": FinetuneConfig, "export": ExportConfig}
    | {
        "report": ReportConfig,
        "evaluations": EvaluationsConfig,
        "measure": MeasureConfig,
    }
)
POSITIONAL = {"finetune": ("run",), "export": ("run",)} | dict.fromkeys(("report", "measure", "evaluations"), ("runs",))


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
def test_detector_is_pruned_by_a_task_of_ones_own(tmp_path: Path) -> None:
    """It still finds boxes, though it returns something else in training mode, which has no score."""
    printed = follow("detection.md", tmp_path)
    scores = {name: float(value) for name, value in re.findall(r"'(\w+)': ([\d.]+)", printed)}

    assert scores["unpruned"] > 0.9
    assert scores["after_finetuning"] > scores["unpruned"] - 0.03


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


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_their_headings(page: Path) -> None:
    """Within the documentation and the repository."""
    links = re.findall(LINK, page.read_text(encoding="utf-8"))

    for path, heading in links:
        target = page.parent / path if path else page
        assert target.exists(), path
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), flags=re.MULTILINE) if heading else []
        assert not heading or heading in [re.sub(r"[^\w-]", "", one.lower().replace(" ", "-")) for one in headings]


def test_links_are_found() -> None:
    """The test above is worth what it sees."""
    assert {ROOT / "README.md", DOCS / "README.md", DOCS / "segmentation.md"} <= set(LINKED)
    assert re.findall(LINK, "[a](b.md), [c](d.md#e f), [g](#h), [i](https://j.k)") == [
        ("b.md", ""), ("d.md", "e f"), ("", "h")
    ]  # fmt: skip


def test_concepts_say_what_every_searcher_does() -> None:
    """Each once, and no other."""
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| searcher \|.*?\n\n", text, flags=re.DOTALL)
    first = " ".join(re.findall(r"^\|([^|]*)\|", table, flags=re.MULTILINE))

    assert sorted([*re.findall(r"`(\w+)`", first), "policy"]) == sorted(SEARCHERS)


def test_concepts_say_what_every_recovery_does() -> None:
    """Each once, and no other, in the order of the settings."""
    text = (DOCS / "concepts.md").read_text(encoding="utf-8")
    (table,) = re.findall(r"\| recovery \|.*?\n\n", text, flags=re.DOTALL)

    assert tuple(re.findall(r"^\| `(\w+)` \|", table, flags=re.MULTILINE)) == RECOVERIES


def test_every_benchmark_is_told_how_to_run() -> None:
    """Each script that can be run, once, and no other."""
    scripts = {path.name for path in (ROOT / "benchmarks").glob("*.py") if "__main__" in path.read_text()}
    text = (DOCS / "reproducing.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (?!what|---)(.*?) \| (.*) \|$", text, flags=re.MULTILINE)

    assert {name for _, command in rows for name in re.findall(r"benchmarks/(\w+\.py)", command)} == scripts
    assert len({what for what, _ in rows}) == len({command for _, command in rows}) == len(rows)


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
        told = set(re.findall(FLAG, capsys.readouterr().out))
        assert {"--help"} < told
        assert told == set(re.findall(FLAG, section)), command
        own = {flag for flag in re.findall(r"^  (?:-h, )?(--[\w-]+)", section, flags=re.MULTILINE) if flag != "--help"}
        fields = {one.name.replace("_", "-"): one for one in dataclasses.fields(CONFIGS[command])}
        assert own == {
            f"--no-{name}" if one.default is True else f"--{name}"
            for name, one in fields.items()
            if name not in POSITIONAL.get(command, ())
        }


def test_flag_that_turns_something_off_says_so() -> None:
    """Its help is not that of what it turns off."""
    text = (DOCS / "command_line.md").read_text(encoding="utf-8")
    helps = re.findall(r"^  --no-[\w-]+ +(.*)", text, flags=re.MULTILINE)

    on = [one for kind in CONFIGS.values() for one in dataclasses.fields(kind) if one.default is True]
    assert len(helps) == len(on) >= 2
    assert all(one.startswith("Leave out") and "True" not in one for one in helps)


def test_reference_knows_every_public_name() -> None:
    """Else scripts/write_reference.py was forgotten."""
    names = re.findall(r"^## prunegym\.(\w+)", (DOCS / "python.md").read_text(encoding="utf-8"), flags=re.MULTILINE)

    assert sorted(names) == sorted(set(prunegym.__all__) - {"__version__"})


def test_reference_has_every_parameter_of_what_is_called() -> None:
    """With the bare star behind which they must be named."""
    text = (DOCS / "python.md").read_text(encoding="utf-8")
    sections = dict(re.findall(r"^## prunegym\.(\w+)\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL))
    for name, section in sections.items():
        thing = getattr(prunegym, name)
        if inspect.isclass(thing) and not dataclasses.is_dataclass(thing):
            continue
        parameters = inspect.signature(thing).parameters.values()
        signature = section.partition("\n)")[0]
        shown = re.findall(r"^    \*{0,2}(\w+)(?:: .*)?,$|^    (\*),$", signature, flags=re.MULTILINE)
        assert [one for one, _ in shown if one] == [one.name for one in parameters], name
        assert any(star for _, star in shown) == any(one.kind is one.KEYWORD_ONLY for one in parameters), name


def test_signatures_are_written_as_they_are_called() -> None:
    """Stars and slashes; annotations without quotes and modules."""
    spec = importlib.util.spec_from_file_location("write_reference", ROOT / "scripts" / "write_reference.py")
    assert spec is not None
    assert spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)

    def called(a: int, /, b: "Path", *, c: torch.Tensor | None = None, **more: str) -> Path:
        """Nothing."""
        raise NotImplementedError

    def gathered(*names: str, last: bool = False) -> None:
        """Nothing."""

    assert script.signature(called) == (
        "(\n    a: int,\n    /,\n    b: Path,\n    *,\n    c: Tensor | None = None,\n    **more: str,\n) -> Path"
    )
    assert script.signature(gathered) == "(\n    *names: str,\n    last: bool = False,\n) -> None"
