"""Who fits, who starts over, and what a round reads: with a real tower, so that the state can be compared."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from tests.state.steps import assert_same, logits_after
from tests.support.builders import random_ids, tiny_model
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import DraftRequest
from twotower_spec.drafting.admission import Admission
from twotower_spec.state import ContextState


@cache
def tiny() -> TwoTowerModel:
    return tiny_model()


def new_admission(num_slots: int = 4, token_budget: int = 100) -> Admission:
    config = tiny().config
    return Admission(ContextState(config, num_slots, 60, tiny().dtype, page_size=4), token_budget, config.vocab_size)


def advance(admission: Admission, rows: dict[str, list[int]]) -> dict[str, Tensor]:
    """One round's reading; the last logits of requests that are complete now and had new tokens."""
    admitted = admission.admit([DraftRequest(name, row) for name, row in rows.items()])
    if not admitted.increments:
        return {}
    logits = admission.state.extend(tiny().context, admitted.increments).logits
    assert logits is not None
    read = dict(zip(map(str, admitted.increments), logits, strict=True))
    return {str(name): read[str(name)] for name in admitted.completed}


def fresh(row: list[int]) -> Tensor:
    """The logits of a row that is read at once."""
    return logits_after(tiny(), new_admission().state, "fresh", row)


def test_mismatched_history_rebuilds_that_request_alone() -> None:
    admission, b = new_admission(), random_ids(8, seed=1)
    advance(admission, {"a": random_ids(8), "b": b})
    slot, other = admission.state.entry("b").slot, random_ids(9, seed=7)
    logits = advance(admission, {"a": other, "b": [*b, 5]})
    assert admission.state.entry("b").slot == slot and admission.state.num_evictions == 0
    assert_same(logits["a"], fresh(other))
    assert_same(logits["b"], fresh([*b, 5]))


def test_token_budget_holds_and_every_call_makes_progress() -> None:
    admission, row = new_admission(token_budget=5), random_ids(23)
    computed = []
    for _ in range(6):
        logits = advance(admission, {"a": row})
        computed.append(admission.state.num_computed_tokens("a"))
        assert bool(logits) == (computed[-1] == 23 and len(computed) == 5)
    assert computed == [5, 10, 15, 20, 23, 23]


def test_requests_vanish_and_return_in_any_order() -> None:
    admission = new_admission(num_slots=2)
    rows = {name: random_ids(12, seed=seed) for seed, name in enumerate("abc")}
    for names, length in (("ab", 4), ("ca", 6), ("b", 7), ("cb", 9), ("ac", 12)):
        logits = advance(admission, {name: rows[name][:length] for name in names})
        for name in names:
            assert_same(logits[name], fresh(rows[name][:length]))


def test_a_request_of_a_call_is_not_evicted_for_another_one_of_it() -> None:
    admission = new_admission(num_slots=3)
    rows = {name: random_ids(8, seed=i) for i, name in enumerate("abc")}
    advance(admission, {"a": rows["a"]})
    advance(admission, {"old": random_ids(8, seed=9)})
    admission.token_budget = 3
    advance(admission, rows)  # reads a part of b alone, and needs the slot of "old"
    assert admission.state.num_computed_tokens("a") == 8 and "old" not in admission.state


def test_evicted_request_gets_the_logits_of_a_fresh_start() -> None:
    admission, row = new_admission(num_slots=1), random_ids(12)
    advance(admission, {"a": row[:8]})
    advance(admission, {"b": random_ids(30, seed=1)})
    assert_same(advance(admission, {"a": row})["a"], fresh(row))


def test_budget_is_shared_by_requests_in_their_order() -> None:
    admission, rows = new_admission(token_budget=8), {name: random_ids(7, seed=i) for i, name in enumerate("abc")}
    seen: list[list[int]] = []
    complete: list[list[str]] = []
    while sum(map(admission.state.num_computed_tokens, rows)) < 21:
        complete.append(list(advance(admission, rows)))
        seen.append([admission.state.num_computed_tokens(name) for name in rows])
    assert seen == [[7, 1, 0], [7, 7, 2], [7, 7, 7]]
    assert complete == [["a"], ["b"], ["c"]]


def test_row_that_lost_tokens_is_rebuilt() -> None:
    admission, row = new_admission(), random_ids(9)
    advance(admission, {"a": row})
    logits = advance(admission, {"a": row[:6]})["a"]
    assert admission.state.num_computed_tokens("a") == 6
    assert_same(logits, fresh(row[:6]))


def test_row_without_new_tokens_costs_no_pass() -> None:
    admission, row = new_admission(), random_ids(9)
    advance(admission, {"a": row})
    pool = (admission.state.mamba.conv, admission.state.mamba.ssm, admission.state.kv_cache.keys)
    before = [tensor.clone() for tensor in pool]
    assert advance(admission, {"a": row}) == {}
    assert all(torch.equal(x, y) for x, y in zip(before, pool, strict=True))


def test_ready_requests_come_in_the_order_given_and_the_others_are_counted() -> None:
    admission = new_admission(num_slots=3, token_budget=20)
    rows = {"long": random_ids(40), "b": random_ids(6, seed=1), "a": random_ids(3, seed=2), "odd": [10**6]}
    admitted = admission.admit([DraftRequest(name, row) for name, row in rows.items()])
    assert [one.request_id for one in admitted.ready] == ["b", "a"]
    assert admitted.without_drafts == {"prefilling": 1, "foreign token": 1}
    assert {name: len(tokens) for name, tokens in admitted.increments.items()} == {"a": 3, "b": 6, "long": 11}
