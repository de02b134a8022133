"""The file that `plan --profile` reads: what is in it comes back, and what is wrong in it is named with its place."""

import json
from pathlib import Path

import pytest

from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, Measured, MeasuredCell, ServingProfile, jsonable
from twotower_spec.errors import ArgumentError

DATA = Path(__file__).parent / "data"
IN_VLLM = DATA / "trio_in_vllm.json"


def test_profile_is_the_same_after_a_round_trip_through_json(tmp_path: Path) -> None:
    profile = ServingProfile.load(IN_VLLM)
    profile.save(tmp_path / "again.json")
    assert ServingProfile.load(tmp_path / "again.json") == profile
    again, before = (json.loads(path.read_text()) for path in (tmp_path / "again.json", IN_VLLM))
    # What older files say about whole requests of a cell is read over.
    cells = [{name: cell[name] for name in again["measured_cells"][0]} for cell in before["measured_cells"]]
    assert again == {**before, "measured_cells": cells}


def test_number_with_an_interval_and_a_plain_one_are_read_alike() -> None:
    steps = [{"batch_size": 1, "num_tokens": 1, "ms": 3}, {"batch_size": 1, "num_tokens": 2, "ms": {"value": 4}}]
    profile = ServingProfile.parse(json.dumps({"source": "test", "verifier_steps": steps}))
    assert [one.ms for one in profile.verifier_steps] == [Measured(3.0), Measured(4.0)]
    assert [one["ms"] for one in jsonable(profile)["verifier_steps"]] == [3.0, 4.0]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format 2 of the profile is not known"),
        ({"speed": 1}, "profile.speed: unknown field 'speed'"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1}]}, "verifier_steps.0.ms: Field required"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "m": 3}]}, "verifier_steps.0.m"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": -3.0}]}, "verifier_steps.0.ms: value -3.0"),
        (
            {"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": "3"}]},
            "0.ms.value: Input should be a valid number",
        ),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": 3}] * 2}, "two entries for (1, 1)"),
        ({"measured_cells": {}}, "measured_cells: Input should be a valid array"),
    ],
)
def test_bad_profile_is_refused_with_the_place(change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        ServingProfile.parse(json.dumps({"source": "test", **change}))
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_acceptance_length_that_contradicts_its_setting_is_refused() -> None:
    with pytest.raises(ArgumentError, match="acceptance length 17 is not possible with K 15"):
        AcceptanceLength("maths", DraftSetting(15, 16), Measured(17.0))
    with pytest.raises(ArgumentError, match="one for every draft"):
        AcceptanceLength("maths", DraftSetting(15, 16), Measured(5.0), by_position=(0.5,))
    with pytest.raises(ArgumentError, match="does not fall"):
        AcceptanceLength("maths", DraftSetting(2, 16), Measured(2.0), by_position=(0.5, 0.6))


def test_measured_speed_up_is_over_no_drafting_under_the_same_load() -> None:
    setting = DraftSetting(4, 4)
    cells = [
        MeasuredCell("maths", batch_size, how, Measured(rate), temperature)
        for batch_size, how, rate, temperature in (
            (1, None, 100.0, 0.0),
            (1, setting, 150.0, 0.0),
            (1, setting, 120.0, 1.0),
            (8, None, 400.0, 0.0),
        )
    ]
    profile = ServingProfile("test", measured_cells=tuple(cells))
    assert profile.measured_speed_up("maths", 0.0, 1, setting) == 1.5
    for place in (("maths", 1.0, 1), ("maths", 0.0, 8), ("python", 0.0, 1)):
        assert profile.measured_speed_up(*place, setting) is None
