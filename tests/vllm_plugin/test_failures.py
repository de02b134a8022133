"""A fault of the drafter costs drafts, never a request and never the engine; it is counted, and logged once.

A part of the matrix that `python -m benchmarks.faults` runs: every stage, and every kind of fault at several of them.
"""

from __future__ import annotations

from importlib.util import find_spec

import pytest

from tests.vllm_plugin.engine import ROOMY, run_engine, two_tower
from tests.vllm_plugin.faults import cells_seen
from tests.vllm_plugin.installed import needs_the_stock_sampler, samples_on_a_cpu
from twotower_bench.faults.cells import KINDS, Cell, Seen
from twotower_bench.faults.stages import STAGES

pytestmark = [
    pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM"),
    pytest.mark.slow,
]

CELLS = [
    Cell("V1", *place)
    for place in (
        ("begin of a step", "exception", "during"),
        ("begin of a step", "wrong shape", "before"),
        ("requests of a step", "wrong shape", "during"),
        ("requests of a step", "damaged state", "after"),
        ("admission", "exception", "before"),
        ("admission", "damaged state", "during"),
        ("admission", "full pool", "before"),
        ("pool claim", "exception", "during"),
        ("pool claim", "damaged state", "after"),
        ("first tokens", "NaN", "during"),
        ("first tokens", "wrong shape", "before"),
        ("worth denoising", "wrong shape", "during"),
        ("release", "exception", "after"),
        ("release", "damaged state", "during"),
        ("policy plan", "exception", "during"),
        ("policy plan", "wrong shape", "before"),
        ("policy observe", "exception", "during"),
        ("policy observe", "hang", "before"),
        ("context pass", "exception", "during"),
        ("context pass", "NaN", "before"),
        ("context pass", "damaged state", "after"),
        ("denoiser pass", "exception", "before"),
        ("denoiser pass", "NaN", "during"),
        ("denoiser pass", "out of memory", "after"),
        ("denoiser pass", "hang", "during"),
        ("commit", "damaged state", "during"),
        ("commit", "wrong shape", "during"),
        ("read-back", "NaN", "during"),
        ("read-back", "damaged state", "before"),
        ("metrics", "exception", "before"),
        ("metrics", "NaN", "during"),
        ("verification", "exception", "before"),
        ("verification", "wrong shape", "during"),
        ("reset", "exception", "during"),
        ("reset", "out of memory", "after"),
    )
]
COUNTED_AS = {
    ("admission", "full pool"): "no room",
    ("requests of a step", "damaged state"): "foreign token",
    ("denoiser pass", "exception"): "error",
    ("denoiser pass", "out of memory"): "error",
    ("context pass", "NaN"): "not finite",
    ("commit", "damaged state"): "not finite",
    ("verification", "exception"): "sampler",
}


@pytest.fixture(scope="module")
def seen() -> dict[Cell, Seen]:
    return cells_seen([cell for cell in CELLS if samples_on_a_cpu() or cell.stage != "verification"])


def test_every_stage_and_every_kind_of_fault_is_among_the_cells() -> None:
    assert {cell.stage for cell in CELLS} == STAGES["V1"].keys()
    assert {cell.kind for cell in CELLS} == set(KINDS)


@pytest.mark.parametrize(
    "cell",
    [pytest.param(cell, marks=needs_the_stock_sampler() if cell.stage == "verification" else ()) for cell in CELLS],
    ids=lambda cell: f"{cell.stage}-{cell.kind}-{cell.when}",
)
def test_requests_go_on_without_drafts_and_drafts_come_back(cell: Cell, seen: dict[Cell, Seen]) -> None:
    found = seen[cell]
    assert found.outcome == "held", found
    if (cell.stage, cell.kind) in COUNTED_AS:
        assert found.counted[COUNTED_AS[cell.stage, cell.kind]] > 0


def test_a_sentence_in_the_log_names_the_error_and_the_remedy(seen: dict[Cell, Seen]) -> None:
    said = {cell: one.sentences for cell, one in seen.items()}
    assert "(RuntimeError: injected); please report this" in said[Cell("V1", "denoiser pass", "exception", "before")][0]
    (memory,) = said[Cell("V1", "denoiser pass", "out of memory", "after")]
    assert "(OutOfMemoryError: injected); lower pool_requests or pool_tokens" in memory


def test_an_engine_whose_drafter_cannot_be_loaded_runs_without_drafts() -> None:
    expected = run_engine(["plain_text"], None, **ROOMY)["plain_text"]
    found = run_engine(["plain_text"], two_tower(8), prepare="fail_to_load", **ROOMY)
    assert found["plain_text"] == expected
    assert found["log"].count("loading failed; vLLM goes on without drafts") == 1
