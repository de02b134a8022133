"""`twotower-spec bench report`: one page on what benchmarks measured."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from twotower_spec.extras import require_extra


def report(
    files: Annotated[list[Path], typer.Argument(help="JSON lines of benchmarks.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the report.")] = Path("report"),
) -> None:
    """Write what benchmarks measured as report.html, which needs no other file, and as report.json for programs.

    A file is what a benchmark wrote with --json; several become one report.
    """
    require_extra("bench", "matplotlib", "jinja2", "pandas", "scipy")
    from twotower_bench.report import write_report  # matplotlib and jinja2

    written = write_report(files, output)
    for section in written.sections:
        print(f"{section.title}: {section.finding}")
    print(output / "report.html")
