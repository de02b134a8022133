"""Behaviour of a drafter when a state is damaged or a pass fails, and when it allocates."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids, tiny_config, tiny_model
from twotower_kernels.block_attention import op as attention_op
from twotower_spec import ArgumentError, TwoTowerModel
from twotower_spec.drafting import (
    AdaptivePolicy,
    DraftBlock,
    DraftingSession,
    DraftRequest,
    FixedPolicy,
    ThresholdPolicy,
)
from twotower_spec.drafting.block_drafter import BlockDrafter
from twotower_spec.drafting.policies import DraftPolicy
from twotower_spec.generation.sampling import Sampler
from twotower_spec.towers import ContextTower, DenoiserTower
from twotower_spec.towers.backbone import Layer


def make(policy: DraftPolicy | None = None, **options: object) -> DraftingSession:
    return DraftingSession(tiny_model(), policy or FixedPolicy(8, 1, num_tokens=7), num_slots=4, **options)  # type: ignore[arg-type]


def drafts(block: DraftBlock) -> dict[object, list[int]]:
    return {request_id: block.row(i) for i, request_id in enumerate(block.request_ids)}


def grown(rows: dict[str, list[int]], round_index: int) -> dict[str, list[int]]:
    """Extends rows by unequal numbers of tokens."""
    return {
        name: row + random_ids(1 + (round_index + i) % 4, seed=round_index)
        for i, (name, row) in enumerate(rows.items())
    }


def damage_ssm(drafter: DraftingSession, request: str) -> None:
    drafter.state.mamba.ssm[:, drafter.state.entry(request).slot] = torch.nan


def damage_keys(drafter: DraftingSession, request: str) -> None:
    first = drafter.state.entry(request).pages[0]
    for cache in (drafter.state.kv_cache.keys, drafter.state.kv_cache.values):
        cache.unflatten(1, (-1, drafter.state.kv_cache.page_size))[:, first] = torch.inf


@pytest.mark.parametrize("policy", [FixedPolicy(8, 1, num_tokens=7), ThresholdPolicy(8, 8, 0.5)])
@pytest.mark.parametrize("damage", [damage_ssm, damage_keys])
@pytest.mark.parametrize("broken", ["a", "b", "c"])
def test_a_damaged_state_costs_only_its_own_request_a_round_of_drafts(
    broken: str, damage: Callable[[DraftingSession, str], None], policy: DraftPolicy
) -> None:
    drafter, undisturbed = make(policy), make(policy)
    rows = {"a": random_ids(20), "b": random_ids(5, seed=1), "c": random_ids(33, seed=2)}
    for round_index in range(4):
        rows = grown(rows, round_index)
        if round_index == 1:
            damage(drafter, broken)
        expected, actual = drafts(draft_rows(undisturbed, rows)), drafts(draft_rows(drafter, rows))
        if round_index == 1:
            expected[broken] = []
        assert actual == expected
    assert drafter.without_drafts["not finite"] == 1 and drafter.state.num_restarts == 1


@pytest.mark.parametrize(("stray", "kept"), [("mask", 3), ("beyond", 0), ("negative", 0)])
def test_an_id_that_is_no_token_is_no_draft(stray: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    session, real = make(), BlockDrafter.draft
    (row,) = draft_rows(session, {"a": [5, 6, 7]}).rows()
    ids = {"mask": session.drafter.picker.mask_token_id, "beyond": session.num_token_ids, "negative": -1}

    def draft(self: BlockDrafter, *arguments: Any, **named: Any) -> Any:
        done, probs = real(self, *arguments, **named)
        done.token_ids[:, 3] = ids[stray]
        return done, probs

    monkeypatch.setattr(BlockDrafter, "draft", draft)
    assert draft_rows(make(), {"a": [5, 6, 7]}).rows() == [row[:kept]]


def test_a_request_whose_numbers_stay_damaged_is_read_ever_more_rarely() -> None:
    model, undisturbed = TwoTowerModel.from_config(tiny_config(), dtype="float64", seed=0), make()
    model.context.embeddings.data[60] = torch.nan
    drafter = DraftingSession(model, FixedPolicy(8, 1, num_tokens=7))
    rows = {"a": [60, *random_ids(20)], "b": random_ids(5, seed=1, vocab_size=60)}
    tried = []
    for round_index in range(40):
        rows = {name: row + random_ids(1, seed=round_index, vocab_size=60) for name, row in rows.items()}
        drafted = drafter.draft([DraftRequest(name, row) for name, row in rows.items()])
        if drafted.num_damaged:
            tried.append(round_index)
        assert drafts(drafted.block)["b"] == drafts(draft_rows(undisturbed, {"b": rows["b"]}))["b"]
        assert drafted.without_drafts["not finite"] == 1
    assert tried == [0, 1, 3, 7, 15, 31]
    drafter.release("a")
    drafter.release("b")
    assert not drafter._damaged


def test_samples_of_the_others_keep_their_distributions() -> None:
    drafter, undisturbed = (make(FixedPolicy(8, 1), sampler=Sampler(0.9)) for _ in range(2))
    rows = {"a": random_ids(20), "b": random_ids(5, seed=1)}
    draft_rows(drafter, rows), draft_rows(undisturbed, rows)
    damage_ssm(drafter, "a")
    rows = grown(rows, 0)
    actual, expected = draft_rows(drafter, rows), draft_rows(undisturbed, rows)
    assert actual.num_draft_tokens == [0, 8] and actual.row(1) == expected.row(1)
    assert actual.probs is not None and expected.probs is not None
    assert not actual.probs[0].any()
    torch.testing.assert_close(actual.probs[1], expected.probs[1])


class Fault(Exception):
    """Error that a test injects."""


@pytest.mark.parametrize("tower", [ContextTower, DenoiserTower])
@pytest.mark.parametrize("calls", [1, 4])
def test_reset_after_a_pass_that_broke_off_gives_everything_back(
    tower: type, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    drafter, rows = make(num_tokens=256), {"a": random_ids(20), "b": random_ids(5, seed=1)}
    draft_rows(drafter, rows)
    rows = {**grown(rows, 2), "new": random_ids(9, seed=3)}
    layers = set((drafter.towers.context if tower is ContextTower else drafter.towers.denoiser).layers)
    original, seen = Layer.forward, 0

    def breaks(layer: Layer, *arguments: object) -> object:
        nonlocal seen
        seen += layer in layers
        if seen == calls:
            raise Fault
        return original(layer, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Layer, "forward", breaks)
        with pytest.raises(Fault):
            draft_rows(drafter, rows)
    drafter.reset()
    state = drafter.state
    assert len(state) == 0 and state.kv_cache.num_free_pages == drafter.state.num_pages
    assert drafts(draft_rows(drafter, rows)) == drafts(draft_rows(make(), rows))
    # Every slot and page can be used again.
    many = {name: random_ids(64, seed=i) for i, name in enumerate("wxyz")}
    assert draft_rows(drafter, many).num_draft_tokens == [7] * 4


def test_warming_up_leaves_no_trace_and_allocates_for_all_rounds() -> None:
    policy = AdaptivePolicy(block_sizes=(4, 8), may_skip=False)
    drafter = make(policy)
    drafter.warm_up()
    assert len(drafter.state) == 0 and not drafter.without_drafts and drafter.state.num_evictions == 0
    assert drafter.state.kv_cache.num_free_pages == drafter.state.num_pages
    warm = drafter.memory()
    rows = {name: random_ids(30 * i + 1, seed=i) for i, name in enumerate("abcd")}
    fresh_policy = AdaptivePolicy(block_sizes=(4, 8), may_skip=False)
    fresh_policy.costs = policy.costs  # which the warm-up has measured
    fresh = make(fresh_policy)
    for round_index in range(6):
        assert drafts(draft_rows(drafter, rows)) == drafts(draft_rows(fresh, rows))
        rows = grown(rows, round_index)
    assert drafter.memory() == warm
    with pytest.raises(ArgumentError, match="4 requests are held"):
        drafter.warm_up()


def test_memory_counts_every_tensor_once() -> None:
    drafter = make()
    drafter.warm_up()
    memory, towers, config = drafter.memory(), drafter.towers, drafter.towers.config
    weights = sum(tensor.nbytes for _, tensor in towers.checkpoint_tensors())
    assert memory.context_tower_bytes + memory.denoiser_tower_bytes == weights
    assert memory.state_bytes == drafter.state.nbytes + 4 * config.vocab_size * 8
    keys = (drafter.state.num_pages * 16 + 4 * 8) * config.kv_bytes_per_token(torch.float64)
    assert memory.workspace_bytes == keys + 9 * config.num_hidden_layers * 3 * config.hidden_size * 8
    assert str(memory).startswith("context tower 0.") and "workspace" in str(memory)


def test_rows_may_be_arrays_that_are_written_on() -> None:
    table = np.zeros((2, 200), dtype=np.int32)
    texts = {0: random_ids(90), 1: random_ids(70, seed=1)}
    drafter, from_lists = make(), make()
    for round_index in range(4):
        for request, ids in texts.items():
            ids += random_ids(3 + request, seed=round_index)
            table[request, : len(ids)] = ids
        if round_index == 2:
            texts[0][40] = table[0, 40] = 9 if texts[0][40] != 9 else 10  # rewritten in place
        views = {request: table[request, : len(ids)] for request, ids in texts.items()}
        assert drafts(draft_rows(drafter, views)) == drafts(draft_rows(from_lists, texts))
    assert drafter.state.num_restarts == from_lists.state.num_restarts == 1


def test_requests_that_grow_side_by_side_are_read_in_place(monkeypatch: pytest.MonkeyPatch) -> None:
    drafter, rows = make(), {name: random_ids(10, seed=i) for i, name in enumerate("abc")}
    seen: list[list[int]] = []
    original = attention_op.ragged_attention

    def look(query: torch.Tensor, keys: list[torch.Tensor], *rest: object) -> torch.Tensor:
        seen.append([key.untyped_storage().data_ptr() for key in keys])
        return original(query, keys, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr("twotower_spec.state.extension.ragged_attention", look)
    for round_index in range(12):
        rows = grown(rows, round_index)
        draft_rows(drafter, rows)
    pool = drafter.state.kv_cache.keys.untyped_storage().data_ptr()
    assert seen and all(place == pool for places in seen for place in places)


@pytest.mark.parametrize(("num_tokens", "longest"), [(2048, 1100), (336, 300), (32, 17)])
def test_warming_up_for_kernels_makes_passes_of_every_kind_that_fits(
    num_tokens: int, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The passes of a GPU on a CPU: the drafter alone is told that kernels run."""
    monkeypatch.setattr("twotower_spec.drafting.session.use_triton", lambda *tensors: True)
    drafter, seen = make(num_tokens=num_tokens), []
    extend = drafter.state.extend
    monkeypatch.setattr(
        drafter.state,
        "extend",
        lambda _, new, *want: seen.append([len(t) for t in new.values()]) or extend(_, new, *want),
    )
    drafter.warm_up()
    assert [1] in seen and [17] in seen and max(map(max, seen)) == longest
    assert not len(drafter.state)
    assert draft_rows(drafter, {"a": random_ids(5)}).num_draft_tokens == [7]
