"""The copy of a pool that a denoiser of another dtype or device reads: it follows whatever happens to the pool."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import pytest
import torch
from torch import Tensor

from tests.support.builders import random_ids, tiny_model
from twotower_spec import TwoTowerModel
from twotower_spec.state import ContextState
from twotower_spec.state import mirror as mirror_module
from twotower_spec.state.window import ContextWindows, TokenTable

WIDTH = 3


@pytest.fixture(scope="module")
def model() -> TwoTowerModel:
    return tiny_model("float64", hybrid_override_pattern="M*E*M")


def mirrored(model: TwoTowerModel, num_slots: int = 3, num_pages: int = 12) -> ContextState:
    return ContextState(
        model.config,
        num_slots,
        num_pages,
        torch.float64,
        page_size=4,
        denoiser_device=torch.device("cpu"),
        denoiser_dtype=torch.float32,
        scratch=True,
    )


def assert_follows(state: ContextState, names: list[str]) -> None:
    """Compares what the denoiser reads with what the pool holds."""
    slots: list[int] = state.slots(names).tolist()
    mamba, pages = state.read_by_denoiser(slots)
    assert mamba.ssm.dtype == pages.keys[0].dtype == torch.float32 and state.has_mirror
    assert torch.equal(mamba.ssm[:, slots], state.mamba.ssm[:, slots].float())
    assert torch.equal(mamba.conv[:, slots], state.mamba.conv[:, slots].float())
    held = [page for name in state.request_ids for page in state.entry(name).pages]
    own: list[tuple[Tensor, Tensor]] = [
        *zip(pages.keys, state.kv_cache.pages.keys, strict=True),
        *zip(pages.values, state.kv_cache.pages.values, strict=True),
    ]
    for copy, original in own:
        assert torch.equal(copy[held], original[held].float())


def steps(model: TwoTowerModel, state: ContextState, random: Random) -> list[Callable[[list[str]], None]]:
    """Everything that can happen to requests that are held."""
    windows = ContextWindows(state, WIDTH)
    tower = model.context

    def go_on(names: list[str]) -> None:
        state.extend(tower, {name: random_ids(random.randint(1, 5), seed=random.randint(0, 99)) for name in names})

    def accept_some(names: list[str]) -> None:
        tried = state.extend(tower, {name: [5, 6, 7] for name in names}, provisional=True)
        if random.random() < 0.5:
            assert_follows(state, names)
        tried.accept({name: random.randint(0, 3) for name in names})

    def go_back(names: list[str]) -> None:
        snapshot = state.snapshot(names)
        go_on(names)
        if random.random() < 0.5:
            assert_follows(state, names)
        state.roll_back(snapshot)

    def by_windows(names: list[str]) -> None:
        windows.extend_known(tower, {name: [8] * random.randint(1, WIDTH) for name in names})

    def ahead_of_the_host(names: list[str]) -> None:
        lengths = [state.num_computed_tokens(name) for name in names]
        for name, length in zip(names, lengths, strict=True):
            state.claim(name, length + WIDTH, keep=names)
        windows.take_over(names)
        table = TokenTable(torch.full((len(names), 64), 9), torch.tensor(lengths) + 2)
        windows.extend(tower, windows.rows(names, range(len(names))), table)
        for name in names:
            state.entry(name).history.extend([9, 9])

    def leave(names: list[str]) -> None:
        state.release(names[0])

    def start_over(names: list[str]) -> None:
        state.restart(names[-1])
        state.claim(names[-1])

    return [go_on, go_on, accept_some, go_back, by_windows, ahead_of_the_host, leave, start_over]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("at_once", [1, 7, 4096])
def test_a_mirror_follows_whatever_happens_to_the_pool(
    model: TwoTowerModel, seed: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_module, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(mirror_module, "STATES_AT_ONCE", min(at_once, 2))
    random, state = Random(seed), mirrored(model)
    possible = steps(model, state, random)
    for number in range(24):
        names = random.sample("abcde", random.randint(1, 2))  # of whom three have room
        if number == 16:
            state.reset()
        for name in names:
            if state.num_computed_tokens(name) > 16:
                state.release(name)
            state.claim(name, keep=names)
        random.choice(possible)(names)
        if random.random() < 0.7 and len(state):
            assert_follows(state, random.sample(state.request_ids, random.randint(1, len(state))))
    assert state.num_evictions > 0


@torch.inference_mode()
def test_a_state_is_copied_once_and_only_where_it_is_read(model: TwoTowerModel) -> None:
    state = mirrored(model)
    state.extend(model.context, {"a": [5, 6], "b": [7]})
    mamba, _ = state.read_by_denoiser(state.slots("a").tolist())
    of_a, of_b = state.slots("ab").tolist()
    assert mamba.ssm[:, of_a].any() and not mamba.ssm[:, of_b].any()
    mamba.ssm[:, of_a] = -7  # which stays, for nothing in the pool has changed
    state.read_by_denoiser([of_a, of_b])
    assert (mamba.ssm[:, of_a] == -7).all() and mamba.ssm[:, of_b].any()
    state.extend(model.context, {"a": [8]})
    assert_follows(state, ["a"])


def test_a_mirror_takes_as_much_memory_as_the_pool_once_a_denoiser_reads(model: TwoTowerModel) -> None:
    state = mirrored(model)
    state.extend(model.context, {"a": [5, 6]})
    assert not state.has_mirror and state.workspace_nbytes == 0
    state.read_by_denoiser([state.entry("a").slot])
    without_scratch = state.mamba.nbytes * 3 // 4 + state.kv_cache.nbytes
    assert state.workspace_nbytes == without_scratch // 2  # float32 of float64


def test_a_denoiser_beside_the_context_tower_reads_the_pool_itself(model: TwoTowerModel) -> None:
    state = ContextState(model.config, 2, 8, torch.float64)
    state.extend(model.context, {"a": [5, 6]})
    mamba, pages = state.read_by_denoiser([0])
    assert mamba is state.mamba and pages is state.kv_cache.pages and not state.has_mirror
