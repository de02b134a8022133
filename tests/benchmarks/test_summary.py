"""CellSummary of cells that were made by hand."""

import json
from dataclasses import asdict, replace

import pytest

from tests.support.serving_cells import AGAIN, NONE, drafted, repeats, served_cell
from twotower_bench.records import Drafting, DraftSetting, Load, ServedRequest, ServingCell, System, read_row
from twotower_bench.summary import (
    CellSummary,
    acceptance_of,
    latency_of,
    merged_calibration,
    num_steps,
    over_categories,
    plain_step_s,
    summarise_cells,
)
from twotower_spec.drafting.metrics import CalibrationBin


def summary_of_cells(cells: list[ServingCell], system: str, load: Load) -> CellSummary:
    """Summarises one system under one load."""
    (found,) = [one for one in summarise_cells(cells) if (one.system.name, one.load) == (system, load)]
    return found


OTHER = System("ngram", "n-gram lookup", {"method": "ngram"})


def request(
    prompt_id: str = "a",
    tokens: tuple[int, ...] | None = None,
    drafted: tuple[int, ...] = (),
    accepted: tuple[int, ...] = (),
    first: float = 0.5,
    gaps: tuple[float, ...] = (0.1, 0.2),
) -> ServedRequest:
    if tokens is None:
        tokens = tuple(range(1 + sum(accepted) + len(accepted))) if accepted else (1, 2, 3)
    return ServedRequest(prompt_id, "maths", 4, tokens, first, first + sum(gaps), gaps, drafted, accepted)


def cell(system: System, repeat: int, seconds: float, *requests: ServedRequest, category: str = "all") -> ServingCell:
    return ServingCell(system, Load(category, 1), repeat, seconds, requests)


def test_acceptance_counts_steps_with_drafts_and_all_steps_apart() -> None:
    found = acceptance_of(
        [request("a", drafted=(3, 0, 3), accepted=(3, 0, 1)), request("b", drafted=(2,), accepted=(0,))]
    )
    assert found.acceptance_length is not None
    assert found.acceptance_length.value == pytest.approx((4 + 2 + 1) / 3)
    assert found.tokens_per_step.value == pytest.approx((4 + 1 + 2 + 1) / 4)
    assert (found.num_steps, found.num_drafted_steps, found.mean_draft_tokens) == (4, 3, pytest.approx(8 / 3))
    assert found.by_position == pytest.approx((2 / 3, 1 / 3, 1 / 3))
    # At the second position two steps had come so far, and one of them accepted; at the third that one.
    assert found.conditional_by_position == pytest.approx((2 / 3, 1 / 2, 1))
    assert found.num_asked_by_position == (3, 2, 1)
    assert found.histogram == (1, 1, 0, 1)


def test_last_step_counts_what_the_text_has_of_it() -> None:
    """Eight drafts of the last step were accepted, and the text has four tokens of it."""
    one = request(tokens=tuple(range(1 + 3 + 4)), drafted=(8, 8), accepted=(2, 8))
    found, whole = acceptance_of([one]), acceptance_of([one], beyond_end=True)
    assert found.tokens_per_step.value == pytest.approx((3 + 4) / 2)
    assert found.tokens_per_step == found.acceptance_length
    assert whole.tokens_per_step.value == pytest.approx((3 + 9) / 2)
    # As if three had been drafted: those that there was no room for are neither accepted nor refused.
    assert found.num_asked_by_position == (2, 2, 2, 0, 0, 0, 0, 0) and found.by_position[:3] == (1, 1, 0.5)
    assert found.mean_draft_tokens == pytest.approx((8 + 3) / 2)


def test_last_step_of_which_the_text_has_one_token_counts_as_one_without_drafts() -> None:
    found = acceptance_of([request(tokens=(1, 2, 3, 4), drafted=(4, 4), accepted=(1, 3))])
    assert (found.num_steps, found.num_drafted_steps) == (2, 1)
    assert found.tokens_per_step.value == pytest.approx(3 / 2)


def test_a_prompt_that_was_repeated_counts_as_one_for_the_interval() -> None:
    once = [request("a", drafted=(4,), accepted=(4,)), request("b", drafted=(4,), accepted=(0,))]
    assert acceptance_of(once).acceptance_length == acceptance_of(once * 5).acceptance_length


def test_no_drafts_give_no_acceptance_length_and_one_token_per_step() -> None:
    found = acceptance_of([request(drafted=(0, 0), accepted=(0, 0))])
    assert found.acceptance_length is None and found.tokens_per_step.value == 1 and found.by_position == ()


def test_latency_is_of_first_tokens_gaps_and_tokens() -> None:
    found = latency_of([request(first=1.0), request(first=3.0, tokens=(1,), gaps=())])
    assert (found.first_token, found.gap) == (2.0, pytest.approx(0.15))
    assert found.first_token_p99 == pytest.approx(2.98)
    assert found.user_tokens_per_s == pytest.approx(2 / 0.3)
    assert latency_of([request(tokens=(1,), gaps=())]).user_tokens_per_s == 0


def test_speed_up_within_what_two_equal_runs_differ_by_is_no_difference() -> None:
    plain = served_cell(NONE)
    cells = [
        *repeats(plain, [1.0, 1.1, 0.9]),
        *repeats(replace(plain, system=AGAIN), [1.1, 0.9, 1.05]),
        *repeats(replace(plain, system=OTHER), [0.97, 1.07, 0.88]),
        *repeats(replace(plain, system=System("fast", "fast")), [0.4, 0.5, 0.3]),
    ]
    found = {one.system.name: one for one in summarise_cells(cells)}
    assert {name: one.verdict for name, one in found.items()} == {
        "none": "-",
        "none_again": "no difference",
        "ngram": "no difference",
        "fast": "faster",
    }
    assert found["fast"].speed_up == pytest.approx(2.5)


def test_rows_begin_with_no_speculation_and_end_with_two_tower_however_they_were_measured() -> None:
    systems = [System("twotower", "TwoTower"), OTHER, AGAIN, System("mine", "mine"), NONE]
    found = summarise_cells([cell(system, 0, 1.0, request()) for system in systems])
    assert [one.system.name for one in found] == ["none", "none_again", "ngram", "mine", "twotower"]


def test_two_repeats_have_a_ratio_and_no_verdict() -> None:
    plain = served_cell(NONE)
    cells = [*repeats(plain, [1, 1]), *repeats(replace(plain, system=OTHER), [0.5, 0.5])]
    found = summary_of_cells(cells, "ngram", plain.load)
    assert (found.speed_up, found.comparison, found.verdict) == (2.0, None, "too few repeats")


def test_prompts_with_another_text_in_any_repeat_are_counted_once() -> None:
    plain = [cell(NONE, i, 1.0, request("a"), request("b")) for i in range(2)]
    other = [
        cell(OTHER, 0, 1.0, request("a"), request("b", (1, 2, 4))),
        cell(OTHER, 1, 1.0, request("a"), request("b", (1, 2))),
    ]
    assert summary_of_cells([*plain, *other], "ngram", plain[0].load).num_different == 1
    assert summary_of_cells([*plain, *other], "none", plain[0].load).num_different == 0
    drawn = [replace(one, load=Load("all", 1, 0.7)) for one in (*plain, *other)]
    assert summary_of_cells(drawn, "ngram", Load("all", 1, 0.7)).num_different is None


def test_tokens_per_nfe_are_of_steps_with_drafts() -> None:
    drafting = Drafting(3, 20, 2, 2, {"extend": 0.4, "denoise": 0.8, "host": 0.04})
    drafted = replace(cell(OTHER, 0, 1.0, request(drafted=(4, 4, 0), accepted=(4, 2, 0))), drafting=drafting)
    found = summary_of_cells([drafted], "ngram", drafted.load)
    assert found.tokens_per_nfe == pytest.approx(8 / 2)
    assert found.acceptance.acceptance_length is not None
    assert found.tokens_per_nfe == pytest.approx(found.acceptance.acceptance_length.value)


def test_times_of_a_round_add_up_to_its_wall_time() -> None:
    drafting = Drafting(4, 20, 4, 6, {"extend": 0.4, "denoise": 0.8, "host": 0.04}, {"limit": 2})
    drafted = replace(cell(OTHER, 0, 2.0, request(drafted=(4, 4), accepted=(4, 2))), drafting=drafting)
    again = replace(drafted, repeat=1, drafting=replace(drafting, without_drafts={"limit": 1, "policy": 3}))
    found = summary_of_cells([drafted, again], "ngram", drafted.load)
    times = found.round_times
    assert times is not None
    assert (times.extend, times.denoise, times.host, times.verify) == pytest.approx((0.1, 0.2, 0.01, 0.19))
    assert found.without_drafts == {"limit": 3, "policy": 3}
    assert (found.speed_up, found.num_different) == (None, None)


def test_step_of_no_speculation_is_the_wall_time_over_all_steps() -> None:
    plain = served_cell(NONE, 2, accepted=[()] * 4, num_plain_tokens=9)
    assert plain_step_s([plain]) == pytest.approx(plain.seconds / 18)
    assert plain_step_s(repeats(plain, [1, 3])) == pytest.approx(2 * plain.seconds / 18)


def test_repeats_that_one_of_them_lacks_are_not_compared() -> None:
    plain = served_cell(NONE)
    other = repeats(replace(plain, system=OTHER), [0.5, 0.25, 0.5, 0.5])
    missing = [one for one in repeats(plain, [1, 8, 1, 1]) if one.repeat != 1]
    cells = [*missing, *repeats(replace(plain, system=AGAIN), [1, 1, 1, 1]), *other]
    found = summary_of_cells(cells, "ngram", plain.load)
    assert found.comparison is not None and found.comparison.num_rounds == 3
    assert found.speed_up == found.comparison.speed_up.value == pytest.approx(2.0)


def test_categories_together_take_the_time_of_all() -> None:
    cells = [
        cell(NONE, repeat, seconds, request(f"{category}{repeat}"), category=category)
        for repeat in range(2)
        for category, seconds in (("maths", 1.0), ("python", 2.0))
    ]
    together = over_categories(cells)
    assert [(one.load.category, one.repeat, one.seconds, len(one.requests)) for one in together] == [
        ("all", 0, 3.0, 2),
        ("all", 1, 3.0, 2),
    ]


def test_bins_of_confidence_are_merged_by_their_weight() -> None:
    one, other = CalibrationBin(0.5, 0.6, 1, 0.5, 0.0), CalibrationBin(0.5, 0.6, 3, 0.58, 1.0)
    (merged,) = merged_calibration([[one], [other]])
    assert (merged.num_drafts, merged.mean_confidence, merged.acceptance_rate) == (4, pytest.approx(0.56), 0.75)
    assert merged_calibration([]) == ()


def test_a_cell_comes_back_from_its_json() -> None:
    plain = served_cell(NONE, 4, accepted=[(1, 2), (3,), (0, 0, 1)])
    drafting = Drafting(1, 2, 3, 4, {"extend": 0.1}, {"policy": 2}, (CalibrationBin(0.0, 0.1, 1, 0.05, 0.0),))
    full = replace(plain, drafting=drafting)
    for one in (plain, full):
        row = {"kind": "serving_cell", "machine": {}, **json.loads(json.dumps(asdict(one)))}
        assert read_row(ServingCell, row) == one


def test_steps_that_are_counted_are_those_of_the_engine() -> None:
    # Steps of four, two, three and two, as requests follow each other: 0 to 3, 0 to 1, 2 to 4, 4 to 5.
    assert num_steps(served_cell(drafted(DraftSetting(4, 4)), 2, accepted=[[1] * 3, [1] * 1, [1] * 2, [1] * 1])) == 6
    accepted = [[1] * (3 + 5 * i % 7) for i in range(24)]
    for concurrency in (1, 3, 8, 40):
        cell = served_cell(drafted(DraftSetting(4, 4)), concurrency, accepted=accepted)
        assert cell.drafting is not None and num_steps(cell) == cell.drafting.rounds
