"""Requests share slots, pages and passes, and must not notice each other."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.state.steps import assert_same, logits_after
from tests.support.builders import random_ids, tiny_model
from twotower_spec import ArgumentError, StateFullError, TwoTowerModel
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import take_within_budget


@pytest.fixture
def model() -> TwoTowerModel:
    return tiny_model()


def new_state(model: TwoTowerModel, num_slots: int = 4, num_pages: int = 60, page_size: int = 4) -> ContextState:
    return ContextState(model.config, num_slots, num_pages, model.dtype, page_size=page_size)


def mamba_states(state: ContextState, request: object) -> tuple[Tensor, Tensor]:
    slot = state.entry(request).slot
    return state.mamba.conv[:, slot].clone(), state.mamba.ssm[:, slot].clone()


def pool(state: ContextState) -> list[Tensor]:
    return [t.clone() for t in (state.mamba.conv, state.mamba.ssm, state.kv_cache.keys, state.kv_cache.values)]


def denoise(model: TwoTowerModel, state: ContextState, requests: list[Any], block: Tensor, t: Tensor | None) -> Tensor:
    with torch.inference_mode():
        return model.denoiser.step(block, state.block_context(requests, block.shape[1]), t)


lengths = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(deadline=None, max_examples=20)
@given(lengths=lengths)
def test_logits_of_a_ragged_pass_are_those_of_each_request_alone(lengths: list[int]) -> None:
    model = tiny_model()
    rows = {row: random_ids(length, seed=row) for row, length in enumerate(lengths)}
    together = new_state(model).extend(model.context, rows, logits="all").logits
    assert together is not None
    for ids, logits in zip(rows.values(), together.split(lengths), strict=True):
        alone = new_state(model).extend(model.context, {0: ids}, logits="all").logits
        assert alone is not None
        assert_same(logits, alone)


@pytest.mark.parametrize("block_size", [1, 5])
@settings(deadline=None, max_examples=20)
@given(lengths=lengths)
def test_denoiser_logits_of_a_ragged_batch_are_those_of_each_request_alone(block_size: int, lengths: list[int]) -> None:
    # One token without time conditioning is the mock-AR step.
    model, state = tiny_model(), new_state(tiny_model())
    rows = list(range(len(lengths)))
    state.extend(model.context, {row: random_ids(lengths[row], seed=row) for row in rows})
    block = torch.tensor([random_ids(block_size, seed=row + 9) for row in rows])
    t = None if block_size == 1 else (torch.tensor(rows).double() + 1) / 4
    together = denoise(model, state, rows, block, t)
    for row in rows:
        alone = denoise(model, state, [row], block[row : row + 1], None if t is None else t[row : row + 1])
        assert_same(together[row], alone[0])


@settings(deadline=None, max_examples=20)
@given(lengths=lengths, data=st.data())
def test_accepting_any_prefixes_equals_never_having_read_the_rest(lengths: list[int], data: st.DataObject) -> None:
    model, state = tiny_model(), new_state(tiny_model())
    rows = list(range(len(lengths)))
    prompts = {row: random_ids(row * 5 + 1, seed=row) for row in rows}
    blocks = {row: random_ids(lengths[row], seed=row + 9) for row in rows}
    accepted = {row: data.draw(st.integers(0, lengths[row])) for row in rows}
    state.extend(model.context, prompts)
    state.extend(model.context, blocks, provisional=True).accept(accepted)
    for row in rows:
        kept, fresh = [*prompts[row], *blocks[row][: accepted[row]]], new_state(model)
        fresh.extend(model.context, {0: kept})
        for actual, expected in zip(mamba_states(state, row), mamba_states(fresh, 0), strict=True):
            assert_same(actual, expected)
        assert_same(logits_after(model, state, row, [7]), logits_after(model, fresh, 0, [7]))


def test_provisional_logits_are_those_of_a_plain_pass(model: TwoTowerModel) -> None:
    rows = {"a": random_ids(5), "b": random_ids(2, seed=1)}
    trial = new_state(model).extend(model.context, rows, logits="all", provisional=True).logits
    plain = new_state(model).extend(model.context, rows, logits="all").logits
    assert trial is not None and plain is not None and torch.equal(trial, plain)


def test_provisional_pass_leaves_states_and_lengths_where_they_were(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(5)})
    before = mamba_states(state, "a")
    state.extend(model.context, {"a": random_ids(9, seed=1)}, provisional=True)
    assert state.num_computed_tokens("a") == 5
    assert all(torch.equal(x, y) for x, y in zip(before, mamba_states(state, "a"), strict=True))


def test_requests_outside_a_pass_keep_their_state_bit_for_bit(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {name: random_ids(6, seed=i) for i, name in enumerate("abc")})
    before = mamba_states(state, "b")
    state.extend(model.context, {"c": random_ids(3), "a": random_ids(9)}, provisional=True).accept({"c": 1, "a": 9})
    state.extend(model.context, {"a": [5]})
    assert all(torch.equal(x, y) for x, y in zip(before, mamba_states(state, "b"), strict=True))


def test_a_pass_is_accepted_once(model: TwoTowerModel) -> None:
    state = new_state(model)
    result = state.extend(model.context, {"a": [5, 6, 7]}, provisional=True)
    result.accept({"a": 1})
    with pytest.raises(ArgumentError, match="has been accepted"):
        result.accept({"a": 1})
    assert state.entry("a").token_ids == [5]


def test_a_pass_that_was_not_provisional_cannot_be_accepted(model: TwoTowerModel) -> None:
    state = new_state(model)
    result = state.extend(model.context, {"a": [5, 6, 7]})
    with pytest.raises(ArgumentError, match="not provisional"):
        result.accept({"a": 3})
    assert state.entry("a").token_ids == [5, 6, 7]


@pytest.mark.parametrize("meanwhile", ["evicted", "evicted and back", "extended"])
def test_a_stale_pass_is_refused_and_changes_nothing(model: TwoTowerModel, meanwhile: str) -> None:
    state = new_state(model, num_slots=1)
    state.extend(model.context, {"a": [5, 6]})
    stale = state.extend(model.context, {"a": [8, 9]}, provisional=True)
    if meanwhile != "extended":
        state.extend(model.context, {"b": [10]})
    if meanwhile != "evicted":
        state.extend(model.context, {"a": [11]})
    before = pool(state)
    with pytest.raises(ArgumentError, match="'a'"):
        stale.accept({"a": 2})
    assert all(torch.equal(x, y) for x, y in zip(before, pool(state), strict=True))


def test_missing_number_is_refused_before_anything_moves(model: TwoTowerModel) -> None:
    state = new_state(model)
    result = state.extend(model.context, {"a": [5, 6], "b": [7]}, provisional=True)
    before = pool(state)
    with pytest.raises(ArgumentError, match="request 'b'"):
        result.accept({"a": 1})
    assert all(torch.equal(x, y) for x, y in zip(before, pool(state), strict=True))
    assert state.num_computed_tokens("a") == 0


def test_released_requests_leave_no_nan_behind(model: TwoTowerModel) -> None:
    state = new_state(model)
    logits_after(model, state, "broken", random_ids(60))
    slot, pages = state.entry("broken").slot, state.entry("broken").pages
    for tensor in (state.mamba.conv, state.mamba.ssm):
        tensor[:, slot] = torch.nan
    for tensor in (state.kv_cache.keys, state.kv_cache.values):
        tensor.unflatten(1, (-1, 4))[:, pages] = torch.nan
    state.release("broken")
    rows = {"short": random_ids(3), "long": random_ids(21, seed=1)}
    actual, expected = (s.extend(model.context, rows).logits for s in (state, new_state(model)))
    assert actual is not None and expected is not None and torch.equal(actual, expected)


def test_nan_of_one_request_does_not_reach_the_others_of_its_batch(model: TwoTowerModel) -> None:
    state = new_state(model)
    rows = {"broken": random_ids(21), "short": random_ids(3, seed=1), "long": random_ids(33, seed=2)}
    for name in rows:
        state.extend(model.context, {name: rows[name]})
    state.mamba.ssm[:, state.entry("broken").slot] = torch.nan
    state.kv_cache.keys.unflatten(1, (-1, 4))[:, state.entry("broken").pages] = torch.nan
    state.kv_cache.values.unflatten(1, (-1, 4))[:, state.entry("broken").pages] = torch.nan
    block, t = torch.full((3, 5), 3), torch.ones(3)
    names = ["broken", "short", "long"]
    assert torch.isfinite(denoise(model, state, names, block, t)).flatten(1).all(1).tolist() == [False, True, True]
    logits = state.extend(model.context, {name: [9] for name in names}).logits
    assert logits is not None and torch.isfinite(logits).all(1).tolist() == [False, True, True]


def test_scattered_slots_and_pages_give_the_denoiser_the_same(model: TwoTowerModel) -> None:
    state, straight = new_state(model), new_state(model)
    rows = {name: random_ids(4 + 5 * i, seed=i) for i, name in enumerate("abc")}
    for start in range(0, 14, 3):  # turns: the pages of all interleave
        state.extend(model.context, {n: r[start : start + 3] for n, r in rows.items() if r[start : start + 3]})
    straight.extend(model.context, rows)
    block, t = torch.tensor([[3, 9, 3], [3, 3, 3]]), torch.tensor([2 / 3, 1.0]).double()
    assert_same(
        denoise(model, state, ["c", "a"], block, t),  # slots that are not consecutive
        denoise(model, straight, ["a", "b", "c"], block[[1, 1, 0]], t[[1, 1, 0]])[[2, 0]],
    )


def test_denoising_many_steps_leaves_the_pool_bit_for_bit_as_it_was(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(5), "b": random_ids(19), "c": random_ids(1)})
    before = pool(state)
    context = state.block_context(["c", "a", "b"], 4)
    with torch.inference_mode():
        for step in range(4):
            some = context if step < 2 else context.select([2, 0])
            block = torch.tensor([random_ids(4, seed=step + row) for row in range(2 if step >= 2 else 3)])
            model.denoiser.step(block, some, torch.full((len(block),), 0.5))
    assert all(torch.equal(x, y) for x, y in zip(before, pool(state), strict=True))


def test_a_step_reads_the_mamba_states_where_the_pool_has_them(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {name: random_ids(5) for name in "abc"})
    for names, slot in (("b", 1), ("bc", 1)):
        context = state.block_context(list(names), 4)
        conv, ssm = context.states.read(0)
        assert ssm.data_ptr() == state.mamba.ssm[0, slot].data_ptr()
        assert conv.data_ptr() == state.mamba.conv[0, slot].data_ptr()


def test_refusal_counts_the_requests_it_is_about(model: TwoTowerModel) -> None:
    with pytest.raises(StateFullError) as refusal:
        new_state(model, num_slots=1).extend(model.context, {"a": [5], "b": [6]})
    assert str(refusal.value) == (
        "no slot is left for 2 requests at once (slots 1, pages 60 of 4 tokens); give the state more, or pass fewer "
        "requests"
    )


def test_eviction_spares_the_requests_of_the_call(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=2)
    logits_after(model, state, "a", random_ids(4))
    logits_after(model, state, "b", random_ids(4))
    state.extend(model.context, {"c": [5], "a": [6]})  # "a" is the oldest, but needed
    assert "a" in state and "b" not in state


def test_reading_for_a_block_counts_as_use(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=2)
    logits_after(model, state, "a", random_ids(4))
    logits_after(model, state, "b", random_ids(4))
    state.block_context(["a"], 4)
    logits_after(model, state, "c", [5])
    assert "a" in state and "b" not in state


def test_budget_below_one_is_refused() -> None:
    with pytest.raises(ArgumentError, match="token_budget 0"):
        take_within_budget({"a": [5]}, 0)


def test_free_slot_has_no_state_to_read(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(4)})
    slots = state.slots(["a"])
    state.release("a")
    with pytest.raises(ArgumentError, match="slot 0 is free"):
        state.view(slots, 4)


def test_unknown_request_has_no_state_to_read(model: TwoTowerModel) -> None:
    with pytest.raises(ArgumentError, match="'ghost' has no state"):
        new_state(model).block_context(["ghost"], 4)


def test_release_of_an_unknown_request_is_no_error(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.release("ghost")
    assert len(state) == 0
