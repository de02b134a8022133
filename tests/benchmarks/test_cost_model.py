"""Speed-up from step times: the formula, its doubt, its limits, and what it says about measured cells."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from twotower_bench.cost_model import PUBLISHED_SIZE, CostModel, DrafterSize, weight_bytes_of_pass
from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import (
    AcceptanceLength,
    DraftingPhases,
    Estimate,
    MeasuredCell,
    ServingProfile,
    VerifierStep,
)
from twotower_bench.uncertainty import Doubt
from twotower_bench.validation import validate
from twotower_bench.verdict import Verdict, advise
from twotower_spec.config import TwoTowerConfig
from twotower_spec.demo import trio_path
from twotower_spec.errors import ArgumentError

DATA = Path(__file__).parent / "data"
IN_VLLM = DATA / "trio_in_vllm.json"
DOCUMENTED = DATA / "documented_demo.json"
SWEEP = DATA / "trio_sweep.json"
POLICIES = (None, "fixed", "adaptive")

# The verifier of demo size of VLLM.md, float32, one thread: none / K 7 / K 15.
BUDGET = {1: (12.7, 13.1, 15.7), 8: (19.0, 46.5, 79.0)}
STEPS = [
    VerifierStep(batch, tokens, Estimate(ms))
    for batch, row in BUDGET.items()
    for tokens, ms in zip((1, 8, 16), row, strict=True)
]
PHASES = [DraftingPhases(1, 16, Estimate(2.8), Estimate(3.2), 0.2), DraftingPhases(8, 16, Estimate(5.5), Estimate(5.2))]


def acceptance(length: float | Estimate = 5.0, most: int = 15, **more: object) -> AcceptanceLength:
    estimate = length if isinstance(length, Estimate) else Estimate(length)
    return AcceptanceLength("maths", DraftSetting(most, 16), estimate, **more)  # type: ignore[arg-type]


def test_speed_up_is_tokens_gained_over_plain_steps_that_a_round_takes() -> None:
    found = CostModel(STEPS, PHASES).predict(1, acceptance())
    total = 15.7 + 2.8 + 3.2 + 0.2
    assert found.speed_up.value == pytest.approx(5 * 12.7 / total)
    assert found.tokens_per_s.value == pytest.approx(5e3 / total)
    assert found.plain_tokens_per_s.value == pytest.approx(1e3 / 12.7)
    assert found.break_even_length == pytest.approx(total / 12.7)


def test_acceptance_length_of_break_even_gives_no_gain() -> None:
    model = CostModel(STEPS, PHASES)
    length = model.predict(8, acceptance()).break_even_length
    assert model.predict(8, acceptance(length)).speed_up.value == pytest.approx(1.0)


def test_every_denoising_step_is_paid_and_the_measured_passes_take_their_place() -> None:
    model = CostModel(STEPS, PHASES)
    four = replace(acceptance(), setting=DraftSetting(15, 16, 4))
    assert model.predict(1, four).denoise_ms == pytest.approx(4 * 3.2)
    assert model.predict(1, replace(four, denoiser_passes=2.5)).denoise_ms == pytest.approx(2.5 * 3.2)


def test_times_between_the_measured_ones_lie_on_straight_lines() -> None:
    found = CostModel(STEPS, PHASES).predict(3, acceptance(2.0), 3)
    at_1, at_8 = 12.7 + 3 / 7 * (13.1 - 12.7), 19.0 + 3 / 7 * (46.5 - 19.0)
    assert found.verify_ms == pytest.approx(at_1 + 2 / 7 * (at_8 - at_1))
    assert found.plain_ms == pytest.approx(12.7 + 2 / 7 * (19.0 - 12.7))


@pytest.mark.parametrize(("batch_size", "named"), [(9, "batch size 9"), (17, "given for 1 to 8")])
def test_nothing_is_extrapolated_beyond_the_measured_batch_sizes(batch_size: int, named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        CostModel(STEPS, PHASES).predict(batch_size, acceptance())


def test_nothing_is_extrapolated_to_longer_drafts_or_other_blocks() -> None:
    model = CostModel([step for step in STEPS if step.num_tokens < 16], PHASES)
    with pytest.raises(ArgumentError, match="tokens per request at batch size 1 16 is not predicted"):
        model.predict(1, acceptance())
    with pytest.raises(ArgumentError, match="measure the acceptance length of longer drafts"):
        model.predict(1, acceptance(3.0, most=7), 8)
    with pytest.raises(ArgumentError, match="block size"):
        model.predict(1, AcceptanceLength("maths", DraftSetting(4, 4), Estimate(3.0)))


def test_no_step_times_at_all_are_named() -> None:
    with pytest.raises(ArgumentError, match="no time of a verifier step is known"):
        CostModel([], PHASES).predict(1, acceptance())


def test_doubt_of_the_acceptance_length_comes_through_to_the_speed_up() -> None:
    exact = Doubt(assumed_error=0.0)
    found = CostModel(STEPS, PHASES, exact).predict(1, acceptance(Estimate(5.0, 4.0, 5.5)))
    low, high = found.speed_up.low, found.speed_up.high
    assert low is not None and high is not None
    # Quantiles of 4000 draws have a standard error of about 2 % of the interval.
    assert low / found.speed_up.value == pytest.approx(4.0 / 5.0, rel=0.02)
    assert high / found.speed_up.value == pytest.approx(5.5 / 5.0, rel=0.02)


def test_numbers_without_doubt_give_an_interval_of_no_width() -> None:
    found = CostModel(STEPS, PHASES, Doubt(assumed_error=0.0)).predict(8, acceptance())
    assert found.speed_up.low == found.speed_up.value == found.speed_up.high
    assert found.probability_faster in (0.0, 1.0)


def test_draws_are_private_and_repeat_themselves() -> None:
    np.random.seed(3)  # noqa: NPY002 - the state that must not be touched
    before = np.random.get_state()[1].copy()  # type: ignore[union-attr, index]  # noqa: NPY002
    first = CostModel(STEPS, PHASES).predict(1, acceptance())
    assert first == CostModel(STEPS, PHASES).predict(1, acceptance())
    assert (np.random.get_state()[1] == before).all()  # type: ignore[index]  # noqa: NPY002


def test_shorter_drafts_gain_what_the_shares_by_position_say() -> None:
    shares = (0.9, 0.7, 0.4)
    one = acceptance(3.0, most=3, by_position=shares)
    assert [one.of_first(k) for k in (1, 2, 3)] == pytest.approx([1.9, 2.6, 3.0])


def test_shorter_drafts_without_shares_have_one_chance_for_all() -> None:
    rate = 0.8
    one = acceptance(1 + sum(rate**i for i in range(1, 16)))
    assert one.of_first(2) == pytest.approx(1 + rate + rate**2)
    assert acceptance(16.0).of_first(3) == pytest.approx(4.0)
    assert acceptance(1.0).of_first(3) == pytest.approx(1.0)


def test_published_floors_follow_from_the_union_of_experts() -> None:
    h200 = DrafterSize(PUBLISHED_SIZE, bandwidth_gb_s=4800)
    assert h200.pass_ms(1) == pytest.approx(1.34, abs=0.005)
    assert h200.pass_ms(16) == pytest.approx(7.33, abs=0.005)
    slower = replace(h200, launch_overhead_ms=0.5, times_floor=1.3)
    assert slower.pass_ms(16) == pytest.approx(1.3 * h200.pass_ms(16) + 0.5)


def test_bytes_of_a_pass_over_all_experts_are_the_weights_of_the_trio() -> None:
    config = TwoTowerConfig.from_pretrained(trio_path("twotower"))
    read = weight_bytes_of_pass(config, 10_000, with_head=False, itemsize=4)
    matrices = 0
    from twotower_spec.towers.model import TwoTowers

    for name, tensor in TwoTowers(config, context_device="meta").context.layers.named_parameters():
        # Vectors, convolutions and routers are left out of the count.
        if tensor.dim() >= 2 and "conv" not in name and "gate" not in name and "router" not in name:
            matrices += tensor.numel()
    assert read == pytest.approx(4 * matrices, rel=0.02)


@pytest.mark.parametrize(
    ("verifier_ms", "verdict"), [(2.0, Verdict.DO_NOT_USE), (10.0, Verdict.USE), (30.0, Verdict.USE)]
)
def test_real_size_drafter_pays_for_slow_verifiers_alone(verifier_ms: float, verdict: Verdict) -> None:
    steps = [VerifierStep(1, tokens, Estimate(verifier_ms)) for tokens in (1, 16)]
    model = CostModel(steps, DrafterSize(PUBLISHED_SIZE, bandwidth_gb_s=4800))
    advice = advise([model.predict(1, acceptance(5.0))])
    assert advice.verdict is verdict
    if verdict is Verdict.DO_NOT_USE:
        assert "drafting takes 10.7 ms a round, beside a verifier step of 2.0 ms" in advice.sentence
    else:  # docs/vllm.md: 2.5 and 3.7 times, with 10 ms for drafting
        assert advice.best.speed_up.value == pytest.approx(5 * verifier_ms / (verifier_ms + 10.7), rel=0.01)


def test_longest_drafts_at_a_large_batch_give_way_to_shorter_ones() -> None:
    model = CostModel(STEPS, PHASES)
    advice = advise([model.predict(8, acceptance(6.0), k) for k in (1, 3, 7, 15)])
    assert advice.verdict is Verdict.SHORTER and advice.best.setting.num_speculative_tokens < 15
    assert "K 15, block of 16, 1 step, give" in advice.sentence


def test_drafts_that_cannot_pay_even_if_all_are_accepted_are_named() -> None:
    slow = [VerifierStep(8, 1, Estimate(10.0)), VerifierStep(8, 3, Estimate(29.0))]
    one = CostModel(slow, PHASES).predict(8, AcceptanceLength("maths", DraftSetting(2, 16), Estimate(3.0)))
    assert "even 2 accepted drafts of 2 would not pay" in advise([one]).sentence


def test_gain_that_may_be_none_is_not_recommended() -> None:
    one = CostModel(STEPS, PHASES, Doubt(assumed_error=0.3)).predict(8, acceptance(5.0))
    assert one.speed_up.low is not None and one.speed_up.high is not None
    assert one.speed_up.low < 1 < one.speed_up.high
    advice = advise([one])
    assert advice.verdict is Verdict.DO_NOT_USE and "which may be no gain" in advice.sentence


def test_profile_is_the_same_after_a_round_trip_through_json(tmp_path: Path) -> None:
    profile = ServingProfile.load(IN_VLLM)
    assert ServingProfile.from_json(json.loads(json.dumps(profile.to_json()))) == profile
    profile.save(tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads(IN_VLLM.read_text())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format 2 of the profile is not known"),
        ({"speed": 1}, "unknown field 'speed'"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1}]}, r"verifier_steps\[0\]: .*'ms'"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": -3.0}]}, r"verifier_steps\[0\].ms: value -3.0"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": "3"}]}, r"ms is '3'; give a number"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": 3}] * 2}, r"two entries for \(1, 1\)"),
        ({"measured_cells": {}}, "measured_cells is {}; give a list"),
    ],
)
def test_bad_profile_is_refused_with_the_place(change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        ServingProfile.from_json({"source": "test", **change})


def test_acceptance_length_that_contradicts_its_setting_is_refused() -> None:
    with pytest.raises(ArgumentError, match="acceptance length 17 is not possible with K 15"):
        acceptance(17.0)
    with pytest.raises(ArgumentError, match="one for every draft"):
        acceptance(5.0, by_position=(0.5,))
    with pytest.raises(ArgumentError, match="does not fall"):
        acceptance(2.0, most=2, by_position=(0.5, 0.6))


def test_cells_of_the_trio_in_vllm_are_predicted_within_the_error_that_the_docs_give() -> None:
    profile = ServingProfile.load(IN_VLLM)
    found = validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))
    assert found.num_not_predicted == 0 and len(found.checks) == 15
    # Two busy cores: CPU time of one setting differs by several per cent from run to run.
    assert found.median_error is not None and found.median_error < 0.06
    assert found.worst_error is not None and found.worst_error < 0.13
    assert found.worst_speed_up_error is not None and found.worst_speed_up_error < 0.14


def test_cells_of_a_sweep_are_predicted_within_the_error_that_the_docs_give_and_adaptive_ones_less_well() -> None:
    profile = ServingProfile.load(SWEEP)
    found = validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))
    errors = {name: [one.error for one in found.checks if _policy(one.cell) == name] for name in POLICIES}
    assert {name: len(values) for name, values in errors.items()} == {None: 4, "fixed": 8, "adaptive": 8}
    worst = {name: max(abs(error) for error in values if error is not None) for name, values in errors.items()}
    assert worst[None] < 0.04 and worst["fixed"] < 0.10 and worst["adaptive"] < 0.29
    assert float(np.median([error for error in errors["fixed"] if error is not None])) == pytest.approx(
        -0.018, abs=1e-3
    )
    assert found.share_inside == 0.75


def test_inner_batch_sizes_of_a_sweep_are_predicted_without_their_times_within_the_error_that_the_docs_give() -> None:
    profile = ServingProfile.load(SWEEP)
    found = validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))
    assert {one.cell.batch_size for one in found.checks if one.held_out} == {4, 8} and found.num_held_out == 10
    assert found.median_held_out_error is not None and found.median_held_out_error < 0.07
    assert found.worst_held_out_error is not None and found.worst_held_out_error < 0.28
    assert found.held_out_share_inside == 0.6


def _policy(cell: MeasuredCell) -> str | None:
    return cell.setting.policy if cell.setting else None


def test_cells_whose_rounds_were_not_those_of_the_breakdown_are_far_off_and_shown_so() -> None:
    """The documented demo ran the adaptive policy, prefill included; its breakdown is of one fixed setting."""
    profile = ServingProfile.load(DOCUMENTED)
    found = validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))
    errors = [round(check.error, 2) for check in found.checks if check.error is not None]
    assert errors == [0.04, 0.48, 0.0, 1.08]


def test_cell_that_cannot_be_predicted_says_why() -> None:
    cells = (
        MeasuredCell("maths", 1, DraftSetting(15, 16), Estimate(100.0)),
        MeasuredCell("maths", 16, None, Estimate(100.0)),
    )
    profile = ServingProfile("test", verifier_steps=tuple(STEPS), measured_cells=cells)
    found = validate(profile, CostModel(STEPS, PHASES))
    assert found.num_not_predicted == 2 and found.median_error is None
    assert "no acceptance length of K 15" in str(found.checks[0].reason)
    assert "batch size 16 is not predicted" in str(found.checks[1].reason)


def test_prefill_and_the_unused_end_of_the_last_round_count_where_whole_requests_were_timed() -> None:
    model, drafted = CostModel(STEPS, PHASES), acceptance(5.0)
    cell = MeasuredCell("maths", 1, drafted.setting, Estimate(1.0), new_tokens=65, first_token_ms=40.0)
    round_ms = 15.7 + 2.8 + 3.2 + 0.2
    seconds = (40.0 + (64 + 2) / 5 * round_ms) / 1e3
    assert model.predict_cell(cell, drafted).value == pytest.approx(65 / seconds)
    plain = replace(cell, setting=None, first_token_ms=None)
    assert model.predict_cell(plain, None).value == pytest.approx(1e3 / 12.7)


def test_unused_end_of_the_last_round_is_counted_where_it_is_known() -> None:
    model, drafted = CostModel(STEPS, PHASES), acceptance(5.0)
    cell = MeasuredCell("maths", 1, drafted.setting, Estimate(1.0), new_tokens=66, first_token_ms=40.0)
    seconds = (40.0 + 65 / 5 * (15.7 + 2.8 + 3.2 + 0.2)) / 1e3
    assert model.predict_cell(replace(cell, unused_tokens=0.0), drafted).value == pytest.approx(66 / seconds)
    half_a_round = model.predict_cell(cell, drafted).value
    assert model.predict_cell(replace(cell, unused_tokens=2.0), drafted).value == pytest.approx(half_a_round)


def test_times_of_a_batch_size_that_is_held_out_are_those_between_its_neighbours() -> None:
    bent = [*STEPS, VerifierStep(4, 1, Estimate(30.0)), VerifierStep(4, 16, Estimate(30.0))]
    assert CostModel(bent, PHASES).predict(4, acceptance()).plain_ms == 30.0
    held_out = CostModel(bent, PHASES).without(4).predict(4, acceptance())
    assert held_out.plain_ms == pytest.approx(12.7 + 3 / 7 * (19.0 - 12.7))
    with pytest.raises(ArgumentError, match="batch size 8 is not predicted"):
        CostModel(bent, PHASES).without(8).predict(8, acceptance())


def test_batch_size_without_times_of_so_many_tokens_is_passed_over() -> None:
    steps = [*STEPS, VerifierStep(4, 1, Estimate(13.0)), VerifierStep(4, 4, Estimate(14.0))]
    found = CostModel(steps, PHASES).predict(4, acceptance())
    assert found.verify_ms == pytest.approx(15.7 + 3 / 7 * (79.0 - 15.7)) and found.plain_ms == 13.0


def test_steps_that_read_prompts_let_the_rest_of_the_batch_go_on() -> None:
    model = CostModel(STEPS, PHASES)
    # Of 64 rounds of each of 8 requests, 64 are of all together; each prompt takes one of them, of 40 ms.
    cell = MeasuredCell("maths", 8, None, Estimate(1.0), new_tokens=64, first_token_ms=40.0, prompt_steps=1.0)
    ms = 1 * 40.0 + (64 / 8 - 1) * 19.0
    assert model.predict_cell(cell, None).value == pytest.approx(64e3 / ms)


def test_batch_that_was_not_full_takes_the_times_of_its_mean_size() -> None:
    model = CostModel(STEPS, PHASES)
    cell = MeasuredCell("maths", 8, None, Estimate(1.0), mean_batch_size=4.5)
    at_half = (12.7 + 19.0) / 2
    assert model.predict_cell(cell, None).value == pytest.approx(4.5e3 / at_half)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"prompt_steps": 1.5}, "prompt_steps 1.5 is not allowed"),
        ({"prompt_steps": 0.0}, "prompt_steps 0.0 is not allowed"),
        ({"mean_batch_size": 8.5}, "mean_batch_size 8.5 is not from 1 to batch_size 8"),
        ({"mean_batch_size": 0.5}, "mean_batch_size 0.5 is not from 1"),
        ({"unused_tokens": -1.0}, "unused_tokens -1.0 is not allowed"),
    ],
)
def test_cell_that_contradicts_itself_is_refused(change: dict[str, float], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        MeasuredCell("maths", 8, None, Estimate(1.0), **change)
