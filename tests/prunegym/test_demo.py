import json
from pathlib import Path
from typing import Any

import pytest

from prunegym.agents.configuration.config import DemoConfig
from prunegym.agents.run_folders.running import Reporter
from prunegym.agents.tables import format_table, markdown_table
from prunegym.commands import demo
from prunegym.commands.cli import main
from prunegym.commands.demo_report import COLUMNS, table_rows


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demonstration, quickly; latency in PyTorch only, because exports take seconds."""
    path = tmp_path_factory.mktemp("demo") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("prunegym.experiments.prune.MEASURED_IN", ("torch",))
        demo.run_demo(DemoConfig(out=path, quick=True), Reporter(progress=False))
    return path


@pytest.fixture(scope="module")
def content(folder: Path) -> dict[str, Any]:
    """Its result."""
    result: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return result


def test_reloaded_network_is_identical(content: dict[str, Any]) -> None:
    """In a new process, bit for bit."""
    assert content["reloaded_identical"] is True


def test_plans_compared_keep_their_budget(content: dict[str, Any]) -> None:
    """Equal realised cost: none above the budget, none far below."""
    for row in [*content["evaluation"], *content["transfer"]]:
        budget = float(row["budget"].removeprefix("macs:"))

        assert 0.97 * budget <= row["cost"] <= budget, row


def test_every_part_of_the_way_is_in_the_table(content: dict[str, Any]) -> None:
    """Unpruned, the agent beside its baselines, transfer zero-shot and few-shot, fine-tuned."""
    rows = table_rows(content)

    on = {name: [row["plan by"] for row in rows if row["network"] == name] for name in (demo.HOME, demo.FOREIGN)}
    assert on[demo.HOME] == ["unpruned", *["uniform", "knapsack", "policy"] * 2]
    assert {"zero-shot", "few-shot", "few-shot best"} <= set(on[demo.FOREIGN])
    assert [row["plan by"] for row in rows[-3:]] == ["uniform", "knapsack", "policy"]
    assert all(row["test_score"] is not None for row in rows)


def test_report_and_picture_are_written(folder: Path, content: dict[str, Any]) -> None:
    """One table and one picture."""
    report = (folder / "report.md").read_text()

    assert markdown_table(table_rows(content), COLUMNS) in report
    assert "bit-identical" in report
    assert report.splitlines()[2].startswith("Quick")
    assert (folder / "overview.png").read_bytes().startswith(b"\x89PNG")


def test_finished_demonstration_is_not_repeated(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report is printed again."""
    monkeypatch.setattr(demo, "run_pretrain", pytest.fail)

    assert main(["demo", "--quick", "--out", str(folder)]) == 0
    assert capsys.readouterr().out.strip() == (folder / "report.md").read_text().strip()


def test_finished_steps_are_not_repeated(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted demonstration goes on with the step it was in."""
    (folder / "result.json").unlink()
    for step in ("pretrain", "carry_out"):
        monkeypatch.setattr(f"prunegym.commands.network_commands.{step}", pytest.fail)
    monkeypatch.setattr("prunegym.commands.agent_commands.train", pytest.fail)

    demo.run_demo(DemoConfig(out=folder, quick=True), Reporter(progress=False))

    assert (folder / "result.json").is_file()


def test_folder_of_a_quick_demonstration_is_not_that_of_a_whole_one(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Numbers that mean nothing must not be taken for ones that do."""
    assert main(["demo", "--out", str(folder)]) == 2
    assert "config.quick was True and is False" in capsys.readouterr().err


def test_whole_demonstration_trains_long_enough() -> None:
    """At least 200 evaluations, and far more of everything than the quick one."""
    assert demo._FULL.evaluations >= 200
    assert demo._QUICK.evaluations < 10


def test_tables_align_numbers_to_the_right() -> None:
    """For a terminal and in Markdown; absent cells are empty."""
    rows = [{"name": "a", "macs": 1234567, "test_score": 0.5}, {"name": "long", "macs": 1, "test_score": None}]

    assert format_table(rows).splitlines() == [
        "name       macs  test_score",
        "----  ---------  ----------",
        "a     1,234,567      50.00%",
        "long          1",
    ]
    assert markdown_table(rows, ("name", "macs", "absent")).splitlines() == [
        "| name | macs |",
        "| --- | ---: |",
        "| a | 1,234,567 |",
        "| long | 1 |",
    ]
