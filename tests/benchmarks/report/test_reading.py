"""Files become measurements, run by run, or are refused in one sentence."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.report.builders import MACHINE, load_points, serving_cells, write_rows, write_standalone
from twotower_bench.records import Quantiles
from twotower_bench.report import write_report
from twotower_bench.report.reading import read_measurements
from twotower_spec.errors import ArgumentError


def test_rows_come_back_as_what_was_measured(tmp_path: Path) -> None:
    cells = serving_cells()
    (found,) = read_measurements([write_rows(tmp_path / "a.jsonl", "serving_cell", cells)])
    assert found.serving_cells == cells and not found.load_points and found.source == "a.jsonl"


def test_every_machine_and_command_of_a_file_is_an_origin_once(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", "serving_cell", serving_cells())
    other = write_rows(tmp_path / "b.jsonl", "load_point", load_points(), machine={**MACHINE, "gpu": "H100"})
    both = tmp_path / "both.jsonl"
    both.write_text(file.read_text() + other.read_text())
    (found,) = read_measurements([both])
    assert [origin.hardware for origin in found.origins] == [
        "Test <CPU> & more, 2 cores, 1 threads, no GPU",
        "Test <CPU> & more, 2 cores, 1 threads, H100",
    ]
    assert found.origins[0].versions == "python 3.11.7, torch 2.13.0, transformers 5.19.0, vllm 0.32.0"
    assert found.origins[0].commit == "abc1234" and found.origins[0].command == "twotower-spec bench x"


def test_runs_in_one_file_are_kept_apart_and_a_file_named_twice_is_read_once(tmp_path: Path) -> None:
    cells = serving_cells()
    first = write_rows(tmp_path / "a.jsonl", "serving_cell", cells)
    second = write_rows(tmp_path / "b.jsonl", "serving_cell", cells[:4], run="run2")
    both = tmp_path / "both.jsonl"
    both.write_text(first.read_text() + second.read_text())
    found = read_measurements([both, tmp_path / "." / "both.jsonl"])
    assert [one.serving_cells for one in found] == [cells, cells[:4]]


def test_line_that_is_still_being_written_is_left_out(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "a.jsonl", "serving_cell", serving_cells())
    file.write_text(file.read_text() + '{"index": 99, "kind": "serv')
    (found,) = read_measurements([file])
    assert found.serving_cells == serving_cells()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "has no measurements"),
        ('{"kind": "another", "run": "r"}\n', "has no measurements"),
        ("no json\n", "f.jsonl:1 is not a row"),
        ("[1]\n", "f.jsonl:1 is not a row"),
        ('{"kind": "serving_cell", "run": "r"}\n', "f.jsonl:1 is not a row .*system: Field required"),
        ('{"source": "a profile of plan"}\n', "has no measurements"),
    ],
)
def test_file_without_known_rows_is_refused_in_one_sentence(tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "f.jsonl"
    file.write_text(content)
    with pytest.raises(ArgumentError, match=reason) as refusal:
        read_measurements([file])
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("found", "replacement", "reason"),
    [
        ('"repeat": 0', '"repeat": "first"', "repeat: "),
        ('"requests": [{', '"requests": [7, {', r"requests\.0: "),
        ('"machine": {', '"machine": 7, "old": {', "machine: "),
        ('"seconds": ', '"seconds": NaN, "old": ', "is not a row that a benchmark wrote"),
        ('"title": "', '"title": "\\ud800', "is not a row that a benchmark wrote"),
        ('"load"', '"lo\0ad"', "is not a row that a benchmark wrote"),
        ('{"index": 0', '"index": 0', "is not a row that a benchmark wrote"),
    ],
)
def test_damaged_row_is_refused_in_one_sentence_with_file_and_line(
    tmp_path: Path, found: str, replacement: str, reason: str
) -> None:
    file = write_rows(tmp_path / "f.jsonl", "serving_cell", serving_cells(categories=("maths",)))
    text = file.read_text()
    assert found in text
    file.write_text("\n" + text.replace(found, replacement, 1))
    with pytest.raises(ArgumentError, match=rf"f\.jsonl:2 .*{reason}") as refusal:
        read_measurements([file])
    assert "\n" not in str(refusal.value)


def test_numbers_that_no_run_can_have_are_refused_in_one_sentence(tmp_path: Path) -> None:
    points = [replace(point, e2el=Quantiles(0.0, 0.0)) for point in load_points()]
    file = write_rows(tmp_path / "f.jsonl", "load_point", points)
    with pytest.raises(ArgumentError, match=r"f\.jsonl holds numbers that no run can have \(ZeroDivisionError"):
        write_report([file], tmp_path / "out")


def test_unreadable_file_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe")
    for file, reason in ((tmp_path / "none.jsonl", "No such file"), (tmp_path, "Is a directory"), (binary, "no text")):
        with pytest.raises(ArgumentError, match=f"{re.escape(str(file))} cannot be read.*{reason}"):
            write_report([file], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_scores_without_cells_and_cells_without_ar_are_refused(tmp_path: Path) -> None:
    lines = write_standalone(tmp_path / "s.jsonl").read_text().splitlines(keepends=True)
    for name, keep, reason in (
        ("scores.jsonl", lambda row: row["kind"] == "score", "scores alone"),
        ("diffusion.jsonl", lambda row: row["setting"]["mode"] == "mask-diffusion", "no cell of AR"),
    ):
        file = tmp_path / name
        file.write_text("".join(line for line in lines if keep(json.loads(line))))
        with pytest.raises(ArgumentError, match=reason):
            write_report([file], tmp_path / "out")


def test_secrets_of_a_recorded_command_are_in_no_report(tmp_path: Path) -> None:
    command = "twotower-spec bench serve --serve-args '--api-key s3cr3t' --repeat 3"
    (found,) = read_measurements([write_rows(tmp_path / "a.jsonl", "load_point", load_points(), command=command)])
    assert [origin.command for origin in found.origins] == [command.replace("s3cr3t", "HIDDEN")]
