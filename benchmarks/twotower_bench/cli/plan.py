"""`twotower-spec plan`: whether drafting with TwoTower pays, from step times that were measured or assumed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Annotated

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from twotower_bench.cli.plan_options import Asked, TypedNumbers, integers
from twotower_bench.drafter_size import PUBLISHED_SIZE, DrafterSize
from twotower_bench.plan import Advice, CostModel, Prediction, advise
from twotower_bench.records import ALL_CATEGORIES
from twotower_bench.serving_profile import AcceptanceLength, ServingProfile, jsonable
from twotower_spec.config import TORCH_DTYPES, TwoTowerConfig
from twotower_spec.errors import ArgumentError

PUBLISHED = "published"
# Of a profile where no more is asked.
AS_MEASURED = "Prompts of all kinds together, where measured, and drafts as measured; --category and -K give others."


def plan(
    profile: Annotated[
        Path | None,
        typer.Option(help="Measured step times, acceptance lengths and speeds (docs/planning.md)."),
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
        float, typer.Option(help="Of numbers without an interval, which reach so far to both sides.")
    ] = 0.1,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Predict what drafting with TwoTower gains for a verifier and a load, and say when not to use it."""
    asked = Asked(
        batch_sizes=integers("--batch-size", batch_size),
        block_sizes=integers("--block-size", block_size),
        steps=integers("--steps-per-block", steps_per_block),
        num_speculative_tokens=integers("--num-speculative-tokens", num_speculative_tokens),
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
    model = CostModel(given.verifier_steps, size or given.drafting_phases, assumed_error)
    lengths = _lengths(given, asked, category)
    predictions, failures = _predictions(model, given, lengths, asked, fewer_too=profile is None)
    advice = [advise(list(group)) for _, group in groupby(predictions, lambda one: one.load)]
    remarks = [f"{len(failures)} predictions were left out, the first because: {failures[0]}."] if failures else []
    if profile and not (category and num_speculative_tokens):
        remarks.append(AS_MEASURED)
    remarks += _assumptions(assumed_error, size, predictions, lengths)
    if as_json:
        advised = [{"category": one.best.category, **jsonable(one)} for one in advice]
        print(json.dumps({"predictions": list(map(jsonable, predictions)), "advice": advised, "remarks": remarks}))
    else:
        _show(predictions, advice, remarks)


def _drafter_size(
    drafter: str, bandwidth_gb_s: float | None, launch_overhead_ms: float, times_floor: float, dtype: str
) -> DrafterSize | None:
    """Size of a drafter whose times are derived; None where they are given."""
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


def _lengths(given: ServingProfile, asked: Asked, category: str | None) -> list[AcceptanceLength]:
    """Acceptance lengths of what was asked; without a category, of all prompts together where they are known."""
    known = given.acceptance_lengths
    if category is None and any(one.category == ALL_CATEGORIES for one in known):
        category = ALL_CATEGORIES
    found = [
        one
        for one in known
        if category in (None, one.category)
        and one.setting.block_size in (asked.block_sizes or (one.setting.block_size,))
        and one.setting.steps_per_block in (asked.steps or (one.setting.steps_per_block,))
    ]
    if not found:
        names = "; ".join(sorted({f"{one.category}: {one.setting.name}" for one in known}))
        raise ArgumentError(f"no acceptance length is known for what was asked; known are {names or 'none'}")
    return found


def _predictions(
    model: CostModel, given: ServingProfile, lengths: Sequence[AcceptanceLength], asked: Asked, fewer_too: bool
) -> tuple[list[Prediction], list[ArgumentError]]:
    """Predicts what can be, load by load, and keeps the reasons why the rest cannot.

    Raises:
        ArgumentError: nothing can.
    """
    batch_sizes = asked.batch_sizes or sorted({one.batch_size for one in given.verifier_steps if one.num_tokens == 1})
    places = [
        (batch_size, one, num_drafts)
        for one in lengths
        for batch_size in batch_sizes
        if one.batch_size in (None, batch_size)
        for num_drafts in asked.num_speculative_tokens or _num_drafts(one, fewer_too)
        if num_drafts <= one.setting.num_speculative_tokens
    ]
    if not places:
        raise ArgumentError(
            f"nothing is known for batch size {batch_sizes} with K {asked.num_speculative_tokens}; ask for what was "
            f"measured"
        )
    found, failures = [], []
    for place in places:
        try:
            one = model.predict(*place)
            found.append(replace(one, measured_speed_up=given.measured_speed_up(*one.load, one.setting)))
        except ArgumentError as error:
            failures.append(error)
    if not found:
        raise failures[0]
    return sorted(found, key=lambda one: (one.load, _block(one))), failures


def _num_drafts(one: AcceptanceLength, fewer_too: bool) -> list[int]:
    most = one.setting.num_speculative_tokens
    return [*(2**i - 1 for i in range(1, 8) if fewer_too and 2**i - 1 < most), most]


def _block(one: Prediction) -> tuple[int, int, int]:
    return one.setting.block_size, one.setting.steps_per_block, one.setting.num_speculative_tokens


def _assumptions(
    assumed_error: float,
    size: DrafterSize | None,
    predictions: Sequence[Prediction],
    lengths: Sequence[AcceptanceLength],
) -> list[str]:
    remarks = [
        f"Intervals: what those of all numbers do to the result together; numbers without one reach "
        f"{100 * assumed_error:g} % to both sides."
    ]
    if size is not None:
        remarks.append(
            f"The drafter's passes take {size.times_floor:g} times their weights over {size.bandwidth_gb_s:g} GB/s, "
            f"and {size.launch_overhead_ms:g} ms more: a bound that holds while they wait for memory. Where they "
            f"compute all the time (large batches, CPUs) they take longer, and the gain is smaller."
        )
    known = {one.setting for one in lengths}
    if any(one.setting not in known for one in predictions) and not all(one.by_position for one in lengths):
        remarks.append(
            "Without acceptance by position, shorter drafts are predicted as if every draft had the same chance after "
            "those before it."
        )
    return [
        *remarks,
        "Between measured batch sizes, numbers of tokens and block sizes: straight lines; beyond: nothing.",
    ]


def _show(predictions: Sequence[Prediction], advice: Sequence[Advice], remarks: Sequence[str]) -> None:
    console, best = Console(), [one.best for one in advice]
    beside = any(one.measured_speed_up for one in predictions)
    headings = ["tokens a round", "verify ms", "draft ms", "tok/s", "speed-up", *["measured"] * beside, "pays from"]
    for (category, temperature, batch_size), group in groupby(predictions, lambda one: one.load):
        own = list(group)
        text = "" if category == ALL_CATEGORIES else f"{category}, "
        title = f"{text}batch {batch_size}, temperature {temperature:g}: a plain step takes {own[0].plain_ms:.1f} ms"
        # Without lines between columns it fits a terminal of 80.
        table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        table.add_column("setting", min_width=len("adaptive,"), overflow="fold")
        for heading in headings:
            table.add_column(heading, justify="right")
        for one in own:
            table.add_row(
                one.setting.name,
                str(one.acceptance_length),
                f"{one.verify_ms:.1f}",
                f"{one.drafting_ms:.1f}",
                f"{one.tokens_per_s.value:.0f}",
                str(one.speed_up),
                *[f"{one.measured_speed_up:.2f}" if one.measured_speed_up else "-"] * beside,
                f"{one.break_even_length:.2f}",
                style="bold" if one in best else "",
            )
        console.print(table)
    for advised in advice:
        text = "" if advised.best.category == ALL_CATEGORIES else f"{advised.best.category}: "
        console.print(Text(text + advised.sentence, style="bold"), soft_wrap=True)
    for remark in remarks:
        console.print(Text(remark, style="dim"), soft_wrap=True)
