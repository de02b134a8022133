"""Faults of the drafter are logged once a kind and followed by a pause that grows; no vLLM is needed."""

from typing import Any
from unittest.mock import Mock

import pytest
import torch

from vllm_twotower import faults
from vllm_twotower.faults import LONGEST_PAUSE, FaultHandler


@pytest.fixture
def logged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that are logged, whatever vLLM does to loggers."""
    lines: list[str] = []

    def error(text: str, *values: object, **_: Any) -> None:
        lines.append(text % values)

    monkeypatch.setattr(faults.logger, "error", error)
    return lines


def rounds_skipped(handler: FaultHandler) -> int:
    count = 0
    while handler.skips_round():
        count += 1
    return count


@pytest.mark.usefixtures("logged")
def test_the_pause_grows_while_rounds_fail_and_begins_anew_after_one_that_does_not() -> None:
    handler, pauses = FaultHandler(), []
    for _ in range(9):
        assert handler.recover(RuntimeError("injected"), lambda: None)
        pauses.append(rounds_skipped(handler))
    assert pauses == [0, 1, 3, 7, 15, 31, 63, LONGEST_PAUSE, LONGEST_PAUSE]
    handler.round_succeeded()
    assert handler.recover(RuntimeError("injected"), lambda: None)
    assert rounds_skipped(handler) == 0


def test_every_kind_of_fault_is_logged_once_with_its_remedy(logged: list[str]) -> None:
    handler = FaultHandler()
    for error in (ValueError("first"), ValueError("second"), torch.OutOfMemoryError("third")):
        handler.recover(error, lambda: None)
    assert [line.partition("(")[2] for line in logged] == [
        "ValueError: first); please report this",
        "OutOfMemoryError: third); lower pool_requests or pool_tokens, or place the towers on other devices",
    ]


def test_a_drafter_that_cannot_be_reset_is_given_up_without_raising(logged: list[str]) -> None:
    assert not FaultHandler().recover(ValueError("a round"), Mock(side_effect=KeyError("a reset")))
    assert [line.partition(" (")[0] for line in logged] == [
        "TwoTower: the drafter cannot be reset; vLLM goes on without drafts",
        "TwoTower: a drafting round failed; its requests go on without drafts, contexts are read again",
    ]
