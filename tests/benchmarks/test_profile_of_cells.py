"""A profile of a sweep's cells: the numbers of the engine that made them, and predictions that find its speed again."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from tests.support.serving_cells import AGAIN, NONE, Times, drafted, repeats, served_cell
from twotower_bench.cost_model import CostModel
from twotower_bench.occupancy import occupancy
from twotower_bench.profile_of_cells import serving_profile
from twotower_bench.records import DraftSetting, ServingCell, System
from twotower_bench.serving_profile import ServingProfile
from twotower_bench.validation import Validation, validate
from twotower_spec.cli.app import build_app

SHORT, LONG = DraftSetting(4, 4), DraftSetting(8, 8)
STEPWISE = DraftSetting(8, 8, 3, "threshold", 0.8)
ADAPTIVE = DraftSetting(8, 8, 8, "adaptive", 0.8)
TIMES = Times()


def patterns(setting: DraftSetting, num_requests: int = 24, num_rounds: int = 12, seed: int = 0) -> list[list[int]]:
    """Accepted drafts of requests of unequal length."""
    draw = Random(seed)
    most = setting.num_speculative_tokens
    return [
        [draw.randint(0, most) for _ in range(draw.randint(num_rounds // 2, num_rounds))] for _ in range(num_requests)
    ]


@cache
def sweep(concurrencies: tuple[int, ...] = (1, 4, 8)) -> list[ServingCell]:
    cells = [
        cell
        for concurrency in concurrencies
        for system in (NONE, AGAIN)
        for cell in repeats(served_cell(system, concurrency, accepted=[()] * 24, num_plain_tokens=40), (1, 1))
    ]
    for concurrency in concurrencies:
        for setting in (SHORT, LONG, STEPWISE):
            cell = served_cell(drafted(setting), concurrency, accepted=patterns(setting), cut_ends=True)
            cells += repeats(cell, (1, 1))
    return cells


def profile_of(cells: list[ServingCell]) -> ServingProfile:
    return serving_profile(cells, "test", {"processor": "none"}, {"vllm": "0"})


def validated(profile: ServingProfile) -> Validation:
    return validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))


def test_requests_follow_each_other_in_the_order_of_submission() -> None:
    cell = served_cell(drafted(SHORT), 2, accepted=[[1] * 3, [1] * 1, [1] * 2, [1] * 1])
    found = occupancy(cell.requests, 2)
    # Steps of four, two, three and two: 0 to 3, 0 to 1, 2 to 4, 4 to 5.
    assert found.first_steps == (0, 0, 2, 4)
    assert found.num_steps == 6 and found.num_prompt_steps == 3
    assert found.mean_batch_size == pytest.approx(11 / 6)


def test_steps_that_are_counted_are_those_of_the_engine() -> None:
    for concurrency in (1, 3, 8, 40):
        cell = served_cell(drafted(LONG), concurrency, accepted=patterns(LONG))
        assert cell.drafting is not None
        assert occupancy(cell.requests, concurrency).num_steps == cell.drafting.rounds


def test_step_times_are_those_of_full_batches() -> None:
    profile = profile_of(sweep())
    found = {(one.batch_size, one.num_tokens): one.ms.value for one in profile.verifier_steps}
    assert sorted(found) == [(batch, tokens) for batch in (1, 4, 8) for tokens in (1, 5, 9)]
    for (batch, tokens), ms in found.items():
        assert ms == pytest.approx(1e3 * (TIMES.step + batch * tokens * TIMES.token), abs=1e-4)


def test_steps_of_rivals_and_rare_shapes_are_no_step_times() -> None:
    rival = replace(served_cell(NONE, 1, num_plain_tokens=50), system=System("ngram", "n-gram", {"method": "ngram"}))
    short = served_cell(drafted(SHORT), 1, accepted=[[1, 1]])
    assert [(one.num_tokens, len(one.seconds)) for one in short.steps] == [(5, 2)]
    profile = profile_of([served_cell(NONE, 1, num_plain_tokens=20), rival, short])
    assert [(one.batch_size, one.num_tokens) for one in profile.verifier_steps] == [(1, 1)]
    assert [one.setting for one in profile.measured_cells] == [None, SHORT]


def test_interval_of_a_time_is_that_of_the_cells_it_comes_from() -> None:
    slow, fast = served_cell(NONE, 1, num_plain_tokens=20), served_cell(NONE, 1, num_plain_tokens=20, speed=2, repeat=1)
    (step,) = profile_of([slow, fast]).verifier_steps
    assert step.ms.value == pytest.approx(10.5 * 0.75)  # as many steps of each
    assert step.ms.low == pytest.approx(10.5 * (0.5 + 0.0125)) and step.ms.high == pytest.approx(10.5 * (1 - 0.0125))
    assert profile_of([slow]).verifier_steps[0].ms.low is None


def test_drafting_is_per_round_and_denoising_per_pass() -> None:
    profile = profile_of(sweep((1, 4)))
    found = {(one.batch_size, one.block_size): one for one in profile.drafting_phases}
    assert sorted(found) == [(1, 4), (1, 8), (4, 4), (4, 8)]
    assert found[1, 8].denoise_ms.value == pytest.approx(2.2, abs=1e-4)  # of one step and of three alike
    assert found[1, 8].host_ms == pytest.approx(0.5, abs=1e-4)


def test_drafting_times_are_of_full_batches_without_prompts() -> None:
    cell = served_cell(drafted(SHORT), 2, accepted=[[1] * 8, [3] * 12])
    alone, found = profile_of([cell]).drafting_phases
    # Prompts, and the 4 rounds in which one request is alone, would change all three.
    assert (alone.batch_size, found.batch_size) == (1, 2)
    assert found.extend_ms.value == pytest.approx(1.0 + 0.1 * (2 + 4), abs=1e-4)
    assert found.denoise_ms.value == pytest.approx(2.0 + 0.2 * 2, abs=1e-4)


def test_acceptance_is_by_category_of_the_requests_and_of_the_load() -> None:
    profile = profile_of([served_cell(drafted(SHORT), 1, accepted=[[4, 0], [2, 1, 3]])])
    found = {one.category: one for one in profile.acceptance_lengths}
    assert found["python"].length.value == pytest.approx((5 + 1) / 2)
    assert found["maths"].length.value == pytest.approx((3 + 2 + 4) / 3)
    assert found["all"].length.value == pytest.approx((5 + 1 + 3 + 2 + 4) / 5)
    assert found["all"].by_position == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert found["all"].num_draft_tokens == 4 and found["all"].denoiser_passes == 1


def test_steps_without_drafts_count_as_rounds_that_gain_one_token() -> None:
    cell = served_cell(drafted(ADAPTIVE), 1, accepted=[[3, 0, 0, 0]])
    request = replace(cell.requests[0], num_draft_tokens=(8, 8, 0, 0))
    (one, _) = profile_of([replace(cell, requests=(request,))]).acceptance_lengths
    assert one.length.value == pytest.approx(7 / 4) and one.num_draft_tokens == 4
    assert one.by_position[:4] == pytest.approx((0.25, 0.25, 0.25, 0.0)) and len(one.by_position) == 8


def test_one_pass_per_block_is_the_same_at_all_batch_sizes_and_a_schedule_is_not() -> None:
    found = profile_of(sweep()).acceptance_lengths
    assert {one.batch_size for one in found if one.setting == LONG} == {None}
    assert {one.batch_size for one in found if one.setting == STEPWISE} == {1, 4, 8}


def test_policy_that_never_drafted_can_still_be_kept() -> None:
    cell = served_cell(drafted(ADAPTIVE), 1, accepted=[[0] * 8])
    assert cell.drafting is not None
    idle = replace(cell.drafting, denoiser_passes=0, request_denoiser_passes=0)
    requests = (replace(cell.requests[0], num_draft_tokens=(0,) * 8),)
    found = profile_of([replace(cell, requests=requests, drafting=idle)])
    assert found.drafting_phases == () and found.acceptance_lengths[0].denoiser_passes == 0
    assert ServingProfile.from_json(json.loads(json.dumps(found.to_json()))) == found


def test_cells_of_an_engine_with_known_times_are_predicted() -> None:
    found = validated(profile_of(sweep()))
    assert found.num_not_predicted == 0 and len(found.checks) == 12
    plain = [check.error for check in found.checks if check.cell.setting is None]
    assert plain == pytest.approx([0.0] * 3, abs=1e-3)
    assert found.worst_error is not None and found.worst_error < 0.03


def test_unused_end_of_the_last_rounds_is_counted_as_it_was() -> None:
    profile = profile_of(sweep())
    unused = [cell.unused_tokens for cell in profile.measured_cells if cell.setting]
    assert min(one or 0.0 for one in unused) > 0.5  # texts that are cut anywhere in their last round
    assert [cell.unused_tokens for cell in profile.measured_cells if cell.setting is None] == [0.0] * 3
    one_by_one = [check.error for check in validated(profile).checks if check.cell.batch_size == 1]
    assert one_by_one == pytest.approx([0.0] * 4, abs=1e-4)  # half a round would be up to 0.5 % off


def test_cells_of_an_inner_batch_size_are_predicted_without_its_times_too() -> None:
    found = validated(profile_of(sweep()))
    held_out = {check.cell.batch_size for check in found.checks if check.held_out}
    assert held_out == {4} and found.num_held_out == 4
    # Steps of this engine grow by the same with every token, so that its straight lines are right.
    assert found.worst_held_out_error is not None and found.worst_held_out_error < 0.02


def test_batches_that_ran_empty_tell_the_times_below_the_smallest_full_one() -> None:
    cells = [cell for cell in sweep() if cell.load.concurrency == 8]
    profile = profile_of(cells)
    sizes = {one.batch_size for one in profile.verifier_steps if one.num_tokens == 9}
    assert 8 in sizes and len(sizes) > 2 and max(sizes) == 8
    drafting = [check for check in validated(profile).checks if check.cell.setting in (SHORT, LONG)]
    assert {check.reason for check in drafting} == {None}
    assert max(abs(check.error) for check in drafting if check.error is not None) < 0.04
    assert {one.batch_size for one in profile_of(sweep((1, 8))).verifier_steps} == {1, 8}


def test_batches_that_run_empty_and_prompts_between_rounds_are_why() -> None:
    profile = profile_of(sweep())
    knowing_neither = (
        replace(cell, prompt_steps=None, mean_batch_size=None, first_token_ms=None) for cell in profile.measured_cells
    )
    naive = replace(profile, measured_cells=tuple(knowing_neither))
    knowing, not_knowing = (
        [check.error for check in validated(one).checks if check.cell.batch_size == 8 and check.cell.setting]
        for one in (profile, naive)
    )
    assert max(abs(error) for error in knowing if error is not None) < 0.03
    assert min(error for error in not_knowing if error is not None) > 0.1


def test_plan_reads_the_profile(tmp_path: Path) -> None:
    profile_of(sweep((1, 4))).save(tmp_path / "profile.json")
    found = CliRunner().invoke(build_app(), ["plan", "--profile", str(tmp_path / "profile.json"), "--json"])
    assert found.exit_code == 0, found.output
    validation = json.loads(found.stdout)["validation"]
    assert len(validation["checks"]) == 8 and validation["num_not_predicted"] == 0
