"""The page in headless Chromium: nothing is fetched, nothing overflows, everything can be read in both schemes."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.report.builders import write_all
from twotower_bench.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (1280, 390)
# Of WCAG 2.1, AA.
LEAST_CONTRAST = 4.5
SMALLEST_TEXT_PX = 11

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")

# Every element with text of its own: its words, size on the screen, colour, and the ground behind it.
TEXTS = """() => {
  const ground = (element) => {
    for (let one = element; one; one = one.parentElement) {
      const colour = getComputedStyle(one).backgroundColor;
      if (!/^(transparent|rgba\\(.*, 0\\))$/.test(colour)) return colour;
    }
    return "none";
  };
  return [...document.querySelectorAll("body *")]
    .filter((one) => [...one.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .filter((one) => one.getClientRects().length)
    .map((one) => {
      const style = getComputedStyle(one), svg = one.closest("svg");
      const scale = svg ? svg.getBoundingClientRect().width / svg.viewBox.baseVal.width : 1;
      return {
        words: one.textContent.trim().slice(0, 40), size: parseFloat(style.fontSize) * scale,
        colour: svg ? style.fill : style.color, ground: ground(one), isDrawn: svg !== null,
      };
    });
}"""
OVERFLOWS = """() => {
  const root = document.documentElement;
  const isHeld = (one) => one.closest(".scroll, svg") !== null;
  const wide = [...document.querySelectorAll("body *")]
    .filter((one) => !isHeld(one) && one.getBoundingClientRect().right > root.clientWidth + 0.5);
  return [root.scrollWidth > root.clientWidth ? "page" : "", ...wide.map((one) => one.outerHTML.slice(0, 80))]
    .filter(Boolean);
}"""
CUT_LABELS = """() => [...document.querySelectorAll(".panel text")].filter((one) => {
  const text = one.getBoundingClientRect(), panel = one.closest("svg").getBoundingClientRect();
  return text.left < panel.left - 1 || text.right > panel.right + 1;
}).map((one) => one.textContent)"""


@dataclass
class Seen:
    """A page as it was shown.

    Attributes:
        url: of the page.
        requests: addresses that it asked for.
        complaints: of its console.
        texts: see `TEXTS`.
        overflows: what is wider than the window.
        cut_labels: of plots, that stand beyond their drawing.
    """

    url: str
    requests: list[str]
    complaints: list[str]
    texts: list[dict[str, Any]]
    overflows: list[str]
    cut_labels: list[str]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        # No sandbox: CI runs as root. The page runs nothing, and this is our own file.
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    write_report(write_all(directory), directory / "out")
    return directory / "out" / "report.html"


@pytest.fixture(scope="module", params=[(width, scheme) for width in WIDTHS for scheme in ("light", "dark")])
def seen(request: pytest.FixtureRequest, browser: Any, page_file: Path) -> Seen:
    width, scheme = request.param
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    requests: list[str] = []
    complaints: list[str] = []
    page.on("request", lambda one: requests.append(one.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(page_file.as_uri())
    found = Seen(
        page_file.as_uri(),
        requests,
        complaints,
        page.evaluate(TEXTS),
        page.evaluate(OVERFLOWS),
        page.evaluate(CUT_LABELS),
    )
    context.close()
    return found


def luminance(colour: str) -> float:
    """Luminance of `rgb(...)`; source: WCAG 2.1, relative luminance."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(",")]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(text: str, ground: str) -> float:
    low, high = sorted((luminance(text), luminance(ground)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_of_black_on_white_is_21() -> None:
    assert contrast("rgb(0, 0, 0)", "rgb(255, 255, 255)") == pytest.approx(21)


def test_page_asks_for_nothing_but_itself_and_has_no_complaints(seen: Seen) -> None:
    assert {url for url in seen.requests if not url.startswith("data:")} == {seen.url}
    assert seen.complaints == []


def test_page_is_never_wider_than_the_window(seen: Seen) -> None:
    assert seen.overflows == []


def test_labels_stay_within_their_plots(seen: Seen) -> None:
    assert seen.cut_labels == []


def test_every_text_stands_out_from_its_ground(seen: Seen) -> None:
    assert any(text["isDrawn"] for text in seen.texts) and len(seen.texts) > 200
    faint = [text for text in seen.texts if contrast(text["colour"], text["ground"]) < LEAST_CONTRAST]
    assert faint == []


def test_no_text_is_too_small_to_read(seen: Seen) -> None:
    assert [text for text in seen.texts if text["size"] < SMALLEST_TEXT_PX] == []
