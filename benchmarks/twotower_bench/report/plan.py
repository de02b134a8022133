"""Section of a serving profile: speed-ups that step times and acceptance lengths predict, beside measured ones."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import replace

from twotower_bench.plan import CostModel, Prediction
from twotower_bench.report.columns import Column, estimate, share, table, times
from twotower_bench.report.document import Section
from twotower_bench.report.reading import Measurements
from twotower_bench.serving_profile import ServingProfile
from twotower_spec.errors import ArgumentError


def _error(one: Prediction) -> float:
    return one.speed_up.value / (one.measured_speed_up or 1.0) - 1


COLUMNS: Mapping[str, Column] = {
    "Setting": Column(lambda one: one.setting.name),
    "Measured speed-up": Column(
        lambda one: times(one.measured_speed_up),
        "tokens/s over those without drafting, prompts and the ends of texts included, where drafting gains less",
    ),
    "Predicted": Column(
        lambda one: estimate(one.speed_up, unit="×"),
        "acceptance length × plain step / round, from steps in which the batch was full and nobody read a prompt (95 % "
        "interval)",
    ),
    "Error": Column(lambda one: share(_error(one), "+"), "predicted over measured, less one"),
}


def plan_section(measured: Measurements, name: str) -> Section:
    """Makes the section of a profile.

    Args:
        measured: with a profile.
        name: of the section.
    """
    assert measured.profile is not None
    compared = predictions_of_measured(measured.profile)
    finding = "The profile has no measured speed-up that could be predicted."
    if compared:
        errors = [abs(_error(one)) for one in compared]
        finding = (
            f"Predicted speed-ups differ from {len(compared)} measured ones by {share(statistics.median(errors))} in "
            f"the median and {share(max(errors))} at worst."
        )
    found = table("Predicted and measured speed", compared, COLUMNS, _heading)
    return Section(name, "Prediction beside measurement", finding, [], [found], [], compared, measured.origins)


def predictions_of_measured(profile: ServingProfile) -> list[Prediction]:
    """Predictions of a profile's measured speed-ups, as far as it has the times and acceptance lengths for them."""
    model = CostModel(profile.verifier_steps, profile.drafting_phases)
    batch_sizes = sorted({cell.batch_size for cell in profile.measured_cells})
    found = []
    for one in profile.acceptance_lengths:
        for batch_size in batch_sizes if one.batch_size is None else [one.batch_size]:
            measured = profile.measured_speed_up(one.category, one.temperature, batch_size, one.setting)
            if measured is None:
                continue
            try:
                found.append(replace(model.predict(batch_size, one), measured_speed_up=measured))
            except ArgumentError:  # no times of such a step
                continue
    return sorted(found, key=lambda one: one.load)


def _heading(one: Prediction) -> str:
    temperature = f", temperature {one.temperature:g}" if one.temperature else ""
    return f"{one.category}, batch of {one.batch_size}{temperature}"
