"""The pool: memory, slots and pages, eviction, histories, provisional passes, the denoiser's view."""

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.shapes import REAL_SIZE
from tests.state.steps import assert_same, logits_after
from tests.support.builders import random_ids, tiny_config, tiny_model
from tests.support.tolerances import FLOAT64
from twotower_spec import ArgumentError, StateFullError, TwoTowerModel
from twotower_spec.state import ContextState, mamba_state


@pytest.fixture
def model() -> TwoTowerModel:
    return tiny_model()


def new_state(model: TwoTowerModel, num_slots: int = 3, num_pages: int = 30, page_size: int = 4) -> ContextState:
    return ContextState(model.config, num_slots, num_pages, model.dtype, page_size=page_size)


def test_real_geometry_needs_what_the_architecture_says() -> None:
    assert REAL_SIZE.kv_bytes_per_token(torch.bfloat16) == 6144
    assert REAL_SIZE.mamba_bytes_per_request(torch.bfloat16) == 23 * (2 * 2**20 + 6144 * 3 * 2)
    # Section 8 counts the published history of 4 columns (48 KiB): 47.1 MiB. Ours holds the 3 that are read.
    assert 46.8 < REAL_SIZE.mamba_bytes_per_request(torch.bfloat16) / 2**20 < 47.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_pool_holds_exactly_the_bytes_of_the_formula(dtype: torch.dtype) -> None:
    config = tiny_config()
    state = ContextState(config, num_slots=5, num_pages=7, dtype=dtype, page_size=16)
    assert state.nbytes == 5 * config.mamba_bytes_per_request(dtype) + 7 * 16 * config.kv_bytes_per_token(dtype)


def test_reused_slot_and_pages_leave_no_trace(model: TwoTowerModel) -> None:
    used, fresh = new_state(model, num_slots=1), new_state(model, num_slots=1)
    logits_after(model, used, "old", random_ids(40, seed=1))
    used.release("old")
    ids = random_ids(9)
    assert torch.equal(logits_after(model, used, "new", ids), logits_after(model, fresh, "new", ids))


def test_least_recently_used_request_is_evicted_and_starts_over(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=2)
    for request in ("a", "b"):
        logits_after(model, state, request, random_ids(5))
    logits_after(model, state, "a", [7])
    logits_after(model, state, "c", random_ids(5))
    assert "b" not in state and "a" in state and state.num_evictions == 1
    assert state.num_computed_tokens("b") == 0


def test_pages_run_out_before_slots(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=3, num_pages=4)
    logits_after(model, state, "a", random_ids(9))
    logits_after(model, state, "b", random_ids(9))
    assert "a" not in state and "b" in state
    assert state.kv_cache.num_free_pages == 1


def test_requests_that_do_not_fit_together_are_refused_in_a_sentence(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=1)
    with pytest.raises(StateFullError, match="slots 1"):
        state.extend(model.context, {"a": [5], "b": [6]})
    with pytest.raises(StateFullError, match="121 tokens"):
        state.extend(model.context, {"a": random_ids(121)})


def test_refused_requests_leave_the_pool_usable(model: TwoTowerModel) -> None:
    state = new_state(model, num_slots=1)
    with pytest.raises(StateFullError):
        state.extend(model.context, {"a": [5], "b": [6]})
    expected = logits_after(model, new_state(model), "a", random_ids(6))
    assert_same(logits_after(model, state, "a", random_ids(6)), expected)


def test_scattered_pages_give_what_consecutive_ones_give(model: TwoTowerModel) -> None:
    scattered = new_state(model, num_slots=3)
    for start in range(0, 12, 2):  # turns: the pages of both interleave
        scattered.extend(model.context, {"a": random_ids(12)[start : start + 2]})
        scattered.extend(model.context, {"b": random_ids(12, seed=1)[start : start + 2]})
    pages = scattered.entry("a").pages
    assert pages != list(range(pages[0], pages[0] + len(pages)))
    whole = new_state(model)
    logits_after(model, whole, "a", random_ids(12))
    assert_same(logits_after(model, scattered, "a", [9]), logits_after(model, whole, "a", [9]))


@pytest.mark.parametrize("accepted", range(8))
def test_accepting_a_prefix_equals_having_read_only_it(model: TwoTowerModel, accepted: int) -> None:
    prompt, block = random_ids(10), random_ids(7, seed=3)
    state, fresh = new_state(model), new_state(model)
    state.extend(model.context, {"a": prompt})
    state.extend(model.context, {"a": block}, provisional=True).accept({"a": accepted})
    expected = logits_after(model, fresh, "a", [*prompt, *block[:accepted], 11])
    assert_same(logits_after(model, state, "a", [11]), expected)


def test_ragged_provisional_pass_is_accepted_row_by_row(model: TwoTowerModel) -> None:
    prompts = {"a": random_ids(3), "b": random_ids(11, seed=1), "c": random_ids(6, seed=2)}
    blocks = {"a": random_ids(5, seed=3), "b": random_ids(2, seed=4), "c": random_ids(7, seed=5)}
    accepted = {"a": 5, "b": 0, "c": 3}
    state = new_state(model)
    state.extend(model.context, prompts)
    result = state.extend(model.context, blocks, logits="all", provisional=True)
    assert result.logits is not None and result.logits.shape[0] == 14
    result.accept(accepted)
    for request, prompt in prompts.items():
        row = [*prompt, *blocks[request][: accepted[request]]]
        assert state.entry(request).token_ids == row
        expected = logits_after(model, new_state(model), request, [*row, 8])
        assert_same(logits_after(model, state, request, [8]), expected)


def test_accepting_more_than_the_pass_had_is_refused(model: TwoTowerModel) -> None:
    state = new_state(model)
    result = state.extend(model.context, {"a": [5, 6]}, provisional=True)
    with pytest.raises(ArgumentError, match="is 3; the pass had 2 tokens"):
        result.accept({"a": 3})


def test_denoiser_reads_the_pool_without_a_copy_of_the_mamba_state(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(5), "b": random_ids(5)})
    context = state.block_context(["a", "b"], 4)
    assert context.states.read(0)[1].untyped_storage().data_ptr() == state.mamba.ssm.untyped_storage().data_ptr()


def test_denoising_leaves_the_pool_bit_for_bit_as_it_was(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(5), "b": random_ids(9)})
    tensors = (state.mamba.conv, state.mamba.ssm, state.kv_cache.keys, state.kv_cache.values)
    before = [t.clone() for t in tensors]
    context = state.block_context(["a", "b"], 4)
    block = torch.full((2, 4), 3)
    with torch.inference_mode():
        first = model.denoiser.step(block, context, torch.ones(2))
        assert torch.equal(first, model.denoiser.step(block, context, torch.ones(2)))
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


def test_context_of_some_rows_is_that_of_the_rows_alone(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(5), "b": random_ids(13), "c": random_ids(2)})
    block = torch.tensor([[3, 9, 3, 3], [7, 3, 3, 3]])
    with torch.inference_mode():
        some = state.block_context(["a", "b", "c"], 4).select([2, 0])
        logits = model.denoiser.step(block, some, torch.tensor([0.75, 0.5]))
        alone = model.denoiser.step(block, state.block_context(["c", "a"], 4), torch.tensor([0.75, 0.5]))
    assert_same(logits, alone)


def test_empty_increment_is_refused(model: TwoTowerModel) -> None:
    with pytest.raises(ArgumentError, match="increment is empty"):
        new_state(model).extend(model.context, {"a": []})


def test_rolling_back_to_a_snapshot_leaves_no_trace(model: TwoTowerModel) -> None:
    state, fresh = new_state(model), new_state(model)
    a, b = random_ids(9), random_ids(5, seed=1)
    state.extend(model.context, {"a": a, "b": b})
    snapshot = state.snapshot(["b", "a"])
    for _ in range(3):
        state.extend(model.context, {"a": [7], "b": [8]})
    state.roll_back(snapshot)
    fresh.extend(model.context, {"a": a, "b": b})
    for request_id in ("a", "b"):
        left, right = (s.extend(model.context, {request_id: [11]}).logits for s in (state, fresh))
        assert left is not None and right is not None and torch.equal(left, right)


def test_rolling_back_a_released_request_is_refused(model: TwoTowerModel) -> None:
    state = new_state(model)
    state.extend(model.context, {"a": random_ids(4)})
    snapshot = state.snapshot(["a"])
    state.release("a")
    with pytest.raises(ArgumentError, match="claim it first"):
        state.roll_back(snapshot)
    state.claim("a")
    with pytest.raises(ArgumentError, match="since the snapshot"):
        state.roll_back(snapshot)


def test_a_long_prompt_does_not_pad_the_short_increments_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sizes = tiny_model(), []
    scan = mamba_state.pool_scan

    def counted(u: Tensor, *others: Any, **options: Any) -> Any:
        sizes.append(u.shape[0] * u.shape[1])
        return scan(u, *others, **options)

    monkeypatch.setattr(mamba_state, "pool_scan", counted)
    lengths = [3, 200, 1, 40, 32, 130, 5]
    together, alone = new_state(model, len(lengths), 150), new_state(model, 1, 60)
    rows = {i: random_ids(length, seed=i) for i, length in enumerate(lengths)}
    result = together.extend(model.context, rows)
    per_layer = sum(sizes) // len(model.config.mamba_layers)
    assert per_layer <= 2 * sum(lengths) and result.logits is not None
    for i, row in rows.items():
        alone.reset()
        expected = alone.extend(model.context, {i: row}).logits
        assert expected is not None
        torch.testing.assert_close(result.logits[i], expected[0], atol=FLOAT64, rtol=0)
        slot = together.entry(i).slot
        torch.testing.assert_close(together.mamba.ssm[:, slot], alone.mamba.ssm[:, 0], atol=FLOAT64, rtol=0)


def test_short_and_long_increments_of_one_provisional_pass_are_accepted_apart() -> None:
    model = tiny_model()
    lengths, accepted = [3, 70, 2, 40], [1, 50, 2, 40]
    rows = {i: random_ids(length, seed=i) for i, length in enumerate(lengths)}
    given, kept = new_state(model, 4, 40), new_state(model, 4, 40)
    given.extend(model.context, rows, provisional=True).accept(dict(enumerate(accepted)))
    kept.extend(model.context, {i: row[: accepted[i]] for i, row in rows.items()})
    torch.testing.assert_close(given.mamba.ssm, kept.mamba.ssm, atol=FLOAT64, rtol=0)
    torch.testing.assert_close(given.mamba.conv, kept.mamba.conv, atol=FLOAT64, rtol=0)
