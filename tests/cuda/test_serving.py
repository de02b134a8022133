"""A long life of a drafter: nothing is compiled and no memory is taken that the warm-up did not."""

from __future__ import annotations

from random import Random
from typing import Any

import pytest
import torch

from tests.cuda.paths import AheadOfHost
from tests.drafting.rounds import draft_rows
from tests.support.builders import tiny_config
from tests.support.cuda import emulated_devices
from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import DraftingSession, FixedPolicy, ThresholdPolicy

MIB = 1 << 20


def mixed_rounds(session: DraftingSession, num_reqs: int, num_rounds: int, lengths: tuple[int, ...]) -> None:
    """Requests that come, go on by any number of tokens and leave, in any order."""
    random, rows = Random(0), {}
    for round_number in range(num_rounds):
        for name in random.sample(range(num_reqs), num_reqs // 2 + round_number % 2):
            rows[name] = [*rows.get(name, [5] * random.choice(lengths)), *[7] * random.randint(1, 9)]
        names = random.sample(sorted(rows), len(rows))
        draft_rows(session, {name: rows[name] for name in names})
        if round_number % 3 == 2:
            gone = names[0]
            session.release(gone)
            del rows[gone]


def differences(new: tuple[Any, ...], before: set[tuple[Any, ...]]) -> tuple[Any, ...]:
    """Parts of a specialisation that are unlike the nearest of those that were there."""
    unlike = [set(new) - set(one) for one in before if one[0] == new[0]]
    return new[0], min(unlike, key=len, default=None)


def model_of_even_sizes() -> TwoTowerModel:
    """Sizes that divide by 16 as those of the released model do, and two layers that mix."""
    config = tiny_config(
        hybrid_override_pattern="M*E",
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=16,
        mamba_num_heads=16,
        mamba_head_dim=16,
        ssm_state_size=16,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        vocab_size=256,
    )
    return TwoTowerModel.from_config(config, dtype="bfloat16", context_device="cuda:0", denoiser_device="cuda:0")


@pytest.mark.slow
def test_nothing_is_compiled_while_serving_that_the_warm_up_did_not() -> None:
    with emulated_devices(runs_kernels=False) as usage:
        session = DraftingSession(model_of_even_sizes(), FixedPolicy(16, 1), num_slots=8, num_tokens=8 * 2048)
        session.warm_up()
        before = set(usage.specialisations)
        mixed_rounds(session, 8, 24, (1, 5, 17, 100, 513, 1500))
        new = usage.specialisations - before
    assert not new, [differences(one, before) for one in new]


@pytest.mark.slow
def test_nothing_is_compiled_while_drafting_ahead_of_the_host_that_the_warm_up_did_not() -> None:
    prompts, random = [[5], [5] * 9, [5] * 40, [5] * 100], Random(0)
    with emulated_devices(runs_kernels=False) as usage:
        serving = AheadOfHost(
            model_of_even_sizes(), FixedPolicy(16, 1, num_tokens=5), prompts, num_slots=8, num_tokens=8 * 2048
        )
        serving.session.warm_up()
        before = set(usage.specialisations)
        for _ in range(12):
            serving.round(random.sample(serving.requests(), random.randint(1, len(prompts))))
            serving.commit([[7] * random.randint(0, 2) for _ in prompts])
        new = usage.specialisations - before
    assert not new, [differences(one, before) for one in new]


@pytest.mark.slow
@pytest.mark.parametrize("denoiser_device", ["cuda:0", "cuda:1"])
def test_serving_takes_no_more_memory_than_the_warm_up_at_the_released_size(denoiser_device: str) -> None:
    with emulated_devices(runs_kernels=False, most_values=1 << 16) as usage:
        model = TwoTowerModel(PUBLISHED_SIZE, torch.bfloat16, "cuda:0", denoiser_device)
        session = DraftingSession(model, FixedPolicy(16, 1), num_slots=64, num_tokens=64 * 512)
        session.warm_up()
        held, peak = dict(usage.held), dict(usage.peak)
        for policy in (FixedPolicy(16, 1), ThresholdPolicy(16, 4, 0.9)):
            session.policy = policy
            usage.reset()
            mixed_rounds(session, 64, 6, (5, 20))
            for device in held:
                more = usage.peak[device] - peak[device]
                assert more <= 64 * MIB, (device, more / MIB)
    assert all(peak[device] - held[device] < 2048 * MIB for device in held)
