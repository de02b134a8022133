"""Measurements to a report, and a report to its two files."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from pydantic_core import to_jsonable_python

from twotower_bench.report.document import Plot, Report, Section
from twotower_bench.report.engines import acceptance_section, is_sweep, sweep_section
from twotower_bench.report.palette import DARK, LIGHT
from twotower_bench.report.plots import STYLE, svg_of
from twotower_bench.report.reading import REMEDY, Measurements, read_measurements
from twotower_bench.report.serve import serve_section
from twotower_bench.report.standalone import standalone_section
from twotower_bench.report.wording import listed
from twotower_spec.errors import ArgumentError
from twotower_spec.files import replace_file

TITLE = "TwoTower: speed and acceptance as measured"
Builder = Callable[[Measurements], Section]
VERDICTS = {"faster": "faster", "slower": "slower", "no difference": "same"}
# By the name of the section, in the order of the report: which measurements it is for, and what makes it.
SECTIONS: Mapping[str, tuple[Callable[[Measurements], bool], Builder]] = {
    "acceptance": (lambda one: bool(one.serving_cells) and not is_sweep(one.serving_cells), acceptance_section),
    "sweep": (lambda one: is_sweep(one.serving_cells), sweep_section),
    "serve": (lambda one: bool(one.load_points), serve_section),
    "standalone": (lambda one: bool(one.cells), standalone_section),
}


def write_report(files: Sequence[Path], directory: Path) -> Report:
    """Writes report.html and report.json.

    Args:
        files: JSON lines of the benchmarks.
        directory: made if it is missing; files of the same names are replaced, each at once.

    Returns:
        What was written.

    Raises:
        ArgumentError: a file cannot be read or has nothing to report, or the directory cannot be written.
    """
    report = report_of(files)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        replace_file(directory / "report.json", json_of(report).encode())
        replace_file(directory / "report.html", html_of(report).encode())
    except OSError as error:
        raise ArgumentError(f"report {directory} cannot be written ({error.strerror}); give another folder") from error
    return report


@matplotlib.rc_context(STYLE)
def report_of(files: Sequence[Path]) -> Report:
    """The report on what files hold; arguments and errors as `write_report`."""
    measured = read_measurements(files)
    sections: list[Section] = []
    for name, (fits, build) in SECTIONS.items():
        for number, one in enumerate(filter(fits, measured), start=1):
            section = _built(build, one)
            tables = [table for table in section.tables if table.rows]
            anchor = name if number == 1 else f"{name}-{number}"
            sections.append(replace(section, name=anchor, tables=tables, origins=one.origins))
    if not sections:
        raise ArgumentError(
            f"{listed([str(path) for path in files])} have scores alone, which are shown beside cells; "
            f"give a file of a run that measured, too"
        )
    return Report(TITLE, list(dict.fromkeys(one.source for one in measured)), sections)


def _built(build: Builder, measured: Measurements) -> Section:
    """A section; each row can be well formed, and all together what no run can measure."""
    try:
        return build(measured)
    except ArgumentError:
        raise
    except (ArithmeticError, LookupError, ValueError) as error:
        reason = f"numbers that no run can have ({type(error).__name__}: {error})"
        raise ArgumentError(f"{measured.source} holds {reason}; {REMEDY}") from error


def html_of(report: Report) -> str:
    """The whole page."""
    loader = PackageLoader("twotower_bench.report", ".")
    environment = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def svg(name: str, label: str, axes: Any) -> Markup:
        return Markup(svg_of(axes, name, label))  # labels were escaped as they were drawn

    return environment.get_template("template.html.j2").render(
        report=report, light=LIGHT, dark=DARK, svg=svg, verdicts=VERDICTS
    )


def json_of(report: Report) -> str:
    """Findings, figures and tables; plots show the same figures."""
    no_plot = Plot("", "", ())
    content = to_jsonable_python(replace(report, sections=[replace(one, plot=no_plot) for one in report.sections]))
    for section, raw in zip(report.sections, content["sections"], strict=True):
        del raw["plot"]
        for figures, found in zip(section.figures, raw["figures"], strict=True):
            if verdict := getattr(figures, "verdict", None):
                found["verdict"] = verdict
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"
