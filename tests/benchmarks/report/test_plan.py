"""What the report says of a serving profile."""

import statistics
from pathlib import Path

import pytest

from twotower_bench.report import report_of
from twotower_bench.report.plan import predictions_of_measured
from twotower_bench.serving_profile import ServingProfile

DATA = Path(__file__).parents[1] / "data"


def test_predicted_speed_ups_stand_beside_measured_ones() -> None:
    (section,) = report_of([DATA / "trio_in_vllm.json"]).sections
    (table,) = section.tables
    rows = [tuple(row.values()) for row in table.rows]
    assert rows[0] == ("K 3, block of 4, 1 step", "2.00×", "2.01× (1.73 to 2.29)", "+1 %")
    assert len(rows) == 12 and section.finding.startswith("Predicted speed-ups differ from 12 measured ones by ")


def test_fixed_settings_are_predicted_within_the_error_that_the_docs_give() -> None:
    """Steady decoding is predicted; what was measured has prompts and the ends of texts and runs in it, too."""
    errors, num_inside = [], 0
    for name in ("trio_in_vllm", "trio_sweep"):
        for one in predictions_of_measured(ServingProfile.load(DATA / f"{name}.json")):
            if one.setting.policy == "fixed" and one.measured_speed_up:
                errors.append(one.speed_up.value / one.measured_speed_up - 1)
                num_inside += one.speed_up.low <= one.measured_speed_up <= one.speed_up.high
    assert (len(errors), sum(error > 0 for error in errors), num_inside) == (20, 16, 16)
    assert statistics.median(map(abs, errors)) == pytest.approx(0.115, abs=1e-3)
    assert max(map(abs, errors)) == pytest.approx(0.280, abs=1e-3)
