"""`twotower-spec plan`: whether drafting with TwoTower pays, from step times that were measured or assumed."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import groupby, product
from pathlib import Path
from typing import Annotated, Any

import typer

from twotower_bench.cli.options import numbers
from twotower_bench.cli.tables import print_table
from twotower_bench.drafter_size import PUBLISHED_SIZE, DrafterSize
from twotower_bench.plan import CostModel, Prediction, advise
from twotower_bench.records import ALL_CATEGORIES, DraftSetting, read_row
from twotower_bench.serving_profile import ServingProfile
from twotower_spec.config import TORCH_DTYPES, TwoTowerConfig
from twotower_spec.errors import ArgumentError
from twotower_spec.terminal import Terminal

PUBLISHED = "published"
# Of a profile where no more is asked.
AS_MEASURED = "Prompts of all kinds together, where measured, and drafts as measured; --category and -K give others."
STRAIGHT_LINES = "Between measured batch sizes, numbers of tokens and block sizes: straight lines; beyond: nothing."
COLUMNS: Mapping[str, Callable[[Prediction], str]] = {
    "setting": lambda one: one.setting.name,
    "tokens a round": lambda one: str(one.acceptance_length),
    "verify ms": lambda one: f"{one.verify_ms:.1f}",
    "draft ms": lambda one: f"{one.drafting_ms:.1f}",
    "tok/s": lambda one: f"{one.tokens_per_s.value:.0f}",
    "speed-up": lambda one: str(one.speed_up),
    "pays from": lambda one: f"{one.break_even_length:.2f}",
}
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_ENTRY = re.compile(rf"(?:(\d+):)?{_NUMBER}(?:\+-{_NUMBER})?")


def plan(
    profile: Annotated[
        Path | None, typer.Option(help="Measured step times and acceptance lengths (docs/planning.md).")
    ] = None,
    batch_size: Annotated[
        str | None, typer.Option(help="Requests at once, 1,8 for several; default: those of the plain steps.")
    ] = None,
    verifier_step_ms: Annotated[
        str | None, typer.Option(help="A step without drafts: 12.7, 12.7+-0.3, or by batch size 1:12.7,8:19.0.")
    ] = None,
    verify_step_ms: Annotated[str | None, typer.Option(help="A step that verifies the most drafts: likewise.")] = None,
    context_pass_ms: Annotated[str | None, typer.Option(help="The context tower's pass: likewise.")] = None,
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
    experts_dtype: Annotated[
        str | None, typer.Option(help="Of its routed experts: float8_e4m3fn, int8 or int4; default: of all weights.")
    ] = None,
    experts_per_token: Annotated[
        int | None, typer.Option(help="That a token visits in its denoiser; default: as config.json says.")
    ] = None,
    num_speculative_tokens: Annotated[
        str | None, typer.Option("--num-speculative-tokens", "-K", help="Drafts, 3,7,15; default: 15, or as measured.")
    ] = None,
    block_size: Annotated[
        int | None, typer.Option("--block-size", "-S", min=1, help="Default: 16, or those measured.")
    ] = None,
    steps_per_block: Annotated[
        int | None, typer.Option("--steps-per-block", "--steps", min=1, help="Default: 1, or those measured.")
    ] = None,
    acceptance_length: Annotated[
        str | None, typer.Option(help="Of the most drafts: 5.2, 5.2+-0.3, or by batch size.")
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
    batch_sizes = numbers("--batch-size", batch_size, int) if batch_size else []
    num_drafts = numbers("--num-speculative-tokens", num_speculative_tokens, int) if num_speculative_tokens else []
    size = _drafter_size(
        drafter, bandwidth_gb_s, launch_overhead_ms, times_floor, dtype, experts_dtype, experts_per_token
    )
    typed = {
        "--verifier-step-ms": verifier_step_ms,
        "--verify-step-ms": verify_step_ms,
        "--context-pass-ms": context_pass_ms,
        "--denoiser-step-ms": denoiser_step_ms,
        "--acceptance-length": acceptance_length,
        "--acceptance-by-position": acceptance_by_position,
    }
    if profile is not None:
        for option, value in typed.items():
            if value is not None:
                raise ArgumentError(f"{option} {value!r} is measured in --profile {profile}; leave one of them out")
        given = ServingProfile.load(profile)
    else:
        shares = numbers("--acceptance-by-position", acceptance_by_position, float) if acceptance_by_position else []
        most = max(num_drafts or [len(shares) or min(15, block_size or 15)])
        block_size, steps_per_block = block_size or max(16, most), steps_per_block or 1
        setting = DraftSetting(len(shares) or most, block_size, steps_per_block)
        given = _typed_profile(typed, batch_sizes or [1], setting, shares, 1 + most, host_ms, derived=size is not None)
        num_drafts = num_drafts or [*(k for k in (1, 3, 7) if shares and k < most), most]
    sizes = set(batch_sizes) or {one.batch_size for one in given.verifier_steps if one.num_tokens == 1}
    is_together = category is None and any(one.category == ALL_CATEGORIES for one in given.acceptance_lengths)
    wanted = (ALL_CATEGORIES if is_together else category, block_size, steps_per_block)
    predictions, failures = _predictions(CostModel(given, size, assumed_error), sorted(sizes), num_drafts, wanted)
    advice = [advise(list(group)) for _, group in groupby(predictions, lambda one: one.load)]
    remarks = [f"{len(failures)} predictions were left out, the first because: {failures[0]}."] if failures else []
    remarks += [AS_MEASURED] if profile and not (category and num_drafts) else []
    remarks.append(
        f"Intervals: what those of all numbers do to the result together; numbers without one reach "
        f"{100 * assumed_error:g} % to both sides."
    )
    if size:
        remarks.append(
            f"The drafter's passes take {size.times_floor:g} times their weights over {size.bandwidth_gb_s:g} GB/s, "
            f"and {size.launch_overhead_ms:g} ms more: a bound that holds while they wait for memory. Where they "
            f"compute all the time (large batches, CPUs) they take longer, and the gain is smaller."
        )
    remarks.append(STRAIGHT_LINES)
    if as_json:
        by_load = [{"category": one.best.category, **asdict(one)} for one in advice]
        print(json.dumps({"predictions": list(map(asdict, predictions)), "advice": by_load, "remarks": remarks}))
        return
    console = Terminal()
    groups: dict[str, list[dict[str, str]]] = {}
    for one in predictions:
        where = f"{_prefix(one.category, ', ')}batch {one.batch_size}, temperature {one.temperature:g}"
        rows = groups.setdefault(f"{where}: a plain step takes {one.plain_ms:.1f} ms", [])
        rows.append({name: say(one) for name, say in COLUMNS.items()})
    print_table(console, list(COLUMNS), groups)
    console.print()
    for advised in advice:
        sentence = _prefix(advised.best.category, ": ") + advised.sentence
        console.print(sentence, style="bold", soft_wrap=True)
    for remark in remarks:
        console.print(remark, style="dim", soft_wrap=True)


def _prefix(category: str, separator: str) -> str:
    return "" if category == ALL_CATEGORIES else category + separator


def _typed_profile(
    typed: Mapping[str, str | None],
    batch_sizes: Sequence[int],
    setting: DraftSetting,
    shares: Sequence[float],
    num_tokens: int,
    host_ms: float,
    derived: bool,
) -> ServingProfile:
    """Makes a profile of typed numbers.

    Args:
        typed: by option: both steps of the verifier, both passes of the drafter, and the acceptance length.
        batch_sizes: that were asked for.
        setting: of the drafts, whose acceptance by position is `shares`.
        num_tokens: that the verifier reads per request with the most drafts.
        host_ms: of a drafting round.
        derived: the drafter's times come from its size.
    """
    steps = list(typed)[: 2 if derived else 4]
    if missing := [option for option in steps if typed[option] is None]:
        raise ArgumentError(
            f"{', '.join(missing)} missing; give what was measured or assumed, or --profile; --bandwidth-gb-s derives "
            f"the drafter's passes"
        )
    if derived and (host_ms or typed["--context-pass-ms"] or typed["--denoiser-step-ms"]):
        raise ArgumentError(
            "--bandwidth-gb-s derives what --context-pass-ms, --denoiser-step-ms and --host-ms give; leave one out"
        )
    plain, verify, *passes = (_by_batch_size(option, typed[option] or "", batch_sizes) for option in steps)
    if any(one.keys() != plain.keys() for one in (verify, *passes)):
        raise ArgumentError(f"{', '.join(steps)} differ in batch sizes; give the same for all")
    length = typed["--acceptance-length"]
    if length is None and not shares:
        raise ArgumentError("--acceptance-length is missing; give it, or --acceptance-by-position, or --profile")
    lengths = _by_batch_size("--acceptance-length", length, [None]) if length else {None: 1 + sum(shares)}
    same = {"category": ALL_CATEGORIES, "setting": asdict(setting), "by_position": shares}
    block = {"block_size": setting.block_size, "host_ms": host_ms}
    raw = {
        "source": "the command line",
        "verifier_steps": [
            {"batch_size": size, "num_tokens": num, "ms": ms[size]}
            for num, ms in ((1, plain), (num_tokens, verify))
            for size in plain
        ],
        "drafting_phases": [
            {"batch_size": size, **block, "extend_ms": extend_ms, "denoise_ms": passes[1][size]}
            for size, extend_ms in (passes[0].items() if passes else ())
        ],
        "acceptance_lengths": [{**same, "batch_size": size, "length": one} for size, one in lengths.items()],
    }
    return read_row(ServingProfile, raw, "what was typed", "a profile", "see --help")


def _by_batch_size(option: str, text: str, sizes: Sequence[int | None]) -> dict[int | None, Any]:
    """Reads `1:12.7,8:19.0+-0.5`, or `12.7` where only one batch size was asked for."""
    found: dict[int | None, Any] = {}
    for part in map(str.strip, text.split(",")):
        match = _ENTRY.fullmatch(part)
        if match is None or not float(match[2]):
            raise ArgumentError(f"{option} {part!r} is not understood; give 12.7, 12.7+-0.3 or BATCH:12.7, above 0")
        if not match[1] and len(sizes) != 1:
            raise ArgumentError(f"{option} {part!r} is one number for several batch sizes; give BATCH:12.7 for each")
        size = int(match[1]) if match[1] else sizes[0]
        if size in found:
            raise ArgumentError(f"{option} {text!r} has two numbers for one batch size; give one")
        value, error = float(match[2]), float(match[3]) if match[3] else None
        found[size] = value if error is None else {"value": value, "low": value - error, "high": value + error}
    return found


def _drafter_size(
    drafter: str,
    bandwidth_gb_s: float | None,
    launch_overhead_ms: float,
    times_floor: float,
    dtype: str,
    experts_dtype: str | None,
    experts_per_token: int | None,
) -> DrafterSize | None:
    """Size of a drafter whose times are derived; None where they are given."""
    if bandwidth_gb_s is None:
        if (
            drafter != PUBLISHED
            or launch_overhead_ms
            or times_floor != 1
            or experts_dtype
            or experts_per_token is not None
        ):
            raise ArgumentError(
                "--drafter, --launch-overhead-ms, --times-floor, --experts-dtype and --experts-per-token are about "
                "derived times; give --bandwidth-gb-s, or leave them out"
            )
        return None
    if dtype not in TORCH_DTYPES:
        raise ArgumentError(f"--dtype {dtype!r} is not allowed; give one of {', '.join(TORCH_DTYPES)}")
    config = PUBLISHED_SIZE if drafter == PUBLISHED else TwoTowerConfig.from_pretrained(drafter)
    config, itemsize = config.with_experts_dtype(experts_dtype), TORCH_DTYPES[dtype].itemsize
    return DrafterSize(config, bandwidth_gb_s, itemsize, launch_overhead_ms, times_floor, experts_per_token)


def _predictions(
    model: CostModel, batch_sizes: Sequence[int], num_drafts: Sequence[int], wanted: tuple[str | int | None, ...]
) -> tuple[list[Prediction], list[ArgumentError]]:
    """Predicts what was asked and can be, load by load, and keeps the reasons why the rest cannot.

    Args:
        model: that predicts.
        batch_sizes: requests at once.
        num_drafts: K; empty for those that were measured.
        wanted: category, block size and steps; None for all.

    Raises:
        ArgumentError: nothing can be predicted.
    """
    known = model.profile.acceptance_lengths
    found, failures = [], []
    for one in known:
        setting, most = one.setting, one.setting.num_speculative_tokens
        own = (one.category, setting.block_size, setting.steps_per_block)
        if any(value not in (None, its) for value, its in zip(wanted, own, strict=True)):
            continue
        sizes = [size for size in batch_sizes if one.batch_size in (None, size)]
        for size, k in product(sizes, [k for k in num_drafts or [most] if k <= most]):
            try:
                found.append(model.predict(size, one, k))
            except ArgumentError as error:
                failures.append(error)
    if not found and failures:
        raise failures[0]
    if not found:
        names = "; ".join(sorted({f"{one.category}: {one.setting.name}" for one in known}))
        raise ArgumentError(f"no acceptance length is known for what was asked; known are {names or 'none'}")
    found.sort(key=lambda one: one.setting.num_speculative_tokens)
    return sorted(found, key=lambda one: (one.load, one.setting.block_size, one.setting.steps_per_block)), failures
