"""The cost model beside what was measured.

Most cells of a profile are predicted from times of their own steps: in-sample, a test of the formula. What a batch size
costs that was not measured is tested by holding its times out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from twotower_bench.cost_model import CostModel
from twotower_bench.serving_profile import AcceptanceLength, Estimate, MeasuredCell, ServingProfile
from twotower_spec.errors import ArgumentError


@dataclass(frozen=True)
class CellCheck:
    """A measured cell beside its prediction.

    Attributes:
        cell: measured.
        tokens_per_s: predicted from all times of the profile, in-sample where it has the cell's own; None where it has
            not what it takes.
        error: predicted / measured - 1.
        held_out: tokens/s predicted without the times of this batch size; None where it is the smallest or largest, or
            its neighbours have not what it takes. The acceptance length and time to the first token are its own.
        held_out_error: likewise.
        speed_up, measured_speed_up, speed_up_error: likewise over the same load without drafting, if it was measured.
        reason: why it was not predicted.
    """

    cell: MeasuredCell
    tokens_per_s: Estimate | None = None
    error: float | None = None
    held_out: Estimate | None = None
    held_out_error: float | None = None
    speed_up: float | None = None
    measured_speed_up: float | None = None
    speed_up_error: float | None = None
    reason: str | None = None

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        measured = self.cell.tokens_per_s.to_json()
        predicted, held_out = (one.to_json() if one else None for one in (self.tokens_per_s, self.held_out))
        cell = {**asdict(self.cell), "tokens_per_s": measured}
        return {**asdict(self), "cell": cell, "tokens_per_s": predicted, "held_out": held_out}


@dataclass(frozen=True)
class Validation:
    """All measured cells of a profile beside their predictions.

    Attributes:
        checks: per cell.
        median_error, worst_error: of tokens/s from all times, as absolute shares; None without any.
        median_speed_up_error, worst_speed_up_error: likewise of speed-ups.
        num_not_predicted: cells that the profile has not enough for.
        share_inside: of the predicted cells, those whose measured tokens/s lie in the 95 % interval of the prediction,
            from all times; None without any.
        median_held_out_error, worst_held_out_error, held_out_share_inside: likewise with batch sizes held out.
        num_held_out: cells that these are of.
    """

    checks: tuple[CellCheck, ...]
    median_error: float | None
    worst_error: float | None
    median_speed_up_error: float | None
    worst_speed_up_error: float | None
    num_not_predicted: int
    share_inside: float | None
    median_held_out_error: float | None
    worst_held_out_error: float | None
    held_out_share_inside: float | None
    num_held_out: int

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {**vars(self), "checks": [check.to_json() for check in self.checks]}


def validate(profile: ServingProfile, model: CostModel) -> Validation:
    """Predicts every measured cell of a profile, and those of inner batch sizes without the times of these, too.

    Args:
        profile: with the cells, and the acceptance lengths of their settings.
        model: made from the same profile.
    """
    plain = {
        (cell.category, cell.batch_size, cell.temperature): _check(cell, None, model, None)
        for cell in profile.measured_cells
        if cell.setting is None
    }
    sizes = sorted({cell.batch_size for cell in profile.measured_cells})
    held_out = {size: model.without(size) for size in sizes[1:-1]}
    checks = []
    for cell in profile.measured_cells:
        without = plain.get((cell.category, cell.batch_size, cell.temperature))
        acceptance = acceptance_of_cell(profile, cell)
        if cell.setting is not None and acceptance is None:
            checks.append(CellCheck(cell, reason=f"no acceptance length of {cell.setting.name} for {cell.category}"))
            continue
        check = _check(cell, acceptance, model, without if cell.setting else None)
        checks.append(_held_out(check, acceptance, held_out.get(cell.batch_size)))
    in_sample = _errors((check.cell, check.tokens_per_s) for check in checks)
    out_of_sample = _errors((check.cell, check.held_out) for check in checks)
    speed_ups = [abs(check.speed_up_error) for check in checks if check.speed_up_error is not None]
    return Validation(
        checks=tuple(checks),
        median_error=in_sample.median,
        worst_error=in_sample.worst,
        median_speed_up_error=float(np.median(speed_ups)) if speed_ups else None,
        worst_speed_up_error=max(speed_ups, default=None),
        num_not_predicted=len(checks) - in_sample.num_cells,
        share_inside=in_sample.share_inside,
        median_held_out_error=out_of_sample.median,
        worst_held_out_error=out_of_sample.worst,
        held_out_share_inside=out_of_sample.share_inside,
        num_held_out=out_of_sample.num_cells,
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
    check = CellCheck(cell, predicted, _error(cell, predicted))
    if plain is None or plain.tokens_per_s is None:
        return check
    speed_up = predicted.value / plain.tokens_per_s.value
    measured = cell.tokens_per_s.value / plain.cell.tokens_per_s.value
    return replace(check, speed_up=speed_up, measured_speed_up=measured, speed_up_error=speed_up / measured - 1)


def _held_out(check: CellCheck, acceptance: AcceptanceLength | None, model: CostModel | None) -> CellCheck:
    """With the prediction of a model that does not know the batch size; as it is where there is none."""
    if model is None:
        return check
    try:
        predicted = model.predict_cell(check.cell, acceptance)
    except ArgumentError:
        return check
    return replace(check, held_out=predicted, held_out_error=_error(check.cell, predicted))


def _error(cell: MeasuredCell, predicted: Estimate) -> float:
    return predicted.value / cell.tokens_per_s.value - 1


@dataclass(frozen=True)
class _Errors:
    """Absolute shares, and how often the interval holds what was measured; None without cells."""

    num_cells: int
    median: float | None
    worst: float | None
    share_inside: float | None


def _errors(predictions: Iterable[tuple[MeasuredCell, Estimate | None]]) -> _Errors:
    found = [(cell, predicted) for cell, predicted in predictions if predicted is not None]
    if not found:
        return _Errors(0, None, None, None)
    errors = [abs(_error(*one)) for one in found]
    inside = [(one.low or 0.0) <= cell.tokens_per_s.value <= (one.high or np.inf) for cell, one in found]
    return _Errors(len(found), float(np.median(errors)), max(errors), sum(inside) / len(inside))
