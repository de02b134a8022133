"""A fault costs drafts in model runner V2 too, where nothing else would catch it; it is counted, and logged once."""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.faults import cells_seen
from tests.vllm_plugin.fork_server import V2_ON_CPU
from tests.vllm_plugin.v2.engine import run_v2_engine
from twotower_bench.faults.cells import Cell, Seen

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

CELLS = [
    Cell("V2", *place, "during")
    for place in (
        ("begin of a step", "exception"),
        ("history", "exception"),
        ("late history", "exception"),
        ("speculator", "wrong shape"),
        ("speculator", "full pool"),
        ("denoiser pass", "exception"),
        ("context pass", "damaged state"),
        ("policy observe", "exception"),
        ("commit", "damaged state"),
        ("verification", "exception"),
    )
]
COUNTED_AS = {
    "history": "error",
    "late history": "error",
    "denoiser pass": "error",
    "context pass": "not finite",
    "verification": "sampler",
}


@pytest.fixture(scope="module")
def seen() -> dict[Cell, Seen]:
    return cells_seen(CELLS, V2_ON_CPU)


@pytest.mark.parametrize("cell", CELLS, ids=lambda cell: f"{cell.stage}-{cell.kind}")
def test_requests_go_on_and_drafts_come_back(cell: Cell, seen: dict[Cell, Seen]) -> None:
    found = seen[cell]
    assert found.outcome == "held", found
    if cell.stage in COUNTED_AS:
        assert found.counted[COUNTED_AS[cell.stage]] > 0


def test_an_engine_whose_drafter_cannot_be_loaded_runs_without_drafts() -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = run_v2_engine(["plain_text"], two_tower(8), prepare="fail_to_load", **ROOMY)
    assert found["plain_text"] == expected
    assert found["log"].count("loading failed; vLLM goes on without drafts") == 1
