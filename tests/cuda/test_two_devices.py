"""Towers on two devices: what crosses between them, and that drafts stay those of a CPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.cuda.paths import PROMPTS, AheadOfHost, placed
from tests.drafting.rounds import draft_rows
from tests.support.builders import random_ids
from tests.support.cuda import Usage, emulated_devices
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import DraftingSession, FixedPolicy, ThresholdPolicy

NUM_TOKENS = 768
WIDTH = 6  # tokens of a window


def coming_and_going(model: TwoTowerModel) -> list[list[list[int]]]:
    """Drafts of rounds whose requests go on, come back after an eviction, and turn out to have other tokens."""
    session = DraftingSession(model, ThresholdPolicy(4, 3, 0.05), num_slots=2, num_tokens=128)
    rows = {"a": PROMPTS[0], "b": PROMPTS[1], "c": random_ids(19, seed=3)}
    found = []
    for names in ("ab", "b", "bc", "ca", "a", "ab"):
        block = draft_rows(session, {name: rows[name] for name in names})
        found.append([block.row(row) for row in range(len(names))])
        rows = {name: [*row, 7, 8] for name, row in rows.items()}
        if names == "ca":
            rows["a"] = [*rows["a"][:-3], 11]
        if names == "bc":
            session.release("b")
    assert session.state.num_evictions and session.state.num_restarts
    return found


def coming_and_going_ahead(model: TwoTowerModel) -> list[list[list[int]]]:
    """Likewise ahead of the host; a request leaves and comes back, another prompt takes its slot."""
    serving = AheadOfHost(model, FixedPolicy(4, 1), PROMPTS, num_slots=3)
    found = []
    for gone in (None, 1, None, 0, None):
        found.append(serving.round(serving.requests()))
        if gone is not None:
            serving.session.release(gone)
        serving.commit([[7, 8, 9], [9], [5, 5]])
    return found


@pytest.mark.slow
@pytest.mark.parametrize("rounds", [coming_and_going, coming_and_going_ahead])
def test_requests_that_come_and_go_are_drafted_for_as_on_a_cpu(
    rounds: Callable[[TwoTowerModel], list[list[list[int]]]],
) -> None:
    expected = rounds(placed())
    with emulated_devices():
        assert rounds(placed("cuda:0", "cuda:1")) == expected


def steady_round(usage: Usage, length: int) -> DraftingSession:
    """Drafts for two requests, each with two more tokens than in the round before."""
    session = DraftingSession(placed("cuda:0", "cuda:1"), FixedPolicy(8, 1), num_slots=3, num_tokens=NUM_TOKENS)
    rows = {name: random_ids(length, seed=seed) for seed, name in enumerate("ab")}
    for _ in range(3):
        usage.reset()
        draft_rows(session, rows)
        rows = {name: [*row, 7, 8] for name, row in rows.items()}
    return session


def steady_round_ahead(usage: Usage, length: int) -> DraftingSession:
    """Likewise ahead of the host."""
    prompts = [random_ids(length, seed=seed) for seed in range(2)]
    serving = AheadOfHost(placed("cuda:0", "cuda:1"), FixedPolicy(8, 1), prompts, num_tokens=NUM_TOKENS)
    for _ in range(3):
        usage.reset()
        serving.round(serving.requests())
        serving.commit([[7, 8], [9, 9]])
    return serving.session


@pytest.mark.slow
@pytest.mark.parametrize(("steady", "new_tokens"), [(steady_round, 2), (steady_round_ahead, WIDTH)])
def test_new_tokens_and_changed_states_cross_whatever_the_length_of_the_contexts(
    steady: Callable[[Usage, int], DraftingSession], new_tokens: int
) -> None:
    crossed = []
    for length in (9, 110):
        with emulated_devices(runs_kernels=False) as usage:
            session = steady(usage, length)
            crossed.append(usage.crossings.total())
            state = session.state
            of_state = state.mamba.nbytes // (state.num_slots + 1)
            of_token = state.kv_cache.nbytes // ((state.num_pages + 1) * state.kv_cache.page_size)
            # Of each: logits behind the last token, its slot, length and seed, and an index per token.
            others = session.drafter.last_logits[0].nbytes + 64 + 8 * new_tokens
    assert crossed[0] == crossed[1] <= 2 * (of_state + new_tokens * of_token + others)


@pytest.mark.slow
def test_a_round_at_the_released_size_sends_a_state_a_request_and_little_else() -> None:
    config, num_reqs, new = PUBLISHED_SIZE, 2, [7] * 5
    with emulated_devices(runs_kernels=False, most_values=1 << 16) as usage:
        model = TwoTowerModel(config, torch.bfloat16, "cuda:0", "cuda:1")
        session = DraftingSession(model, FixedPolicy(16, 1), num_slots=num_reqs, num_tokens=num_reqs * 1024)
        rows = {name: [5] * 900 for name in range(num_reqs)}
        draft_rows(session, rows)
        usage.reset()
        draft_rows(session, {name: [*row, *new] for name, row in rows.items()})
        sent = usage.crossings.total() / num_reqs
    state, token = config.mamba_bytes_per_request(torch.bfloat16), config.kv_bytes_per_token(torch.bfloat16)
    logits = session.drafter.last_logits.nbytes // num_reqs
    assert state <= sent <= state + len(new) * token + logits + 1024
    assert sent < 48 << 20


@pytest.mark.slow
def test_a_view_of_what_has_crossed_copies_nothing() -> None:
    with emulated_devices(runs_kernels=False) as usage:
        session = steady_round(usage, 9)
        usage.reset()
        for names in ("ab", "b"):
            context = session.state.block_context(names, 8)
            assert context.states.device == torch.device("cuda:1")
        assert not usage.crossings and not usage.waits
