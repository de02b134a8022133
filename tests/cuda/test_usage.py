"""Demands of rounds on a device: when the host waits for it, and how many launches and allocations there are."""

from __future__ import annotations

import pytest

from tests.cuda.paths import PROMPTS, AheadOfHost
from tests.drafting.rounds import draft_rows
from tests.support.builders import tiny_config
from tests.support.cuda import Usage, emulated_devices
from twotower_spec import TwoTowerModel
from twotower_spec.drafting import AdaptivePolicy, DraftingSession, DraftPolicy, FixedPolicy, ThresholdPolicy

# Layers as in the released model.
PATTERN = "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME"
# The only lines at which the host may wait for a device in a round, and why.
# A round's drafts, or what became of them.
READS_DRAFTS = "twotower_spec/state/transfer.py: self._event.synchronize(), synchronize an event"
# Is a block worth it, before it is denoised.
READS_FIRST = (
    "twotower_spec/drafting/rounds.py: "
    "confidence = self.drafter.first_confidence(*self._places(readable)).float().cpu(), copy to the host"
)
# A rule that looks at every step; whether there are several is decided by the clock.
READS_STEP = (
    "twotower_spec/generation/denoising/host_loop.py: "
    "counts: list[list[int]] = torch.stack([masked.sum(-1), num_masked]).tolist(), copy to the host"
)
WEIGHS_STEP = "twotower_spec/drafting/policies/acceptance.py: raw = confidence.double().cpu().numpy(), copy to the host"


def model_like_the_released(pattern: str = PATTERN) -> TwoTowerModel:
    config = tiny_config(hybrid_override_pattern=pattern)
    return TwoTowerModel.from_config(config, dtype="bfloat16", context_device="cuda:0", denoiser_device="cuda:0")


def round_of(policy: DraftPolicy, usage: Usage, num_reqs: int, pattern: str, warms_up: bool = False) -> Usage:
    """Counts a round in which every request goes on by a different number of tokens."""
    session = DraftingSession(model_like_the_released(pattern), policy, num_slots=8, num_tokens=512)
    if warms_up:
        session.warm_up()
    rows = {row: [*PROMPTS[0], row] for row in range(num_reqs)}
    for step in range(3):
        usage.reset()
        draft_rows(session, rows)
        rows = {row: [*tokens, *[7] * (1 + (row + step) % 3)] for row, tokens in rows.items()}
    return usage


@pytest.mark.parametrize(
    ("policy", "allowed"),
    [
        (FixedPolicy(16, 1), {READS_DRAFTS: 1}),
        (ThresholdPolicy(16, 4, 0.8), {READS_DRAFTS: 1}),
        (AdaptivePolicy([8], most_steps=1, may_skip=False), {READS_DRAFTS: 1, READS_FIRST: 1}),
        (
            AdaptivePolicy([8], most_steps=4, may_skip=False),
            {READS_DRAFTS: 1, READS_FIRST: 1, READS_STEP: 4, WEIGHS_STEP: 4},
        ),
    ],
)
def test_the_host_waits_where_it_must_and_nowhere_else(policy: DraftPolicy, allowed: dict[str, int]) -> None:
    with emulated_devices(runs_kernels=False) as usage:
        found = round_of(policy, usage, 3, "M*EM").waits_by_source()
    assert found and all(count <= allowed.get(place, 0) for place, count in found.items()), found


def test_a_round_ahead_of_the_host_waits_for_nothing_until_it_is_asked_for() -> None:
    with emulated_devices(runs_kernels=False) as usage:
        serving = AheadOfHost(model_like_the_released("M*EM"), FixedPolicy(8, 1, num_tokens=5))
        for _ in range(3):
            requests = serving.requests()
            usage.reset()
            serving.session.draft_ahead(requests, serving.table)
            assert not usage.waits
            serving.commit([[7, 8], [9]])
            serving.known = [list(tokens) for tokens in serving.tokens]


@pytest.mark.parametrize(
    ("num_reqs", "warms_up", "most_launches", "most_allocations"),
    [(1, False, 600, 890), (8, False, 745, 990), (1, True, 45, 35), (8, True, 50, 40)],
    ids=["1 request", "8 requests", "1 request, captured", "8 requests, captured"],
)
def test_launches_and_allocations_of_a_round(
    num_reqs: int, warms_up: bool, most_launches: int, most_allocations: int
) -> None:
    with emulated_devices(runs_kernels=False) as usage:
        found = round_of(FixedPolicy(16, 1), usage, num_reqs, PATTERN, warms_up)
    assert found.kernels["graph"] == 2 * warms_up
    assert found.num_launches <= most_launches and found.num_allocations <= most_allocations, found
