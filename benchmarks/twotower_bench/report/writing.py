"""Measurements to a report, and a report to files."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from twotower_bench.report.acceptance import acceptance_section
from twotower_bench.report.document import Report, Section
from twotower_bench.report.html import html_of
from twotower_bench.report.markdown import markdown_of
from twotower_bench.report.plan import plan_section
from twotower_bench.report.plots import png_of
from twotower_bench.report.reading import Measurements, read_measurements
from twotower_bench.report.serve import serve_section
from twotower_bench.report.standalone import standalone_section
from twotower_bench.report.sweep import is_sweep, sweep_section
from twotower_bench.report.wording import listed
from twotower_spec.errors import ArgumentError
from twotower_spec.files import replace_file

TITLE = "TwoTower: speed and acceptance as measured"
Builder = Callable[[Measurements, str], Section]


def write_report(files: Sequence[Path], directory: Path) -> Report:
    """Writes report.html, report.md, report.json and a PNG for every plot.

    Args:
        files: JSON lines of the benchmarks, or serving profiles.
        directory: made if it is missing; files of the same names are replaced, each at once.

    Returns:
        What was written.

    Raises:
        ArgumentError: a file cannot be read or has nothing to report, or the directory cannot be written.
    """
    report = report_of(files)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in contents_of(report):
            replace_file(directory / name, content)
    except OSError as error:
        raise ArgumentError(f"report {directory} cannot be written ({error.strerror}); give another folder") from error
    return report


def report_of(files: Sequence[Path]) -> Report:
    """The report on what files hold; arguments and errors as `write_report`."""
    measured = read_measurements(files)
    sections: list[Section] = []
    for name, (has_any, build) in BUILDERS.items():
        fitting = [one for one in measured if has_any(one)]
        for number, one in enumerate(fitting, start=1):
            sections.append(build(one, name if number == 1 else f"{name}-{number}"))
    if not sections:
        raise ArgumentError(
            f"{listed([str(path) for path in files])} have scores alone, which are shown beside cells; "
            f"give a file of a run that measured, too"
        )
    return Report(TITLE, tuple(dict.fromkeys(one.source for one in measured)), tuple(sections))


def contents_of(report: Report) -> Iterator[tuple[str, bytes]]:
    """Names and contents of all files; what others link to comes first."""
    for section in report.sections:
        for plot in section.plots:
            yield f"{section.file_name(plot)}.png", png_of(plot)
    yield "report.json", (json.dumps(json_of(report), indent=1, ensure_ascii=False) + "\n").encode()
    yield "report.md", markdown_of(report).encode()
    yield "report.html", html_of(report).encode()


def json_of(report: Report) -> Mapping[str, Any]:
    """Figures, tables and plots as JSON."""
    return asdict(report)


# By the name of the section, in the order of the report.
BUILDERS: Mapping[str, tuple[Callable[[Measurements], bool], Builder]] = {
    "acceptance": (lambda one: bool(one.serving_cells) and not is_sweep(one.serving_cells), acceptance_section),
    "sweep": (lambda one: is_sweep(one.serving_cells), sweep_section),
    "serve": (lambda one: bool(one.load_points), serve_section),
    "standalone": (lambda one: bool(one.cells), standalone_section),
    "plan": (lambda one: one.profile is not None, plan_section),
}
