"""Files of a report: complete, self-contained, the same from the same measurements."""

import json
import re
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

from tests.benchmarks.report.builders import MACHINE, serving_cells, write_all, write_rows
from twotower_bench.records import System
from twotower_bench.report import Report, report_of, write_report
from twotower_bench.report.markdown import section_lines
from twotower_bench.report.palette import DARK, LIGHT
from twotower_bench.report.writing import html_of
from twotower_spec.errors import ArgumentError

NASTY = "<script>alert(1)</script> | `x` & *y*"


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    directory = tmp_path_factory.mktemp("report")
    return directory / "out", write_report(write_all(directory), directory / "out")


class Page(HTMLParser):
    """Tags with their attributes."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attributes}))


@pytest.fixture(scope="module")
def page(written: tuple[Path, Report]) -> Page:
    return Page((written[0] / "report.html").read_text())


def test_page_and_json_are_written_and_nothing_half_written_is_left(written: tuple[Path, Report]) -> None:
    assert {path.name for path in written[0].iterdir()} == {"report.html", "report.json"}


def test_page_opens_with_one_sentence_and_one_picture_that_has_the_noise_band(written: tuple[Path, Report]) -> None:
    directory, report = written
    header = (directory / "report.html").read_text().partition("<header>")[2].partition("</header>")[0]
    assert header.count('<p class="lead">') == header.count("<svg") == 1
    assert report.sections[0].finding in header and report.sections[0].finding.count(". ") == 0
    assert ">noise (A/A)</text>" in header and ">TwoTower</text>" in header


def test_every_panel_is_drawn_once(written: tuple[Path, Report]) -> None:
    directory, report = written
    num_panels = sum(len(section.plot.panels) for section in report.sections)
    assert (directory / "report.html").read_text().count("<svg") == num_panels


def test_page_refers_to_nothing_outside_itself(page: Page) -> None:
    references = [
        (tag, name, value)
        for tag, attributes in page.tags
        for name, value in attributes.items()
        if name in ("src", "href", "srcset", "action") or "url(" in value or "://" in value
    ]
    assert {tag for tag, _ in page.tags}.isdisjoint({"script", "img", "iframe", "object", "form"})
    assert all(value.startswith(("#", "data:", "url(#")) for _, _, value in references)
    (policy,) = [a["content"] for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def test_ids_are_unique_and_everything_referred_to_exists(page: Page) -> None:
    ids = Counter(attributes["id"] for _, attributes in page.tags if "id" in attributes)
    assert max(ids.values()) == 1
    values = [value for _, attributes in page.tags for value in attributes.values()]
    named = {name for value in values for name in re.findall(r"url\(#([^)]+)\)", value)}
    named |= {a["href"][1:] for _, a in page.tags if a.get("href", "").startswith("#")}
    named |= {a["aria-labelledby"] for _, a in page.tags if "aria-labelledby" in a}
    assert named <= ids.keys()


def test_headers_of_tables_have_a_scope_and_drawings_a_name(page: Page) -> None:
    assert ("html", {"lang": "en"}) in page.tags
    assert all(a.get("scope") in ("col", "row", "rowgroup") for tag, a in page.tags if tag == "th")
    drawings = [a for tag, a in page.tags if tag == "svg"]
    assert drawings and all((a.get("role") == "img" and a["aria-label"]) or "aria-hidden" in a for a in drawings)


def test_plots_take_all_their_colours_from_the_scheme(written: tuple[Path, Report]) -> None:
    text = (written[0] / "report.html").read_text()
    drawings = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert drawings and not any(re.search(r"(?:fill|stroke): #", drawing) for drawing in drawings)
    assert LIGHT.keys() == DARK.keys()


def test_every_table_states_where_its_figures_come_from(written: tuple[Path, Report]) -> None:
    directory, report = written
    num_lines = sum(len(section.tables) * len(section.origins) for section in report.sections)
    assert (directory / "report.html").read_text().count('<details class="origin">') == num_lines
    quoted = "\n".join(line for section in report.sections for line in section_lines(section))
    assert quoted.count("; commit ") >= num_lines


def test_same_measurements_give_the_same_page(tmp_path: Path, written: tuple[Path, Report]) -> None:
    assert html_of(report_of(write_all(tmp_path))) == (written[0] / "report.html").read_text()


def test_text_of_measurements_cannot_become_markup(tmp_path: Path) -> None:
    system = System("nasty", NASTY, {"method": "ngram"})
    cells = [*serving_cells(), *(replace(one, system=system) for one in serving_cells() if one.system.name == "ngram")]
    file = write_rows(tmp_path / "f.jsonl", "serving_cell", cells, command=f"bench {NASTY}")
    report = report_of([file])
    page = html_of(report)
    assert "<script" not in page and "&lt;script&gt;alert(1)" in page
    rows = [line for line in section_lines(report.sections[0]) if line.startswith("| \\<script")]
    assert rows and all("\\| \\`x\\` & \\*y\\*" in row for row in rows)
    assert "Test &lt;CPU&gt; &amp; more" in page and MACHINE["processor"] == "Test <CPU> & more"


def test_json_has_the_figures_of_every_section(written: tuple[Path, Report]) -> None:
    raw = json.loads((written[0] / "report.json").read_text())
    by_name = {section["name"]: section for section in raw["sections"]}
    (figures,) = [
        one
        for one in by_name["acceptance"]["figures"]
        if (one["system"]["name"], one["load"])
        == ("twotower", {"category": "maths", "concurrency": 1, "temperature": 0})
    ]
    assert figures["verdict"] == "faster" and figures["acceptance"]["acceptance_length"]["value"] == 58 / 17
    assert all(section["figures"] for section in raw["sections"])


def test_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    file = write_rows(tmp_path / "f.jsonl", "serving_cell", serving_cells(categories=("maths",)))
    with pytest.raises(ArgumentError, match="taken cannot be written"):
        write_report([file], tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "a file"
