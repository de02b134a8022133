"""A profile of a sweep's cells has the numbers of the engine that made them."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from random import Random

import pytest
from typer.testing import CliRunner

from tests.support.serving_cells import AGAIN, NONE, Times, drafted, repeats, served_cell
from twotower_bench.plan import CostModel
from twotower_bench.records import DraftSetting, ServingCell, System
from twotower_bench.serving_profile import Measured, ServingProfile, serving_profile
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


def value(number: float | Measured) -> float:
    return number.value if isinstance(number, Measured) else number


def test_step_times_are_those_of_full_batches() -> None:
    profile = profile_of(sweep())
    found = {(one.batch_size, one.num_tokens): value(one.ms) for one in profile.verifier_steps}
    assert sorted(found) == [(batch, tokens) for batch in (1, 4, 8) for tokens in (1, 5, 9)]
    for (batch, tokens), ms in found.items():
        assert ms == pytest.approx(1e3 * (TIMES.step + batch * tokens * TIMES.token), abs=1e-4)


def test_steps_of_rivals_and_rare_shapes_are_no_step_times() -> None:
    rival = replace(served_cell(NONE, 1, num_plain_tokens=50), system=System("ngram", "n-gram", {"method": "ngram"}))
    short = served_cell(drafted(SHORT), 1, accepted=[[1, 1]])
    assert [(one.num_tokens, len(one.seconds)) for one in short.steps] == [(5, 2)]
    profile = profile_of([served_cell(NONE, 1, num_plain_tokens=20), rival, short])
    assert [(one.batch_size, one.num_tokens) for one in profile.verifier_steps] == [(1, 1)]


def test_interval_of_a_time_is_that_of_the_cells_it_comes_from() -> None:
    slow, fast = served_cell(NONE, 1, num_plain_tokens=20), served_cell(NONE, 1, num_plain_tokens=20, speed=2, repeat=1)
    (step,) = profile_of([slow, fast]).verifier_steps
    assert value(step.ms) == pytest.approx(10.5 * 0.75)  # as many steps of each
    assert isinstance(step.ms, Measured)
    assert step.ms.low == pytest.approx(10.5 * (0.5 + 0.0125)) and step.ms.high == pytest.approx(10.5 * (1 - 0.0125))
    assert isinstance(profile_of([slow]).verifier_steps[0].ms, float)


def test_drafting_is_per_round_and_denoising_per_pass() -> None:
    profile = profile_of(sweep((1, 4)))
    found = {(one.batch_size, one.block_size): one for one in profile.drafting_phases}
    assert sorted(found) == [(1, 4), (1, 8), (4, 4), (4, 8)]
    assert value(found[1, 8].denoise_ms) == pytest.approx(2.2, abs=1e-4)  # of one step and of three alike
    assert found[1, 8].host_ms == pytest.approx(0.5, abs=1e-4)


def test_drafting_times_are_of_full_batches_without_prompts() -> None:
    cell = served_cell(drafted(SHORT), 2, accepted=[[1] * 8, [3] * 12])
    (found,) = profile_of([cell]).drafting_phases
    # Prompts, and the 4 rounds in which one request is alone, would change all three.
    assert found.batch_size == 2
    assert value(found.extend_ms) == pytest.approx(1.0 + 0.1 * (2 + 4), abs=1e-4)
    assert value(found.denoise_ms) == pytest.approx(2.0 + 0.2 * 2, abs=1e-4)


def test_acceptance_is_by_category_of_the_requests_and_of_the_load() -> None:
    profile = profile_of([served_cell(drafted(SHORT), 1, accepted=[[4, 0], [2, 1, 3]])])
    found = {one.category: one for one in profile.acceptance_lengths}
    assert value(found["python"].length) == pytest.approx((5 + 1) / 2)
    assert value(found["maths"].length) == pytest.approx((3 + 2 + 4) / 3)
    assert value(found["all"].length) == pytest.approx((5 + 1 + 3 + 2 + 4) / 5)
    assert found["all"].by_position == pytest.approx((0.8, 0.6, 0.4, 0.2))
    assert found["all"].num_draft_tokens == 4 and found["all"].denoiser_passes == 1


def test_steps_without_drafts_count_as_rounds_that_gain_one_token() -> None:
    cell = served_cell(drafted(ADAPTIVE), 1, accepted=[[3, 0, 0, 0]])
    request = replace(cell.requests[0], num_draft_tokens=(8, 8, 0, 0))
    (one, _) = profile_of([replace(cell, requests=(request,))]).acceptance_lengths
    assert value(one.length) == pytest.approx(7 / 4) and one.num_draft_tokens == 4
    assert one.by_position[:4] == pytest.approx((0.25, 0.25, 0.25, 0.0)) and len(one.by_position) == 8


def test_one_pass_per_block_is_the_same_at_all_batch_sizes_and_a_schedule_is_not() -> None:
    found = profile_of(sweep()).acceptance_lengths
    assert {one.batch_size for one in found if one.setting == LONG} == {None}
    assert {one.batch_size for one in found if one.setting == STEPWISE} == {1, 4, 8}


def test_policy_that_never_drafted_can_still_be_kept(tmp_path: Path) -> None:
    cell = served_cell(drafted(ADAPTIVE), 1, accepted=[[0] * 8])
    assert cell.drafting is not None
    idle = replace(cell.drafting, denoiser_passes=0, request_denoiser_passes=0)
    requests = (replace(cell.requests[0], num_draft_tokens=(0,) * 8),)
    found = profile_of([replace(cell, requests=requests, drafting=idle)])
    assert found.drafting_phases == () and found.acceptance_lengths[0].denoiser_passes == 0
    found.save(tmp_path / "profile.json")
    assert ServingProfile.load(tmp_path / "profile.json") == found


def test_speed_up_of_an_engine_with_known_times_is_predicted() -> None:
    """Where nobody reads prompts and all texts end together, measured cells would be as fast as predicted."""
    profile = profile_of(sweep())
    model = CostModel(profile)
    (one,) = [one for one in profile.acceptance_lengths if (one.category, one.setting) == ("all", LONG)]
    for batch_size in (1, 4, 8):
        length, found = value(one.length), model.predict(batch_size, one).speed_up.value
        plain, verify = (1e3 * (TIMES.step + batch_size * tokens * TIMES.token) for tokens in (1, 9))
        # The context tower reads what was accepted, a little less than that in the mean of full batches.
        extend = 1e3 * (TIMES.extend + TIMES.context_token * batch_size * length)
        denoise = 1e3 * (TIMES.denoise + batch_size * TIMES.denoised_request)
        assert found == pytest.approx(length * plain / (verify + extend + denoise + 1e3 * TIMES.host), rel=0.01)


def test_plan_reads_the_profile(tmp_path: Path) -> None:
    profile_of(sweep((1, 4))).save(tmp_path / "profile.json")
    found = CliRunner().invoke(build_app(), ["plan", "--profile", str(tmp_path / "profile.json"), "--json"])
    assert found.exit_code == 0, found.output
    predictions = json.loads(found.stdout)["predictions"]
    assert len(predictions) == 6 and all(one["speed_up"]["value"] > 0 for one in predictions)
