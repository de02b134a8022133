"""Rows of measurements, as no benchmark writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.benchmarks.report.builders import write_all
from tests.fuzz.inputs import as_json, changed, damaged
from tests.fuzz.refusal import fuzzed, refuses_or_takes, taken_or_refused
from twotower_bench.report.reading import read_measurements
from twotower_bench.report.writing import html_of, json_of, report_of


def rows(folder: Path) -> dict[str, list[bytes]]:
    return {path.stem: path.read_bytes().splitlines(keepends=True) for path in write_all(folder)}


@pytest.fixture(scope="session")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[bytes]]:
    """Lines of a file of every benchmark."""
    return rows(tmp_path_factory.mktemp("rows"))


names = st.sampled_from(("acceptance", "sweep", "serve", "standalone"))


@fuzzed()
@given(names, st.data())
def test_changed_row(written: dict[str, list[bytes]], tmp_path: Path, name: str, data: st.DataObject) -> None:
    first, *others = written[name]
    row = data.draw(changed(json.loads(first)).map(as_json) | damaged(first))
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"".join([row, b"\n", *others[:3]]))
    refuses_or_takes(read_measurements, [file])


def whole_report(file: Path) -> None:
    report = report_of([file])
    json_of(report)
    html_of(report)


@fuzzed(share=1 / 20)
@given(names, st.data())
def test_whole_report(written: dict[str, list[bytes]], tmp_path: Path, name: str, data: st.DataObject) -> None:
    lines = list(written[name])
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = data.draw(changed(json.loads(lines[place])).map(as_json)) + b"\n"
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"".join(lines))
    with taken_or_refused():
        whole_report(file)


# What the long form and its like have found: file, place of a value in its first row, what stands there instead.
FOUND: list[tuple[str, tuple[str, ...], Any]] = [
    ("acceptance", ("system", "title"), "$x^$"),
    ("acceptance", ("system", "title"), "a\0b"),
    ("acceptance", ("load", "category"), "$\\frac{$"),
    ("acceptance", ("system", "speculative_config"), {"twotower": 7}),
    ("acceptance", ("drafting", "seconds"), {}),
    ("acceptance", ("requests",), []),
    ("acceptance", ("load", "concurrency"), 0),
    ("acceptance", ("seconds",), 1e308),
    ("serve", ("num_output_tokens",), 10**30),
    ("serve", ("texts",), []),
]


@pytest.mark.parametrize(("name", "place", "value"), FOUND)
def test_what_was_found(
    written: dict[str, list[bytes]], tmp_path: Path, name: str, place: tuple[str, ...], value: Any
) -> None:
    lines = [json.loads(line) for line in written[name]]
    row = next(line for line in lines if line.get(place[0]) is not None)
    inner = row
    for step in place[:-1]:
        inner = inner[step]
    inner[place[-1]] = value
    file = tmp_path / "f.jsonl"
    file.write_bytes(b"".join(as_json(line) + b"\n" for line in lines))
    with taken_or_refused():
        whole_report(file)
