"""A serving profile of measured cells: what `plan --profile` reads, from what a sweep has measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from twotower_bench.occupancy import Occupancy, occupancy
from twotower_bench.records import DecodingSteps, Drafting, DraftSetting, ServedRequest, ServingCell
from twotower_bench.serving_profile import (
    AcceptanceLength,
    DraftingPhases,
    Estimate,
    MeasuredCell,
    ServingProfile,
    VerifierStep,
)
from twotower_bench.summary import acceptance_of

# A time of fewer steps says little.
FEWEST_STEPS = 3
# Of a number that was measured in several cells; of a few of them this is nearly the range.
TAILS = (0.025, 0.975)
DIGITS = 5
# Requests, and tokens that each reads or positions that are denoised.
Shape = tuple[int, int]
StepsByShape = Mapping[Shape, Sequence[DecodingSteps]]


def serving_profile(
    cells: Sequence[ServingCell], source: str, machine: Mapping[str, Any], versions: Mapping[str, Any]
) -> ServingProfile:
    """All that cells say about no speculation and about TwoTower with known settings; other systems are left out.

    Intervals are the middle 95 % of the cells that a number comes from, which of a few cells is nearly their range and
    no 95 % interval: it covers less. Those of acceptance lengths are bootstrap intervals over prompts.

    Args:
        cells: of one verifier, drafter and machine.
        source: command and date.
        machine, versions: that they were measured on.
    """
    plain = [cell for cell in cells if cell.system.speculative_config is None]
    drafting = [cell for cell in cells if cell.system.setting]
    baseline = [cell for cell in plain if cell.system.name == plain[0].system.name]
    return ServingProfile(
        source=source,
        machine=machine,
        versions=versions,
        verifier_steps=_verifier_steps(plain, drafting),
        drafting_phases=_drafting_phases(drafting),
        acceptance_lengths=_acceptance_lengths(drafting),
        measured_cells=_measured_cells([*baseline, *drafting]),
    )


def _batch_size(cell: ServingCell) -> int:
    return min(cell.load.concurrency, len(cell.requests))


def _setting(cell: ServingCell) -> DraftSetting:
    assert cell.system.setting is not None
    return cell.system.setting


def _verifier_steps(plain: Sequence[ServingCell], drafting: Sequence[ServingCell]) -> tuple[VerifierStep, ...]:
    """Plain steps of no speculation, and of TwoTower those that verify all K drafts of everyone."""
    full, tails = defaultdict[Shape, list[DecodingSteps]](list), defaultdict[Shape, list[DecodingSteps]](list)
    for cell in (*plain, *drafting):
        for steps in cell.steps:
            if steps.num_reqs < _batch_size(cell):
                tails[steps.num_reqs, steps.num_tokens].append(steps)
            elif steps.num_tokens == _most_tokens(cell):
                full[steps.num_reqs, steps.num_tokens].append(steps)
    return tuple(
        VerifierStep(*shape, _median_ms([steps.seconds for steps in found]))
        for shape, found in sorted(_with_tails(full, tails).items())
    )


def _most_tokens(cell: ServingCell) -> int:
    """That a request reads in a step."""
    return 1 + _setting(cell).num_speculative_tokens if cell.system.setting else 1


def _with_tails(full: StepsByShape, tails: StepsByShape) -> StepsByShape:
    """Steps of full batches, and where these are all larger, of batches that ran empty; rare shapes are left out."""
    full, tails = (
        {shape: steps for shape, steps in found.items() if sum(len(one.seconds) for one in steps) >= FEWEST_STEPS}
        for found in (full, tails)
    )
    smallest = min((size for size, _ in full), default=0)
    return {**full, **{(size, x): steps for (size, x), steps in tails.items() if size < smallest}}


def _median_ms(cells: Sequence[Sequence[float]]) -> Estimate:
    """Of all steps; the interval is the middle 95 % of the cells' own medians, nearly their range."""
    median = 1e3 * statistics.median(chain.from_iterable(cells))
    if len(cells) == 1:
        return Estimate(round(median, DIGITS))
    low, high = np.quantile([1e3 * statistics.median(seconds) for seconds in cells], TAILS).tolist()
    return _rounded(median, low, high)


def _drafting_phases(cells: Sequence[ServingCell]) -> tuple[DraftingPhases, ...]:
    """Of policies that always draft and steps in which everyone had K drafts, by batch and block size."""
    full, tails = defaultdict[Shape, list[DecodingSteps]](list), defaultdict[Shape, list[DecodingSteps]](list)
    for cell in cells:
        for steps in cell.steps:
            if steps.num_tokens == _most_tokens(cell) and steps.denoiser_passes and _setting(cell).policy != "adaptive":
                times = full if steps.num_reqs == _batch_size(cell) else tails
                times[steps.num_reqs, _setting(cell).block_size].append(steps)
    return tuple(_phases(*shape, steps) for shape, steps in sorted(_with_tails(full, tails).items()))


def _phases(batch_size: int, block_size: int, found: Sequence[DecodingSteps]) -> DraftingPhases:
    extend, denoise, host = (
        [
            1e3 * steps.drafting_s[phase] / (steps.denoiser_passes if phase == "denoise" else len(steps.seconds))
            for steps in found
        ]
        for phase in ("extend", "denoise", "host")
    )
    return DraftingPhases(
        batch_size, block_size, _estimate(extend), _estimate(denoise), round(statistics.median(host), DIGITS)
    )


def _acceptance_lengths(cells: Sequence[ServingCell]) -> tuple[AcceptanceLength, ...]:
    """By category of the requests and of the load, setting, temperature, and batch size where it matters."""
    groups = defaultdict[tuple[str, DraftSetting, float, int | None], list[ServingCell]](list)
    for cell in cells:
        setting = _setting(cell)
        # Where each block takes one pass, the batch changes nothing; else the slowest request of a batch decides.
        batch_size = None if setting.steps_per_block == 1 and setting.policy == "fixed" else _batch_size(cell)
        for category in {cell.load.category, *(one.category for one in cell.requests)}:
            groups[category, setting, cell.load.temperature, batch_size].append(cell)
    found = (_acceptance_length(*place, group) for place, group in groups.items())
    return tuple(sorted((one for one in found if one), key=_place))


def _acceptance_length(
    category: str, setting: DraftSetting, temperature: float, batch_size: int | None, cells: Sequence[ServingCell]
) -> AcceptanceLength | None:
    requests = [
        one for cell in cells for one in cell.requests if category in (cell.load.category, one.category)
    ]  # fmt: skip
    # Whole rounds: what goes beyond the end of a text is counted with the cell, as `unused_tokens`.
    figures = acceptance_of(requests, beyond_end=True)
    drafting = [cell.drafting for cell in cells if cell.drafting]
    if not figures.num_steps or not drafting:
        return None
    most, share = setting.num_speculative_tokens, figures.num_drafted_steps / figures.num_steps
    by_position = [round(share * one, DIGITS) for one in figures.by_position[:most]]
    length = figures.tokens_per_step
    return AcceptanceLength(
        category=category,
        setting=setting,
        length=_rounded(length.value, length.low, length.high),
        temperature=temperature,
        batch_size=batch_size,
        num_draft_tokens=round(share * figures.mean_draft_tokens, DIGITS),
        denoiser_passes=round(_passes_per_round(drafting), DIGITS),
        by_position=(*by_position, *[0.0] * (most - len(by_position))),
    )


def _passes_per_round(drafting: Sequence[Drafting]) -> float:
    """Of whole batches, which is what takes time."""
    return sum(one.denoiser_passes for one in drafting) / sum(one.rounds for one in drafting)


def _measured_cells(cells: Sequence[ServingCell]) -> tuple[MeasuredCell, ...]:
    repeats = defaultdict[tuple[str, int, DraftSetting | None, float], list[ServingCell]](list)
    for cell in cells:
        repeats[cell.load.category, _batch_size(cell), cell.system.setting, cell.load.temperature].append(cell)
    return tuple(
        _measured_cell(*place, group)
        for place, group in sorted(repeats.items(), key=lambda one: (one[0][0], one[0][3], one[0][1]))
    )


def _measured_cell(
    category: str, batch_size: int, setting: DraftSetting | None, temperature: float, cells: Sequence[ServingCell]
) -> MeasuredCell:
    full = [occupancy(cell.requests, batch_size) for cell in cells]
    first_ms = [1e3 * _first_token_s(cell.requests, one) for cell, one in zip(cells, full, strict=True)]
    requests = [one for cell in cells for one in cell.requests]
    return MeasuredCell(
        category=category,
        batch_size=batch_size,
        setting=setting,
        tokens_per_s=_estimate([cell.tokens_per_s for cell in cells]),
        temperature=temperature,
        new_tokens=round(statistics.fmean(len(one.token_ids) for one in requests), DIGITS),
        first_token_ms=round(statistics.median(first_ms), DIGITS),
        prompt_steps=round(sum(one.num_prompt_steps for one in full) / len(requests), DIGITS),
        mean_batch_size=round(statistics.fmean(one.mean_batch_size for one in full), DIGITS),
        unused_tokens=round(statistics.fmean(one.num_unused_tokens for one in requests), DIGITS),
    )


def _first_token_s(requests: Sequence[ServedRequest], full: Occupancy) -> float:
    """Mean time of a step that reads prompts, however many."""
    times = defaultdict[int, list[float]](list)
    for request, step in zip(requests, full.first_steps, strict=True):
        times[step].append(request.first_token_s)
    return statistics.fmean(map(statistics.fmean, times.values()))


def _estimate(values: Iterable[float]) -> Estimate:
    """Median and the middle 95 %, nearly the range of a few, of at least one value."""
    numbers = list(values)
    if len(numbers) == 1:
        return Estimate(round(numbers[0], DIGITS))
    return _rounded(statistics.median(numbers), *np.quantile(numbers, TAILS).tolist())


def _rounded(value: float, low: float, high: float) -> Estimate:
    value = round(value, DIGITS)
    return Estimate(value, min(round(low, DIGITS), value), max(round(high, DIGITS), value))


def _place(one: AcceptanceLength) -> tuple[Any, ...]:
    setting = one.setting
    return (
        one.category,
        one.temperature,
        setting.policy,
        setting.block_size,
        setting.steps_per_block,
        setting.num_speculative_tokens,
        setting.confidence_threshold or 0.0,
        setting.first_token,
        one.batch_size or 0,
    )
