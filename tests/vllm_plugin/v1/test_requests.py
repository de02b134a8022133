"""Assignment of rows to requests, and the drafts that each can still use."""

from types import SimpleNamespace

import numpy as np

from vllm_twotower.v1.requests import Row, RowsByContent, gone, usable_drafts


def row(*tokens: int) -> Row:
    return np.array(tokens, dtype=np.int32)


def test_rows_are_found_by_content_however_they_are_ordered() -> None:
    rows = RowsByContent()
    first, second = rows.identify([row(1, 2, 3), row(4, 5)])
    assert first != second
    assert rows.identify([row(4, 5, 6), row(1, 2, 3, 9, 9)]) == [second, first]
    (third,) = rows.identify([row(4, 7)])
    assert third not in (first, second)


def test_two_rows_with_one_history_are_two_requests() -> None:
    rows = RowsByContent()
    ids = rows.identify([row(1, 2), row(1, 2)])
    assert len(set(ids)) == 2
    assert sorted(rows.identify([row(1, 2, 3), row(1, 2, 4)])) == sorted(ids)


def test_a_request_is_not_drafted_beyond_its_end() -> None:
    request = SimpleNamespace(sampling_params=SimpleNamespace(max_tokens=10, min_tokens=0), output_token_ids=[7] * 6)
    runner = SimpleNamespace(max_model_len=100, requests={"a": request})
    assert usable_drafts(runner, "a", 50, 16) == 3  # 4 tokens are left, one of which the verifier adds
    assert usable_drafts(runner, "a", 98, 16) == 1
    assert usable_drafts(runner, "a", 100, 16) == 0
    assert usable_drafts(runner, "unknown", 50, 16) == 16
    request.sampling_params.max_tokens = None
    assert usable_drafts(runner, "a", 50, 16) == 16
    request.sampling_params.min_tokens = 9
    assert usable_drafts(runner, "a", 50, 16) == 2  # the token after them is the last one before the text may end
    request.sampling_params.min_tokens = 6
    assert usable_drafts(runner, "a", 50, 16) == 16


def test_a_preempted_request_is_not_gone() -> None:
    runner = SimpleNamespace(requests={"running": 1, "preempted": 1})
    assert gone(["running", "preempted", "finished"], runner) == ["finished"]
