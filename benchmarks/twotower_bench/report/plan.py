"""Section of a serving profile: what the cost model predicts beside what was measured."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_bench.cost_model import CostModel
from twotower_bench.report.document import Axis, Line, Panel, Plot, Reference, Row, RowGroup, Section, Table
from twotower_bench.report.reading import Measurements
from twotower_bench.report.wording import number, rate, share, signed_share, times
from twotower_bench.serving_profile import Estimate, ServingProfile
from twotower_bench.validation import CellCheck, Validation, validate


def plan_section(measured: Measurements, name: str) -> Section:
    """Of its profile.

    Args:
        measured: with a profile.
        name: of the section.
    """
    profile = measured.profile
    assert profile is not None
    found = validate(profile, CostModel(profile.verifier_steps, profile.drafting_phases))
    compared = [check for check in found.checks if check.speed_up is not None and check.cell.setting]
    return Section(
        name,
        "Prediction beside measurement",
        _finding(found),
        tuple(measured.origins),
        (*([_checks_table(found.checks)] if found.checks else []), *_step_tables(profile)),
        (_plot(compared),) if compared else (),
        (
            "In-sample: each cell is predicted from the times of the steps and phases of its own batch size, and from "
            "its own acceptance length, time to the first token and mean batch size. Held out: likewise, without the "
            "times of its batch size, which its neighbours give. Both test how times add up to speed, not acceptance.",
        ),
        [check.to_json() for check in found.checks],
    )


def _finding(found: Validation) -> str:
    if not found.checks:
        return "The profile has step times, and no cells that predictions could be held against."
    if found.median_error is None:
        return "No measured cell could be predicted."
    sentence = (
        f"In-sample the cost model misses measured tokens/s by {share(found.median_error)} in the median and "
        f"{share(found.worst_error)} at worst"
    )
    if found.median_speed_up_error is not None:
        sentence += f", speed-ups by {share(found.median_speed_up_error)} and {share(found.worst_speed_up_error)}"
    sentence += f"; {share(found.share_inside)} of what was measured lie in the prediction's 95 % interval"
    if found.num_not_predicted:
        sentence += f"; {found.num_not_predicted} of {len(found.checks)} cells could not be predicted"
    if not found.num_held_out:
        return f"{sentence}. No batch size lies between others, to be held out."
    return (
        f"{sentence}. With the batch size held out, it misses tokens/s of {found.num_held_out} cells by "
        f"{share(found.median_held_out_error)} in the median and {share(found.worst_held_out_error)} at worst; "
        f"{share(found.held_out_share_inside)} lie in the interval."
    )


def _checks_table(checks: Sequence[CellCheck]) -> Table:
    rows: dict[str, list[Row]] = {}
    for check in checks:
        cell = check.cell
        temperature = f", temperature {cell.temperature:g}" if cell.temperature else ""
        rows.setdefault(f"{cell.category}, batch of {cell.batch_size}{temperature}", []).append(
            Row(
                (
                    cell.setting.name if cell.setting else "no drafting",
                    _estimate(cell.tokens_per_s),
                    _estimate(check.tokens_per_s) if check.tokens_per_s else "",
                    signed_share(check.error),
                    signed_share(check.held_out_error),
                    times(check.measured_speed_up),
                    times(check.speed_up),
                    signed_share(check.speed_up_error),
                    check.reason or "",
                )
            )
        )
    columns = [
        "Setting",
        "Measured tokens/s",
        "Predicted",
        "Error",
        "Held-out error",
        "Measured speed-up",
        "Predicted",
        "Error",
        "Why not",
    ]
    groups = [RowGroup(heading, tuple(own)) for heading, own in rows.items()]
    if not any(check.reason for check in checks):
        columns.pop()
        groups = [RowGroup(one.heading, tuple(Row(row.cells[:-1]) for row in one.rows)) for one in groups]
    note = (
        "In brackets 95 % intervals; of what was measured a few times, the range of it. Error: predicted over "
        "measured, less one; in-sample, and without the times of the batch size. Speed-up: over no drafting under the "
        "same load, in-sample."
    )
    return Table("Predicted and measured speed", tuple(columns), tuple(groups), note)


def _step_tables(profile: ServingProfile) -> list[Table]:
    steps = tuple(Row((f"{one.batch_size} × {one.num_tokens}", _estimate(one.ms, 1))) for one in profile.verifier_steps)
    phases = tuple(
        Row(
            (
                f"{one.batch_size} × {one.block_size}",
                _estimate(one.extend_ms, 1),
                _estimate(one.denoise_ms, 1),
                number(one.host_ms, 1),
            )
        )
        for one in profile.drafting_phases
    )
    tables = []
    if steps:
        note = "A step of the engine, drafting left out; requests × tokens that each reads."
        tables.append(Table("Steps of the verifier", ("Requests × tokens", "ms"), (RowGroup("", steps),), note))
    if phases:
        columns = ("Requests × block", "Extend ms", "Denoise ms", "Host ms")
        note = "Of the whole batch: the context tower's reading, one denoiser pass, everything else per round."
        tables.append(Table("Phases of drafting", columns, (RowGroup("", phases),), note))
    return tables


def _estimate(one: Estimate, digits: int | None = None) -> str:
    def text(value: float) -> str:
        return rate(value) if digits is None else number(value, digits)

    if one.low is None or one.high is None:
        return text(one.value)
    return f"{text(one.value)} ({text(one.low)} to {text(one.high)})"


def _plot(compared: Sequence[CellCheck]) -> Plot:
    """Speed-ups, a hue for each batch size."""
    marks: list[Line | Reference] = [Reference("as predicted")]
    for hue, batch_size in enumerate(sorted({check.cell.batch_size for check in compared}), start=1):
        own = [check for check in compared if check.cell.batch_size == batch_size]
        xs = tuple(check.speed_up or 0.0 for check in own)
        ys = tuple(check.measured_speed_up or 0.0 for check in own)
        marks.append(Line(f"batch of {batch_size}", hue, xs, ys, is_connected=False))
    values = [value for mark in marks if isinstance(mark, Line) for value in (*mark.xs, *mark.ys)]
    limits = (0.9 * min(values), 1.05 * max(values))
    axes = (Axis("predicted speed-up", limits=limits), Axis("measured speed-up", limits=limits))
    return Plot(
        "validation",
        "Predicted beside measured speed-up",
        "Every measured cell that could be predicted, in-sample.",
        "On the diagonal the prediction is right; below it, drafting gains less than predicted.",
        (Panel("", *axes, tuple(marks)),),
    )
