"""`twotower-spec plan`: whether drafting with TwoTower pays, from step times that were measured or assumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower_bench.cli.plan_options import TYPED, Asked, TypedNumbers, integers
from twotower_bench.cost_model import PUBLISHED_SIZE, CostModel, DrafterSize, Prediction
from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, Estimate, ServingProfile
from twotower_bench.uncertainty import Doubt
from twotower_bench.validation import Validation, validate
from twotower_bench.verdict import Advice, advise
from twotower_spec.config import TORCH_DTYPES, TwoTowerConfig
from twotower_spec.errors import ArgumentError

PUBLISHED = "published"
# Of a profile where no more is asked.
AS_MEASURED = "Prompts of all kinds together, where measured, and drafts as measured; --category and -K give others."


def plan(
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured step times, acceptance lengths and cells (docs/planning.md); also validates."),
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Requests at once, 1,8 for several; default: 1, or those measured.")
    ] = None,
    verifier_step_ms: Annotated[
        str | None, typer.Option(help="A step without drafts: 12.7, or by batch size 1:12.7,8:19.0.")
    ] = None,
    verify_step_ms: Annotated[
        str | None,
        typer.Option(help="A step that verifies the most drafts: 15.7, or by batch size and tokens read 1x8:13.1."),
    ] = None,
    context_pass_ms: Annotated[
        str | None, typer.Option(help="The context tower's pass: 2.8, or by batch and block size 1x8:2.8,8x8:5.5.")
    ] = None,
    denoiser_step_ms: Annotated[str | None, typer.Option(help="One denoiser pass: likewise.")] = None,
    host_ms: Annotated[float, typer.Option(help="All else of a drafting round.")] = 0.0,
    drafter: Annotated[
        str, typer.Option(help="With --bandwidth-gb-s: a checkpoint, or the published shape.")
    ] = PUBLISHED,
    bandwidth_gb_s: Annotated[
        float | None, typer.Option(help="Derive the drafter's passes from its weights over this, GB/s.")
    ] = None,
    launch_overhead_ms: Annotated[float, typer.Option(help="Added to every derived pass.")] = 0.0,
    times_floor: Annotated[float, typer.Option(help="How many times its bytes a derived pass takes.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the weights of a derived drafter.")] = "bfloat16",
    num_speculative_tokens: Annotated[
        str | None,
        typer.Option(
            "--num-speculative-tokens", "-K", help="Drafts, 3,7,15; default: those measured, or the most and fewer."
        ),
    ] = None,
    block_size: Annotated[
        str | None, typer.Option("--block-size", "-S", help="8,16 for several; default: 16, or those measured.")
    ] = None,
    steps_per_block: Annotated[
        str | None,
        typer.Option("--steps-per-block", "--steps", help="1,4 for several; default: 1, or those measured."),
    ] = None,
    acceptance_length: Annotated[
        str | None, typer.Option(help="Of the most drafts: 5.2, 5.2+-0.3, or by block size and steps 16x1:5.2,16x4:7.")
    ] = None,
    acceptance_by_position: Annotated[
        str | None, typer.Option(help="Share of rounds that accepted each draft, 0.9,0.8,...: for shorter drafts.")
    ] = None,
    category: Annotated[
        str | None, typer.Option(help="Only this kind of prompts of the profile; default: all together, if measured.")
    ] = None,
    assumed_error: Annotated[
        float, typer.Option(help="Of numbers without an interval: within this share, 95 times in 100.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict what drafting with TwoTower gains for a verifier and a load, and say when not to use it."""
    doubt = Doubt(assumed_error)
    asked = Asked(
        batch_sizes=integers("--batch-size", batch_size),
        block_sizes=integers("--block-size", block_size),
        steps=integers("--steps-per-block", steps_per_block),
        num_speculative_tokens=integers("--num-speculative-tokens", num_speculative_tokens),
        category=category,
    )
    size = _drafter_size(drafter, bandwidth_gb_s, launch_overhead_ms, times_floor, dtype)
    typed = TypedNumbers(
        verifier_step_ms, verify_step_ms, context_pass_ms, denoiser_step_ms, acceptance_length, acceptance_by_position
    )
    if profile is None:
        given = typed.as_profile(asked, host_ms, derived_drafter=size is not None)
    else:
        typed.refuse(f"is measured in --profile {profile}")
        given = ServingProfile.load(profile)
        asked = asked.of_measured(given)
    model = CostModel(given.verifier_steps, size or given.drafting_phases, doubt)
    predictions, failures = _predictions(given, asked, model)
    measured = {one.setting for one in given.acceptance_lengths}
    guessed = any(not one.by_position for one in given.acceptance_lengths)
    found = Plan(
        predictions=predictions,
        validation=validate(given, model) if given.measured_cells else None,
        remarks=(
            *_left_out(failures),
            *([AS_MEASURED] if profile and not (category and num_speculative_tokens) else []),
            *_remarks(doubt, size, guessed and any(one.setting not in measured for one in predictions)),
        ),
    )
    if as_json:
        print(json.dumps(found.to_json()))
    else:
        _show(found, Console())


@dataclass(frozen=True)
class Plan:
    """What the command found.

    Attributes:
        predictions: loads one after the other.
        validation: of a profile with measured cells.
        remarks: what was assumed.
    """

    predictions: tuple[Prediction, ...]
    validation: Validation | None
    remarks: tuple[str, ...]

    @property
    def advice(self) -> list[Advice]:
        """One for each load."""
        return [advise(list(predictions)) for _, predictions in groupby(self.predictions, _load)]

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "predictions": [one.to_json() for one in self.predictions],
            "advice": [{"category": one.best.category, **one.to_json()} for one in self.advice],
            "validation": self.validation.to_json() if self.validation else None,
            "remarks": list(self.remarks),
        }


def _drafter_size(
    drafter: str, bandwidth_gb_s: float | None, launch_overhead_ms: float, times_floor: float, dtype: str
) -> DrafterSize | None:
    """A drafter whose times are derived; None where they are given."""
    if bandwidth_gb_s is None:
        if drafter != PUBLISHED or launch_overhead_ms or times_floor != 1:
            raise ArgumentError(
                "--drafter, --launch-overhead-ms and --times-floor are about derived times; give --bandwidth-gb-s, or "
                "leave them out"
            )
        return None
    if dtype not in TORCH_DTYPES:
        raise ArgumentError(f"--dtype {dtype!r} is not allowed; give one of {', '.join(TORCH_DTYPES)}")
    config = PUBLISHED_SIZE if drafter == PUBLISHED else TwoTowerConfig.from_pretrained(drafter)
    return DrafterSize(config, bandwidth_gb_s, TORCH_DTYPES[dtype].itemsize, launch_overhead_ms, times_floor)


def _predictions(
    given: ServingProfile, asked: Asked, model: CostModel
) -> tuple[tuple[Prediction, ...], list[ArgumentError]]:
    """All that can be predicted, by load, and why others cannot.

    Raises:
        ArgumentError: nothing can, and no measured cells are there to be shown, or a batch size was asked for.
    """
    lengths = [
        one
        for one in given.acceptance_lengths
        if asked.category in (None, one.category)
        and one.setting.block_size in (asked.block_sizes or (one.setting.block_size,))
        and one.setting.steps_per_block in (asked.steps or (one.setting.steps_per_block,))
    ]
    if not lengths:
        known = "; ".join(sorted({f"{one.category}: {one.setting.name}" for one in given.acceptance_lengths}))
        raise ArgumentError(f"no acceptance length is known for what was asked; known are {known or 'none'}")
    places = [
        (batch_size, one, num_tokens)
        for one in lengths
        for batch_size in _batch_sizes(given, asked)
        if one.batch_size in (None, batch_size)
        for num_tokens in _num_tokens(one, asked)
    ]
    if not places:
        raise ArgumentError(
            f"nothing is known for batch size {asked.batch_sizes} with K {asked.num_speculative_tokens}; ask for what "
            f"was measured"
        )
    found, failures = [], []
    for place in places:
        try:
            found.append(model.predict(*place))
        except ArgumentError as error:
            failures.append(error)
    if not found and (asked.batch_sizes or not given.measured_cells):
        raise failures[0]
    return tuple(sorted(found, key=lambda one: (*_load(one), _place(one.setting)))), failures


def _load(one: Prediction) -> tuple[str, float, int]:
    return one.category, one.temperature, one.batch_size


def _place(setting: DraftSetting) -> tuple[int, int, int]:
    return setting.block_size, setting.steps_per_block, setting.num_speculative_tokens


def _batch_sizes(given: ServingProfile, asked: Asked) -> Sequence[int]:
    return asked.batch_sizes or sorted({step.batch_size for step in given.verifier_steps if step.num_tokens == 1})


def _num_tokens(one: AcceptanceLength, asked: Asked) -> list[int]:
    """Numbers of drafts to predict: those asked for, those measured, or the most and some fewer."""
    most = one.setting.num_speculative_tokens
    if asked.num_speculative_tokens:
        return [number for number in asked.num_speculative_tokens if number <= most]
    if asked.measured_only:
        return [most]
    return [*(2**i - 1 for i in range(1, 8) if 2**i - 1 < most), most]


def _left_out(failures: Sequence[ArgumentError]) -> list[str]:
    return [f"{len(failures)} predictions were left out, the first because: {failures[0]}."] if failures else []


def _remarks(doubt: Doubt, size: DrafterSize | None, shortened: bool) -> tuple[str, ...]:
    remarks = [
        f"Intervals: 95 % of {doubt.num_draws} Monte Carlo draws; numbers without one are taken to be within "
        f"{100 * doubt.assumed_error:g} %.",
    ]
    if size is not None:
        remarks.append(
            f"The drafter's passes take {size.times_floor:g} times their weights over {size.bandwidth_gb_s:g} GB/s, "
            f"and {size.launch_overhead_ms:g} ms more: a bound that holds while they wait for memory. Where they "
            f"compute all the time (large batches, CPUs) they take longer, and the gain is smaller."
        )
    if shortened:
        remarks.append(
            "Without acceptance by position, shorter drafts are predicted as if every draft had the same chance after "
            "those before it."
        )
    remarks.append("Between measured batch sizes, numbers of tokens and block sizes: straight lines; beyond: nothing.")
    return tuple(remarks)


def _show(found: Plan, console: Console) -> None:
    best = [advice.best for advice in found.advice]
    for (category, temperature, batch_size), predictions in groupby(found.predictions, _load):
        text = "" if category == TYPED else f"{category}, "
        table = _narrow_table(f"predicted: {text}temperature {temperature:g}, batch {batch_size}")
        for heading in ("tokens a round", "plain ms", "verify ms", "draft ms", "tok/s", "speed-up", "pays from"):
            table.add_column(heading, justify="right")
        for one in predictions:
            table.add_row(
                one.setting.name,
                _with_interval(one.acceptance_length),
                f"{one.plain_ms:.1f}",
                f"{one.verify_ms:.1f}",
                f"{one.drafting_ms:.1f}",
                f"{one.tokens_per_s.value:.0f}",
                _with_interval(one.speed_up),
                f"{one.break_even_length:.2f}",
                style="bold" if one in best else "",
            )
        console.print(table)
    for advice in found.advice:
        text = "" if advice.best.category == TYPED else f"{advice.best.category}: "
        console.print(Text(text + advice.sentence, style="bold"), soft_wrap=True)
    if found.validation:
        console.print(_validation_table(found.validation))
        console.print(_validation_sentence(found.validation), soft_wrap=True)
    for remark in found.remarks:
        console.print(Text(remark, style="dim"), soft_wrap=True)


def _narrow_table(title: str, *columns: str) -> Table:
    """Without lines between columns: what is left fits a terminal of 80."""
    table = Table(*columns, title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("setting", min_width=len("adaptive,"), overflow="fold")
    return table


def _validation_table(validation: Validation) -> Table:
    table = _narrow_table("measured cells beside their predictions", "text", "batch")
    for heading in ("tokens/s", "predicted", "error", "held out", "speed-up", "predicted"):
        table.add_column(heading, justify="right")
    for check in validation.checks:
        cell = check.cell
        table.add_row(
            cell.category,
            str(cell.batch_size),
            cell.setting.name if cell.setting else "no drafting",
            f"{cell.tokens_per_s.value:.0f}",
            f"{check.tokens_per_s.value:.0f}" if check.tokens_per_s else "-",
            _percent(check.error),
            _percent(check.held_out_error),
            f"{check.measured_speed_up:.2f}" if check.measured_speed_up else "-",
            f"{check.speed_up:.2f}" if check.speed_up else "-",
        )
    return table


def _validation_sentence(validation: Validation) -> str:
    sentence = "No cell could be predicted."
    if validation.median_error is not None:
        sentence = (
            f"Error of tokens/s with all times of the profile, in-sample where they are the cell's own: "
            f"{_absolute(validation.median_error)} in the median, {_absolute(validation.worst_error)} at worst"
        )
        if validation.median_speed_up_error is not None:
            sentence += (
                f"; of the speed-up: {_absolute(validation.median_speed_up_error)} and "
                f"{_absolute(validation.worst_speed_up_error)}"
            )
        sentence += f". {_absolute(validation.share_inside)} of the cells are inside the 95 % interval."
    if validation.num_held_out:
        sentence += (
            f" Held out, {validation.num_held_out} cells of inner batch sizes without the times of these: "
            f"{_absolute(validation.median_held_out_error)} in the median, "
            f"{_absolute(validation.worst_held_out_error)} at worst, "
            f"{_absolute(validation.held_out_share_inside)} inside."
        )
    if validation.num_not_predicted:
        reason = next(check.reason for check in validation.checks if check.reason)
        sentence += f" {validation.num_not_predicted} cells were not predicted, the first because: {reason}."
    return sentence


def _absolute(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.0f} %"


def _with_interval(estimate: Estimate) -> str:
    return f"{estimate.value:.2f} ({estimate.low:.2f} to {estimate.high:.2f})"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:+.0f} %"
