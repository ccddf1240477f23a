"""The page in a real browser, at the width of a desk and of a telephone: nothing missing, nothing overlapping.

The browser is driven through a pair of pipes with the DevTools protocol, so that nothing but the browser is needed.
"""

import json
import os
import select
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from prunegym.agents.inspect import inspect_network
from prunegym.pruning.network import PrunableNetwork
from prunegym.reporting.gather import gather
from prunegym.reporting.inspection import inspection_page
from prunegym.reporting.report import build_page
from prunegym.reporting.svg import Gallery

PROGRAM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium or Chrome found: install one to check the page")

WIDTHS = (1280, 400)
SECTIONS = ("asked", "reached", "front", "learning", "channels", "graph", "time")
#: Seconds that the browser may take for anything.
PATIENCE = 90
#: Looks at every piece of text and every element that is shown. Text within a box that scrolls is compared with the
#: text of that box, wherever it is scrolled to, and with what is outside as far as the box shows it.
CHECK = """
(() => {
  const room = document.documentElement.clientWidth;  // a telephone's innerWidth grows with what is too wide
  const boxOf = (node) => node.parentElement.closest(".scroll");
  const clip = (rect, box) => {
    if (!box) return rect;
    const outer = box.getBoundingClientRect();
    const left = Math.max(rect.left, outer.left), right = Math.min(rect.right, outer.right);
    return { left, right, top: rect.top, bottom: rect.bottom };
  };
  const pieces = [];
  const note = (node, rect, size) => {
    if (rect.width < 0.5 || rect.height < 0.5) return;
    const picture = node.parentElement.closest("svg");
    const edge = picture && picture.getBoundingClientRect();
    const cut = picture && (rect.left < edge.left - 1 || rect.right > edge.right + 1
      || rect.top < edge.top - 1 || rect.bottom > edge.bottom + 1);
    const box = boxOf(node);
    pieces.push({ cut, text: node.textContent.trim().slice(0, 40), rect, shown: clip(rect, box), box, size });
  };
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node = walker.nextNode(); node; node = walker.nextNode()) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || !parent.checkVisibility() || parent.closest("script, style")) continue;
    const drawn = parent.closest("svg text");
    const scale = drawn ? drawn.getScreenCTM().a || Math.abs(drawn.getScreenCTM().b) : 1;
    const size = parseFloat(getComputedStyle(parent).fontSize) * scale;
    if (drawn) {
      note(node, drawn.getBoundingClientRect(), size);
    } else {
      const range = document.createRange();
      range.selectNodeContents(node);
      for (const rect of range.getClientRects()) note(node, rect, size);
    }
  }
  // letters fill the middle of their line: a little of it may be shared
  const meet = (a, b) => {
    const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const slack = 0.2 * Math.min(a.bottom - a.top, b.bottom - b.top);
    const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    return x > 1 && y > slack;
  };
  const overlaps = [];
  pieces.sort((one, other) => one.rect.top - other.rect.top);
  pieces.forEach((one, index) => {
    for (let next = index + 1; next < pieces.length && pieces[next].rect.top < one.rect.bottom; next++) {
      const other = pieces[next];
      const [a, b] = one.box === other.box ? [one.rect, other.rect] : [one.shown, other.shown];
      if (meet(a, b)) overlaps.push(`${one.text} | ${other.text}`);
    }
  });
  const wide = [...document.body.querySelectorAll("*")].filter((one) => {
    const box = one.closest(".scroll");
    const inner = box && box !== one;
    return !inner && one.checkVisibility() && one.getBoundingClientRect().right > room + 0.5;
  });
  const unseen = pieces.filter((one) => !one.box && (one.rect.left < -0.5 || one.rect.right > room + 0.5));
  const figures = [...document.querySelectorAll("figure")].filter((one) => one.checkVisibility());
  return {
    width: document.documentElement.scrollWidth,
    pieces: pieces.length,
    smallest: Math.min(...pieces.map((one) => one.size)),
    overlaps,
    cut: pieces.filter((one) => one.cut).map((one) => one.text),
    wide: wide.map((one) => one.outerHTML.slice(0, 80)),
    unseen: unseen.map((one) => one.text),
    sections: [...document.querySelectorAll("section[id], nav")]
      .filter((one) => one.getBoundingClientRect().height > 40).map((one) => one.id || "contents"),
    empty: figures.filter((one) => one.querySelector("svg").getBoundingClientRect().height < 40).map((one) => one.id),
    figures: figures.length,
    broken: [...document.images].filter((one) => !one.naturalWidth).length,
  };
})()
"""


class Browser:
    """A browser without a window.

    Args:
        program: Chromium or Chrome.
        profile: An empty folder.
    """

    def __init__(self, program: str, profile: str) -> None:
        theirs, self._out = os.pipe()
        self._in, ours = os.pipe()
        # the browser reads file descriptor 3 and writes 4: a shell puts the pipes there
        flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
        command = [program, *flags, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        shell = ["bash", "-c", f'exec "$@" 3<&{theirs} 4>&{ours}', "bash", *command]
        quiet = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(shell, pass_fds=(theirs, ours), **quiet)  # type: ignore[call-overload]
        os.close(theirs)
        os.close(ours)
        self._number = 0
        self._unread = b""
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        self._session = {"sessionId": session}
        for domain in ("Page", "Network", "Runtime", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """A call of the DevTools protocol; what happens meanwhile is noted."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters, **self._session}
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._next()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        result: dict[str, Any] = answer["result"]
        return result

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._unread:
            assert select.select([self._in], [], [], PATIENCE)[0], "the browser does not answer"
            self._unread += os.read(self._in, 1 << 20)
        one, _, self._unread = self._unread.partition(b"\0")
        message: dict[str, Any] = json.loads(one)
        return message

    def open(self, path: Path, width: int) -> None:
        """Load a page in a window of that width."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        self.events.clear()
        self.call("Page.navigate", url=path.as_uri())
        while not self.named("Page.loadEventFired"):
            self.events.append(self._next())

    def evaluate(self, code: str) -> Any:
        """Value of an expression on the page."""
        answer = self.call("Runtime.evaluate", expression=code, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def named(self, method: str) -> list[dict[str, Any]]:
        """What happened since the page was opened."""
        return [event["params"] for event in self.events if event.get("method") == method]

    def close(self) -> None:
        """End the browser."""
        os.close(self._out)
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        os.close(self._in)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """One for all tests."""
    assert PROGRAM is not None
    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        one = Browser(PROGRAM, profile)
        yield one
        one.close()


@pytest.fixture(scope="module")
def report(pruning_runs: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of four real runs."""
    path = tmp_path_factory.mktemp("page") / "report.html"
    path.write_text(build_page(gather(list(pruning_runs.values())), Gallery()).render(), encoding="utf-8")
    return path


def check(found: dict[str, Any], width: int) -> None:
    """What holds of every page."""
    assert found["pieces"] > 50
    assert found["overlaps"] == []
    assert found["cut"] == []
    assert found["wide"] == []
    assert found["unseen"] == []
    assert found["width"] == width
    assert found["empty"] == []
    assert found["broken"] == 0
    assert found["smallest"] >= 9.5  # CSS pixels


@pytest.mark.parametrize("width", WIDTHS)
def test_report_is_whole_and_nothing_overlaps(browser: Browser, report: Path, width: int) -> None:
    """With everything unfolded."""
    browser.open(report, width)
    browser.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")

    found = browser.evaluate(CHECK)
    check(found, width)
    assert found["sections"] == ["verdict", "contents", *SECTIONS]
    assert found["figures"] >= 10


def test_report_asks_for_nothing_and_makes_no_error(browser: Browser, report: Path) -> None:
    """One request, for the page itself; nothing refused, nothing thrown."""
    browser.open(report, WIDTHS[0])
    browser.evaluate("1")

    assert [one["request"]["url"] for one in browser.named("Network.requestWillBeSent")] == [report.as_uri()]
    assert browser.named("Runtime.exceptionThrown") == []
    assert [one["entry"]["text"] for one in browser.named("Log.entryAdded")] == []


def test_overlap_is_noticed(browser: Browser, report: Path) -> None:
    """The check is worth what it catches: text over text, text too wide, text too small."""
    browser.open(report, WIDTHS[1])
    spoil = (
        "document.querySelector('h1').style.marginBottom = '-30px';"
        "document.querySelector('.subtitle').style.whiteSpace = 'nowrap';"
        "document.querySelector('footer p').style.fontSize = '4px';"
    )
    browser.evaluate(spoil)

    found = browser.evaluate(CHECK)
    assert found["overlaps"]
    assert found["wide"] or found["unseen"]
    assert found["smallest"] == 4


def test_tables_are_sorted_by_a_click(browser: Browser, report: Path) -> None:
    """The script is for comfort; without it the page is the same."""
    browser.open(report, WIDTHS[0])
    table = "[...document.querySelectorAll('#front table')].at(0)"
    column = f"[...{table}.tHead.rows[0].cells].findIndex((one) => one.textContent.trim() === 'accuracy, %')"
    browser.evaluate(f"{table}.tHead.rows[0].cells[{column}].click()")

    cells = browser.evaluate(f"[...{table}.tBodies[0].rows].map((row) => parseFloat(row.cells[{column}].textContent))")
    assert len(cells) > 3
    assert cells == sorted(cells)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", ["residual", "mobile"])
def test_page_of_a_network_is_whole(
    browser: Browser, toys: Callable[[str], PrunableNetwork], tmp_path: Path, width: int, name: str
) -> None:
    """`prunegym inspect --html`."""
    path = tmp_path / "graph.html"
    path.write_text(inspection_page(inspect_network(toys(name)).to_json()).render(), encoding="utf-8")
    browser.open(path, width)

    found = browser.evaluate(CHECK)
    check(found, width)
    assert {"contents", "graph", "groups", "frozen"} <= set(found["sections"])
