"""A cell in which something does not hold is shown as failed; no vLLM is needed."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from twotower_bench.faults.cells import Cell, Seen
from twotower_bench.faults.document import rows_of, summary, trial_rows
from twotower_bench.faults.trials import Trial

SENTENCE = "TwoTower: a drafting round failed (RuntimeError: injected); please report this"
HELD = Seen(
    Cell("V1", "denoiser pass", "exception", "during"),
    num_fired=3,
    num_requests=12,
    num_answered=12,
    num_equal=12,
    num_accepted_after=40,
    num_steps_back=2,
    counted={"error": 9},
    sentences=(SENTENCE,),
)


def test_a_cell_in_which_all_holds_has_no_faults() -> None:
    assert HELD.outcome == "held" and not HELD.faults


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"num_equal": 11}, "1 of 12 texts wrong"),
        ({"num_answered": 10, "num_equal": 10}, "2 of 12 requests lost"),
        ({"num_accepted_after": 0}, "no draft was accepted afterwards"),
        ({"num_fired": 0}, "the fault was never there"),
        ({"sentences": (SENTENCE, SENTENCE)}, "2 sentences in the log"),
        ({"sentences": ()}, "nothing in the log"),
        ({"sentences": ("it failed",)}, "no remedy in: it failed"),
    ],
)
def test_what_does_not_hold_is_named_and_the_table_shows_it(change: dict[str, Any], fault: str) -> None:
    broken = replace(HELD, **change)
    assert broken.faults == [fault] and broken.outcome == "failed"
    (row,) = rows_of([broken, replace(HELD, cell=replace(HELD.cell, when="after"))])
    assert row["outcome"] == "failed" and row["remark"] == f"during: {fault}"
    assert summary([HELD, broken]) == "2 cells: 1 held, 1 failed, 0 that a stage cannot have"


def test_a_fault_that_a_stage_cannot_have_says_why() -> None:
    (row,) = rows_of([Seen(replace(HELD.cell, kind="NaN"), reason="no floating-point number passes here")])
    assert row["outcome"] == "n/a" and row["remark"] == "no floating-point number passes here"


def test_a_trial_that_failed_says_what_does_not_hold() -> None:
    (row,) = trial_rows([Trial("SIGKILL", "no process left", "left: an engine", ("left over: an engine",))])
    assert row["outcome"] == "failed" and row["seen"] == "left over: an engine; left: an engine"
