"""Faults of the drafter are logged once a kind and followed by a pause that grows; no vLLM is needed."""

from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from twotower_spec.drafting import DraftBlock, Round
from twotower_spec.drafting.backoff import LONGEST_PAUSE
from vllm_twotower import faults
from vllm_twotower.faults import FaultHandler


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that are logged, whatever vLLM does to loggers."""
    lines: list[str] = []

    def error(text: str, *values: object, **_: Any) -> None:
        lines.append(text % values)

    monkeypatch.setattr(faults.logger, "error", error)
    return lines


def ended(denoised: int, damaged: int) -> Round:
    return Round(DraftBlock.empty(()), None, num_denoised=denoised, num_damaged=damaged)


def rounds_skipped(handler: FaultHandler) -> int:
    count = 0
    while handler.skips_round():
        count += 1
    return count


@pytest.mark.usefixtures("logged")
def test_the_pause_grows_while_rounds_fail_and_begins_anew_after_one_that_does_not() -> None:
    handler, pauses = FaultHandler(), []
    for _ in range(9):
        handler.recover(RuntimeError("injected"), lambda: None)
        pauses.append(rounds_skipped(handler))
    assert pauses == [0, 1, 3, 7, 15, 31, 63, LONGEST_PAUSE, LONGEST_PAUSE]
    handler.judge(ended(denoised=3, damaged=1))
    handler.recover(RuntimeError("injected"), lambda: None)
    assert rounds_skipped(handler) == 0


def test_rounds_of_nothing_but_nan_are_followed_by_pauses_and_one_line(logged: list[str]) -> None:
    handler, pauses = FaultHandler(), []
    for _ in range(4):
        handler.judge(ended(denoised=2, damaged=2))
        pauses.append(rounds_skipped(handler))
        handler.judge(ended(denoised=0, damaged=0))  # nothing is ready: neither a failure nor a success
    assert pauses == [0, 1, 3, 7]
    handler.judge(ended(denoised=2, damaged=1))
    handler.judge(ended(denoised=2, damaged=2))
    assert rounds_skipped(handler) == 0
    assert len(logged) == 1 and "gave NaN" in logged[0] and "checkpoint's weights" in logged[0]


def test_every_kind_of_fault_is_logged_once_with_its_remedy(logged: list[str]) -> None:
    handler = FaultHandler()
    for error in (ValueError("first"), ValueError("second"), torch.OutOfMemoryError("third")):
        handler.recover(error, lambda: None)
    assert [line.splitlines()[0].partition("(")[2] for line in logged] == [
        "ValueError: first); please report this",
        "OutOfMemoryError: third); lower pool_requests or pool_tokens, or place the towers on other devices",
    ]


class Refused(Exception):
    """An error that says what a request holds, as one of a dependency might."""


TOKENS = [17, 4, 1999, 3, 3, 250, 61, 8]


@pytest.mark.parametrize(
    "printed",
    [
        str(TOKENS),
        str(torch.tensor(TOKENS)),
        str([np.int64(token) for token in TOKENS]),
        str([torch.tensor(token) for token in TOKENS]),
        repr(np.array(TOKENS)),
        str(dict(enumerate(TOKENS))),
        str([str(token) for token in TOKENS]),
        " ".join(map(str, TOKENS)),
        "\n".join(map(str, TOKENS)),
    ],
)
def test_tokens_that_an_error_names_are_left_out(printed: str, logged: list[str]) -> None:
    try:
        raise KeyError(printed)
    except KeyError as error:
        cause = error
    refused = Refused(f"no room for {printed} in (8, 16, 4096)")
    refused.__cause__ = cause
    FaultHandler().log(refused, "a round failed")
    (line,) = logged
    assert "1999" not in line and "250" not in line
    assert "(Refused: no room for" in line and "in (8, 16, 4096)); please report this" in line
    assert "KeyError" in line and "test_faults.py" in line  # where it was raised


def test_a_reset_that_fails_is_tried_again_ever_more_rarely_until_it_does_not(logged: list[str]) -> None:
    handler, reset = FaultHandler(), Mock(side_effect=[KeyError("a reset")] * 3 + [None])
    handler.recover(ValueError("a round"), reset)
    tried = []
    while not handler.is_usable():
        tried.append(reset.call_count)
    assert tried == [2, 2, 3, 3, 3, 3] and reset.call_count == 4 and handler.is_usable()
    assert [line.partition(" (")[0] for line in logged] == [
        "TwoTower: the drafter cannot be reset and drafts nothing until it can",
        "TwoTower: a drafting round failed; its requests go on without drafts, contexts are read again",
    ]
