"""The file that `plan --profile` reads: what is in it comes back, and what is wrong in it is named with its place."""

import json
from pathlib import Path

import pytest

from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, Measured, ServingProfile
from twotower_spec.errors import ArgumentError

DATA = Path(__file__).parent / "data"
IN_VLLM = DATA / "trio_in_vllm.json"


def test_profile_is_the_same_after_a_round_trip_through_json(tmp_path: Path) -> None:
    profile = ServingProfile.load(IN_VLLM)
    profile.save(tmp_path / "again.json")
    assert ServingProfile.load(tmp_path / "again.json") == profile
    again, before = (json.loads(path.read_text()) for path in (tmp_path / "again.json", IN_VLLM))
    # What older files say about measured speeds is read over.
    assert again == {name: value for name, value in before.items() if name != "measured_cells"}


def load(folder: Path, content: object) -> ServingProfile:
    (folder / "profile.json").write_text(json.dumps(content), encoding="utf-8")
    return ServingProfile.load(folder / "profile.json")


def test_number_with_an_interval_and_a_plain_one_are_read_alike(tmp_path: Path) -> None:
    with_interval = {"value": 4, "low": 3, "high": 5}
    steps = [{"batch_size": 1, "num_tokens": 1, "ms": 3}, {"batch_size": 1, "num_tokens": 2, "ms": with_interval}]
    profile = load(tmp_path, {"source": "test", "verifier_steps": steps})
    assert [one.ms for one in profile.verifier_steps] == [3.0, Measured(4.0, 3.0, 5.0)]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"format": 2}, "format: Input should be 1"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1}]}, "verifier_steps.0.ms: Field required"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "m": 3}]}, "verifier_steps.0.ms"),
        ({"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": -3.0}]}, "verifier_steps.0.ms"),
        (
            {"verifier_steps": [{"batch_size": 1, "num_tokens": 1, "ms": "x"}]},
            "0.ms.constrained-float: Input should be a valid number",
        ),
        ({"drafting_phases": {}}, "drafting_phases: Input should be a valid tuple"),
    ],
)
def test_bad_profile_is_refused_with_the_place(tmp_path: Path, change: dict[str, object], named: str) -> None:
    with pytest.raises(ArgumentError) as refused:
        load(tmp_path, {"source": "test", **change})
    assert named in str(refused.value) and "\n" not in str(refused.value)


def test_acceptance_length_that_contradicts_its_setting_is_refused() -> None:
    with pytest.raises(ArgumentError, match="acceptance length 17 is not possible with K 15"):
        AcceptanceLength("maths", DraftSetting(15, 16), 17.0)
    with pytest.raises(ArgumentError, match="give one share for each of 15 drafts"):
        AcceptanceLength("maths", DraftSetting(15, 16), 5.0, by_position=(0.5,))
    with pytest.raises(ArgumentError, match="none above the one before it"):
        AcceptanceLength("maths", DraftSetting(2, 16), 2.0, by_position=(0.5, 0.6))
