"""The cost model beside what was measured."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.cost_model import CostModel
from twotower_spec.evaluation.serving_profile import AcceptanceLength, Estimate, MeasuredCell, ServingProfile


@dataclass(frozen=True)
class CellCheck:
    """A measured cell beside its prediction.

    Attributes:
        cell: measured.
        tokens_per_s: predicted; None where the profile has not what it takes.
        error: predicted / measured - 1.
        speed_up, measured_speed_up, speed_up_error: likewise over the same load without drafting, if it was measured.
        reason: why it was not predicted.
    """

    cell: MeasuredCell
    tokens_per_s: Estimate | None = None
    error: float | None = None
    speed_up: float | None = None
    measured_speed_up: float | None = None
    speed_up_error: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        measured = self.cell.tokens_per_s.to_json()
        predicted = self.tokens_per_s.to_json() if self.tokens_per_s else None
        return {**asdict(self), "cell": {**asdict(self.cell), "tokens_per_s": measured}, "tokens_per_s": predicted}


@dataclass(frozen=True)
class Validation:
    """All measured cells of a profile beside their predictions.

    Attributes:
        checks: per cell.
        median_error, worst_error: of tokens/s, as absolute shares; None without any.
        median_speed_up_error, worst_speed_up_error: likewise of speed-ups.
        num_not_predicted: cells that the profile has not enough for.
    """

    checks: tuple[CellCheck, ...]
    median_error: float | None
    worst_error: float | None
    median_speed_up_error: float | None
    worst_speed_up_error: float | None
    num_not_predicted: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "checks": [check.to_json() for check in self.checks]}


def validate(profile: ServingProfile, model: CostModel) -> Validation:
    """Predicts every measured cell of a profile.

    Args:
        profile: with the cells, and the acceptance lengths of their settings.
        model: made from the same profile.
    """
    plain = {
        (cell.category, cell.batch_size, cell.temperature): _check(cell, None, model, None)
        for cell in profile.measured_cells
        if cell.setting is None
    }
    checks = []
    for cell in profile.measured_cells:
        without = plain.get((cell.category, cell.batch_size, cell.temperature))
        acceptance = acceptance_of_cell(profile, cell)
        if cell.setting is None:
            checks.append(_check(cell, None, model, None))
        elif acceptance is None:
            checks.append(CellCheck(cell, reason=f"no acceptance length of {cell.setting.name} for {cell.category}"))
        else:
            checks.append(_check(cell, acceptance, model, without))
    errors = [abs(check.error) for check in checks if check.error is not None]
    speed_ups = [abs(check.speed_up_error) for check in checks if check.speed_up_error is not None]
    return Validation(
        checks=tuple(checks),
        median_error=float(np.median(errors)) if errors else None,
        worst_error=max(errors, default=None),
        median_speed_up_error=float(np.median(speed_ups)) if speed_ups else None,
        worst_speed_up_error=max(speed_ups, default=None),
        num_not_predicted=sum(check.tokens_per_s is None for check in checks),
    )


def acceptance_of_cell(profile: ServingProfile, cell: MeasuredCell) -> AcceptanceLength | None:
    """The acceptance length of a cell's setting and load; one of its batch size before one of all."""
    fitting = [
        one
        for one in profile.acceptance_lengths
        if (one.category, one.setting, one.temperature) == (cell.category, cell.setting, cell.temperature)
        and one.batch_size in (None, cell.batch_size)
    ]
    return max(fitting, key=lambda one: one.batch_size is not None, default=None)


def _check(
    cell: MeasuredCell, acceptance: AcceptanceLength | None, model: CostModel, plain: CellCheck | None
) -> CellCheck:
    try:
        predicted = model.predict_cell(cell, acceptance)
    except ArgumentError as error:
        return CellCheck(cell, reason=str(error))
    check = CellCheck(cell, predicted, predicted.value / cell.tokens_per_s.value - 1)
    if plain is None or plain.tokens_per_s is None:
        return check
    speed_up = predicted.value / plain.tokens_per_s.value
    measured = cell.tokens_per_s.value / plain.cell.tokens_per_s.value
    return replace(check, speed_up=speed_up, measured_speed_up=measured, speed_up_error=speed_up / measured - 1)
