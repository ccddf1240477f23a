"""The page as a whole, from real runs; and that of one network."""

import json
import re
import shutil
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

import prunegym
from prunegym.agents.inspect import inspect_network
from prunegym.agents.run_folders.runs import RunFolder
from prunegym.commands.cli import main
from prunegym.pruning.errors import PruningError
from prunegym.pruning.network import PrunableNetwork
from prunegym.reporting.gather import gather
from prunegym.reporting.inspection import inspection_page
from prunegym.reporting.page import Page, Section, Table
from prunegym.reporting.report import build_page
from prunegym.reporting.svg import Gallery
from prunegym.reporting.verdict import Sentence

SECTIONS = ("asked", "reached", "front", "learning", "channels", "graph", "time")


class Reader(HTMLParser):
    """What a page holds: identifiers, links, text, cells of tables, and elements that would load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.loading: list[str] = []
        self.text = ""
        self.cells: list[str] = []
        self._in_cell = False
        self.feed(html)
        self.text = " ".join(self.text.split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Note what matters of an element."""
        if tag == "td":
            self.cells.append("")
        self._in_cell = tag in ("td", "wbr") and bool(self.cells)
        for name, value in attrs:
            if name == "id":
                self.ids.append(str(value))
            elif name == "href" and tag == "a":
                self.links.append(str(value))
            elif name in ("src", "srcset", "data") or (name == "href" and tag == "link" and value != "data:,"):
                self.loading.append(f"{tag} {name}={value}")

    def handle_data(self, data: str) -> None:
        """Collect text."""
        self.text += f" {data}"
        if self._in_cell:
            self.cells[-1] += data

    def handle_endtag(self, tag: str) -> None:
        """A cell is over."""
        self._in_cell = self._in_cell and tag != "td"


@pytest.fixture(scope="module")
def gallery() -> Gallery:
    """What the pictures of the page are kept in."""
    return Gallery()


@pytest.fixture(scope="module")
def html(pruning_runs: dict[str, Path], gallery: Gallery) -> str:
    """The page of four real runs."""
    return build_page(gather(list(pruning_runs.values())), gallery).render()


@pytest.fixture(scope="module")
def page(html: str) -> Reader:
    """The same, read."""
    return Reader(html)


def test_every_part_is_there_and_in_the_contents(page: Reader) -> None:
    """In order."""
    assert [name for name in page.ids if name in SECTIONS] == list(SECTIONS)
    assert page.links == [f"#{name}" for name in SECTIONS]


def test_page_loads_nothing(html: str, page: Reader) -> None:
    """No picture, font, style or script from anywhere; and the browser is told to refuse any."""
    assert page.loading == []
    assert "default-src 'none'" in html
    assert not re.search(r"@import|url\((?!#)", html)


def test_identifiers_are_unique(page: Reader) -> None:
    """Pictures and sections lead to themselves only."""
    assert len(page.ids) == len(set(page.ids))


def test_figures_are_those_of_the_runs(page: Reader, pruning_runs: dict[str, Path]) -> None:
    """The three accuracies beside the unpruned, MACs and parameters, as `prune` measured them."""
    result = RunFolder(pruning_runs["prune"]).read_json("result.json")

    for score in result["test_scores"].values():
        assert f"{100 * score:.1f} %" in page.text
    assert f"{result['macs']['after'] / 1e3:.3g} k" in page.text
    assert f"{result['parameters']['after'] / 1e3:.3g} k" in page.text
    assert f"{result['latency'][0]['speed_up']:.2f}" in page.text


def test_every_rival_is_in_the_table(page: Reader) -> None:
    """Those of the comparison beside those of the evaluation."""
    for searcher in ("unpruned", "policy", "best sampled", "agent", "uniform", "knapsack", "random"):
        assert searcher in page.cells


def test_every_picture_is_there(gallery: Gallery) -> None:
    """Fronts against both costs, rivals, curves, searches, channels, graph, attention, time."""
    kinds = {re.match(r"[a-z]+(-macs|-latency)?", one.name)[0] for one in gallery.pictures}  # type: ignore[index]

    assert kinds == {
        "front-macs",
        "front-latency",
        "rivals",
        "learning",
        "searches",
        "channels",
        "graph",
        "attention",
        "time",
        "slowest",
    }


def test_what_was_asked_is_told_with_versions_and_machine(page: Reader, pruning_runs: dict[str, Path]) -> None:
    """Every option, the command that was typed, and where it ran."""
    env = RunFolder(pruning_runs["prune"]).read_json("env.json")

    assert f"torch {env['versions']['torch']}" in page.text
    assert env["cpu"] in page.text
    assert "distillation-weight" in page.text


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("train", ("prunegym prune --network digits_resnet", "prunegym compare --network digits_resnet")),
        ("prune", ("prunegym train --network digits_resnet", "prunegym compare --network digits_resnet")),
        ("compare", ("prunegym prune --network digits_resnet",)),
    ],
)
def test_what_is_missing_is_told_with_the_command_that_gives_it(
    command: str, missing: tuple[str, ...], pruning_runs: dict[str, Path]
) -> None:
    """Each part keeps its heading."""
    found = Reader(build_page(gather([pruning_runs[command]]), Gallery()).render())

    assert set(SECTIONS) <= set(found.ids)
    for words in missing:
        assert words in found.text


def test_run_that_has_just_begun_can_be_reported(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """There is nothing but its configuration."""
    shutil.copy(pruning_runs["compare"] / "config.json", tmp_path)

    found = Reader(build_page(gather([tmp_path]), Gallery()).render())
    assert set(SECTIONS) <= set(found.ids)
    assert "Not finished: compare" in found.text


def test_training_under_way_shows_how_far_it_has_come(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """From its metrics: there is no result yet."""
    for name in ("config.json", "metrics.csv"):
        shutil.copy(pruning_runs["train"] / name, tmp_path)
    last = RunFolder(tmp_path).read_rows("metrics.csv")[-1]

    found = Reader(build_page(gather([tmp_path]), Gallery()).render())
    assert f"the policy's own plan {100 * float(last['own'] or 0):.1f} % on the reward images" in found.text


def test_text_of_a_run_is_escaped(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """A folder may come from a stranger."""
    folder = shutil.copytree(pruning_runs["evaluate"], tmp_path / "<script>alert(1)<")
    for path in folder.glob("*.json"):
        path.write_text(path.read_text().replace("digits_resnet", "<img src=x onerror=alert(1)>"))

    html = build_page(gather([folder]), Gallery()).render()
    assert "<img" not in html
    assert html.count("<script>") == 1
    assert "&lt;img src=x onerror=alert(1)&gt;" in html


def test_verdict_stands_above_the_contents() -> None:
    """Sentences about the same thing under one heading, escaped."""
    sentences = [Sentence("even", "net at macs:0.5", "No <gain>."), Sentence("good", "net at macs:0.5", "Faster.")]
    page = Page(title="t", subtitle="s", sections=[Section("asked", "Asked", [])], sentences=sentences)

    html = page.render()
    assert html.count("net at macs:0.5") == 1
    assert html.index("No &lt;gain&gt;.") < html.index("Contents")
    assert "no gain" in html


def test_columns_of_numbers_are_recognised() -> None:
    """They stand to the right; a column that no row fills is left out."""
    rows = [{"name": "a", "count": "12", "change": "−1.5 ±2", "empty": ""}, {"name": "2b", "count": "", "change": "+3"}]
    table = Table.of(rows)

    assert table.header == ["name", "count", "change"]
    assert table.numbers == {1, 2}


def test_command_writes_page_and_pictures(
    pruning_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """And prints the verdict."""
    out, pictures = tmp_path / "deep" / "page.html", tmp_path / "pictures"
    arguments = ["report", str(pruning_runs["evaluate"]), "--out", str(out), "--pictures", str(pictures), "--json"]

    assert main(arguments) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["page"] == str(out)
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert {path.suffix for path in pictures.iterdir()} == {".png", ".svg"}
    assert "uniform" in content["verdict"][0]["text"]


def test_page_of_one_run_lies_in_its_folder(pruning_runs: dict[str, Path], tmp_path: Path) -> None:
    """Unless a place is named; the same from Python."""
    folder = shutil.copytree(pruning_runs["train"], tmp_path / "run")

    assert prunegym.report(folder) == folder / "report.html"
    assert prunegym.report([str(folder)], out=tmp_path / "other.html") == tmp_path / "other.html"
    assert (tmp_path / "other.html").read_text() == (folder / "report.html").read_text()


def test_page_of_several_runs_lies_in_the_working_directory(
    pruning_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It belongs to none of them."""
    monkeypatch.chdir(tmp_path)
    prunegym.report([pruning_runs["train"], pruning_runs["evaluate"]])

    assert (tmp_path / "report.html").is_file()


def test_page_in_the_place_of_a_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Before anything is read."""
    assert main(["report", "nowhere", "--out", str(tmp_path)]) == 2
    assert "`--out` should be a file. Received the folder" in capsys.readouterr().err


def test_command_without_runs_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """With an example."""
    assert main(["report"]) == 2
    assert "`RUN` should be at least one run folder" in capsys.readouterr().err


def test_page_of_a_network_holds_groups_couplings_and_reasons(toys: Callable[[str], PrunableNetwork]) -> None:
    """Frozen groups are in the picture too."""
    inspection = inspect_network(toys("hard_coded"))

    html = inspection_page(inspection.to_json()).render()
    page = Reader(html)
    assert ["graph", "groups", "frozen"] == [name for name in page.ids if name in ("graph", "groups", "frozen")]
    for row in (*inspection.groups, *inspection.frozen):
        assert row.name in page.text
    assert all(row.reason in page.text for row in inspection.frozen)
    assert page.loading == []
    assert inspection.frozen[0].name in html[html.index("<svg") : html.index("</svg>")]


def test_frozen_groups_stand_where_the_network_makes_them(toys: Callable[[str], PrunableNetwork]) -> None:
    """The head is the last row of the picture."""
    html = inspection_page(inspect_network(toys("sequential")).to_json()).render()

    shown = re.findall(r">([^<>]+)</text>", html[html.index("<svg") : html.index("</svg>")])
    assert shown.index("frozen") > max(index for index, text in enumerate(shown) if text.endswith(" %"))


def test_inspect_writes_a_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside what it prints."""
    path = tmp_path / "pages" / "graph.html"

    assert main(["inspect", "--network", "digits_vgg", "--html", str(path)]) == 0
    assert "Channel graph of digits_vgg" in path.read_text()
    assert "Channel groups that can be pruned" in capsys.readouterr().out


def test_page_that_cannot_be_written_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The message names the flag."""
    (tmp_path / "file").write_text("")
    arguments: list[Any] = ["inspect", "--network", "digits_vgg", "--html", str(tmp_path / "file" / "graph.html")]

    assert main(arguments) == 2
    assert "`--html` should be a place that can be written to" in capsys.readouterr().err


def test_result_of_inspect_gives_the_report_a_graph(tmp_path: Path) -> None:
    """A folder of `inspect` may stand among the others."""
    assert main(["inspect", "--network", "digits_vgg", "--out", str(tmp_path / "run")]) == 0

    page = Reader(build_page(gather([tmp_path / "run"]), Gallery()).render())
    assert "features.0" in page.text


def test_report_refuses_what_is_no_run(tmp_path: Path) -> None:
    """The same message from Python."""
    with pytest.raises(PruningError, match="`RUN` should be a run folder"):
        prunegym.report(tmp_path)
