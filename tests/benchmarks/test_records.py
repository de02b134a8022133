"""Rows of benchmarks come back from their JSON, and what is wrong with one is said in a sentence."""

import json
from dataclasses import asdict
from typing import Any

import pytest

from tests.support.serving_cells import drafted, served_cell
from twotower_bench.records import DraftSetting, ServingCell, Traffic, read_row
from twotower_spec.errors import ArgumentError

SETTING = DraftSetting(4, 8, 2, "threshold", 0.8, "denoiser")


def row(**change: Any) -> dict[str, Any]:
    cell = served_cell(drafted(SETTING), 2, accepted=[(1, 2), (4, 0, 3)])
    return {"index": 0, "kind": "serving_cell", **json.loads(json.dumps(asdict(cell))), **change}


def test_cell_with_a_setting_comes_back_as_it_was() -> None:
    found = read_row(ServingCell, row())
    assert found == served_cell(drafted(SETTING), 2, accepted=[(1, 2), (4, 0, 3)])
    assert found.system.setting == SETTING


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"seconds": "long"}, "seconds: Input should be a valid number"),
        ({"requests": [{}]}, r"requests\.0\.prompt_id: Field required"),
        ({"load": None}, "load: "),
        ({"system": {**row()["system"], "setting": {"num_speculative_tokens": 9, "block_size": 8}}}, "is more than"),
    ],
)
def test_row_that_is_none_is_refused_with_its_place_and_field(change: dict[str, Any], named: str) -> None:
    with pytest.raises(ArgumentError, match=rf"^f\.jsonl:3 is not a row that a benchmark wrote \(.*{named}") as refusal:
        read_row(ServingCell, row(**change), "f.jsonl:3")
    assert "\n" not in str(refusal.value)
    with pytest.raises(ArgumentError, match="the whole row"):
        read_row(Traffic, [])
