"""The denoising loop as a strategy: a loop that never reads from the device fills the same blocks as the host loop."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from tests.support.builders import random_ids, tiny_model
from twotower_spec import TwoTowerModel
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising import (
    DenoiserPasses,
    DenoisingLoop,
    DenoisingRequest,
    DenoisingStep,
    FirstStepProbs,
    HostLoop,
    PublishedSchedule,
    Schedule,
    ScheduleLoop,
    TokenPicker,
    TraceRecorder,
    behind_first,
)
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import ContextState

MASK = 3
GREEDY = TokenPicker(Sampler(), MASK)
SAMPLED = TokenPicker(Sampler(temperature=0.9, top_k=20), MASK, num_token_ids=50)
LENGTHS = [1, 17, 6]


class UnseenRule:
    def commits(self, step: DenoisingStep) -> Tensor:
        return step.masked

    def finishes(self, index: int, block_size: int) -> bool:
        return False


def request_for(
    model: TwoTowerModel, block_size: int, rule: Schedule, first_tokens: list[int] | None = None
) -> DenoisingRequest:
    state = ContextState(model.config, len(LENGTHS), 6, model.dtype)
    state.extend(model.context, {row: random_ids(length, seed=row) for row, length in enumerate(LENGTHS)})
    return DenoisingRequest(
        context=state.block_context(list(range(len(LENGTHS))), block_size),
        seeds=torch.arange(len(LENGTHS)),
        first_positions=torch.tensor(LENGTHS),
        commit_rule=rule,
        first_tokens=None if first_tokens is None else torch.tensor(first_tokens),
    )


@pytest.mark.parametrize(("block_size", "steps"), [(1, 1), (5, 3), (8, 8)])
@pytest.mark.parametrize("threshold", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("first_tokens", [None, [7, 8, 9]])
def test_a_loop_of_fixed_shapes_fills_the_same_blocks(
    block_size: int, steps: int, threshold: float, first_tokens: list[int] | None
) -> None:
    model, rule = tiny_model(), PublishedSchedule(threshold, steps)
    loops: list[DenoisingLoop] = [
        HostLoop(DenoiserPasses(model.denoiser, block_size), GREEDY),
        ScheduleLoop(DenoiserPasses(model.denoiser, block_size), GREEDY),
    ]
    host, fixed = (loop.denoise(request_for(model, block_size, rule, first_tokens)) for loop in loops)
    assert torch.equal(host.token_ids, fixed.token_ids)
    assert torch.equal(host.num_passes, fixed.num_passes)
    torch.testing.assert_close(host.confidence, fixed.confidence)


def test_a_request_serves_many_calls() -> None:
    model = tiny_model()
    loop, request = (
        HostLoop(DenoiserPasses(model.denoiser, 5), GREEDY),
        request_for(model, 5, PublishedSchedule(0.1, 3), [7, 8, 9]),
    )
    first, second = loop.denoise(request), loop.denoise(request)
    assert torch.equal(first.token_ids, second.token_ids)


@pytest.mark.parametrize("kind", [HostLoop, ScheduleLoop])
def test_unwanted_positions_stay_masked_and_the_others_are_those_of_a_whole_block(
    kind: type[HostLoop | ScheduleLoop],
) -> None:
    model, rule = tiny_model(), PublishedSchedule(0.0, 1)
    loop = kind(DenoiserPasses(model.denoiser, 5), GREEDY)
    whole = request_for(model, 5, rule)
    narrow = DenoisingRequest(whole.context, whole.seeds, whole.first_positions, rule, num_wanted=2)
    expected, filled = loop.denoise(whole).token_ids, loop.denoise(narrow).token_ids
    assert torch.equal(filled[:, :2], expected[:, :2]) and (filled[:, 2:] == MASK).all()


@pytest.mark.parametrize("num_token_ids", [None, 40])
def test_probs_are_of_the_first_step_and_without_ids_that_are_never_picked(num_token_ids: int | None) -> None:
    model, request = tiny_model(), request_for(tiny_model(), 5, PublishedSchedule(0.1, 3), [7, 8, 9])
    picker = TokenPicker(Sampler(temperature=0.9), MASK, num_token_ids)
    probs, traces = FirstStepProbs(picker), TraceRecorder()
    watched = HostLoop(DenoiserPasses(model.denoiser, 5), picker).denoise(request, [probs, traces])
    plain = HostLoop(DenoiserPasses(model.denoiser, 5), picker).denoise(request)
    assert torch.equal(watched.token_ids, plain.token_ids)
    assert [len(trace.t) for trace in traces.traces] == watched.num_passes.tolist()
    assert probs.probs is not None and probs.probs.shape == (3, 5, 61)
    assert (probs.probs[:, 1:, MASK] == 0).all() and (probs.probs[:, 1:, num_token_ids or 61 :] == 0).all()
    torch.testing.assert_close(probs.probs[:, 1:].sum(-1), torch.ones(3, 4, dtype=torch.float64))


def test_a_block_without_positions_is_refused() -> None:
    with pytest.raises(ArgumentError, match="block_size 0"):
        HostLoop(DenoiserPasses(tiny_model().denoiser, 0), GREEDY)


def test_a_rule_that_looks_at_every_step_is_refused_by_the_loop_of_fixed_shapes() -> None:
    model = tiny_model()
    request = request_for(model, 5, PublishedSchedule(0.1, 3))
    seeing = behind_first(UnseenRule())
    with pytest.raises(ArgumentError, match="give a schedule"):
        ScheduleLoop(DenoiserPasses(model.denoiser, 5), GREEDY).denoise(replace(request, commit_rule=seeing))
