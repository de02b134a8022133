"""Files of measurements, without vLLM."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from tests.benchmarks.report.builders import NGRAM, load_points
from twotower_bench.measurement_file import SystemsFile
from twotower_bench.records import LoadPoint


def test_secrets_are_in_no_row_and_the_file_goes_on_without_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["twotower-spec", "bench", "serve", "--serve-args", "--api-key s3cr3t"])
    rival = replace(NGRAM, speculative_config={"method": "eagle", "api_key": "s3cr3t"})
    point = replace(load_points()[0], system=rival)
    path = tmp_path / "serve.jsonl"

    def file() -> SystemsFile[LoadPoint]:
        return SystemsFile(["content"], "load_point", LoadPoint, [rival])

    first = file()
    with first.opened(path, overwrite=False):
        first.keep(point)
    assert "s3cr3t" not in path.read_text()
    assert json.loads(path.read_text())["command"].endswith("'--api-key HIDDEN'")
    again = file()
    with again.opened(path, overwrite=False):
        assert list(again.found) == list(first.found)
