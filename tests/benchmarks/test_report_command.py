"""`twotower-spec bench report`, as a command of its own: what it prints and writes."""

from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from tests.benchmarks.report.builders import load_points, write_rows
from twotower_bench.cli.report import report
from twotower_spec.errors import ArgumentError

app = typer.Typer()
app.command()(report)


def test_findings_and_the_place_of_the_page_are_printed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "serve.jsonl", "load_point", load_points())
    result = CliRunner().invoke(app, [str(file), "--output", str(tmp_path / "out")], catch_exceptions=False)
    assert result.exit_code == 0
    assert (
        "Servers under load: At 1 request at a time, 8 at once and 2 requests/s TwoTower is 1.67 times as fast"
        in result.stdout
    )
    assert result.stdout.splitlines()[-1] == str(tmp_path / "out" / "report.html")
    assert (tmp_path / "out" / "report.html").read_text().startswith("<!DOCTYPE html>")


def test_file_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match=r"none\.jsonl cannot be read \(No such file or directory\)"):
        CliRunner().invoke(app, [str(tmp_path / "none.jsonl")], catch_exceptions=False)


def test_files_must_be_named() -> None:
    assert CliRunner().invoke(app, []).exit_code == 2
