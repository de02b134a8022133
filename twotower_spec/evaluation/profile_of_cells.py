"""A serving profile of measured cells: what `plan --profile` reads, from what a sweep has measured."""

from __future__ import annotations

import heapq
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from twotower_spec.evaluation.serving import Drafting, ServedRequest, ServingCell
from twotower_spec.evaluation.serving_figures import acceptance_of
from twotower_spec.evaluation.serving_profile import (
    AcceptanceLength,
    DraftingPhases,
    DraftSetting,
    Estimate,
    MeasuredCell,
    ServingProfile,
    VerifierStep,
)

# A time of fewer steps says little.
FEWEST_STEPS = 3
# Of a number that was measured in several cells.
TAILS = (0.025, 0.975)
DIGITS = 5


@dataclass(frozen=True)
class Occupancy:
    """How full the batch was while requests followed each other: as one ended the next began.

    Attributes:
        num_steps: of the engine.
        mean_batch_size: requests per step; less than the concurrency since the last ones end one after the other.
        first_steps: of each request, the step that read its prompt, counted from 0.
    """

    num_steps: int
    mean_batch_size: float
    first_steps: tuple[int, ...]

    @property
    def num_prompt_steps(self) -> int:
        """Steps that read at least one prompt."""
        return len(set(self.first_steps))


def occupancy(requests: Sequence[ServedRequest], concurrency: int) -> Occupancy:
    """From the numbers of steps of all requests, which is all it takes.

    Args:
        requests: in the order of submission; at least one.
        concurrency: most at once.
    """
    free = [0] * concurrency
    first_steps = []
    lengths = [1 + len(one.num_accepted_tokens) for one in requests]
    for length in lengths:
        start = heapq.heappop(free)
        first_steps.append(start)
        heapq.heappush(free, start + length)
    return Occupancy(max(free), sum(lengths) / max(free), tuple(first_steps))


def serving_profile(
    cells: Sequence[ServingCell], source: str, machine: Mapping[str, Any], versions: Mapping[str, Any]
) -> ServingProfile:
    """All that cells say about no speculation and about TwoTower with known settings; other systems are left out.

    Intervals are the middle 95 % of the cells that a number comes from; those of acceptance lengths are over prompts.

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
    """Of full batches: plain steps of no speculation, and of TwoTower those that verify all K drafts of everyone."""
    times = defaultdict[tuple[int, int], list[tuple[float, ...]]](list)
    for cell in (*plain, *drafting):
        setting = cell.system.setting
        num_tokens = 1 + setting.num_speculative_tokens if setting else 1
        for steps in cell.steps:
            if (steps.num_reqs, steps.num_tokens) == (_batch_size(cell), num_tokens):
                times[steps.num_reqs, num_tokens].append(steps.seconds)
    return tuple(
        VerifierStep(*shape, _median_ms(cells))
        for shape, cells in sorted(times.items())
        if sum(map(len, cells)) >= FEWEST_STEPS
    )


def _median_ms(cells: Sequence[Sequence[float]]) -> Estimate:
    """Of all steps; the interval is that of the cells' own medians."""
    median = 1e3 * statistics.median(chain.from_iterable(cells))
    if len(cells) == 1:
        return Estimate(round(median, DIGITS))
    low, high = np.quantile([1e3 * statistics.median(seconds) for seconds in cells], TAILS).tolist()
    return _rounded(median, low, high)


def _drafting_phases(cells: Sequence[ServingCell]) -> tuple[DraftingPhases, ...]:
    """Of full batches and policies that always draft, by batch and block size."""
    phases = {phase: defaultdict[tuple[int, int], list[float]](list) for phase in ("extend", "denoise", "host")}
    for cell in cells:
        setting = _setting(cell)
        full = _batch_size(cell), 1 + setting.num_speculative_tokens
        for steps in cell.steps:
            if (steps.num_reqs, steps.num_tokens) == full and steps.denoiser_passes and setting.policy != "adaptive":
                for phase, seconds in steps.drafting_s.items():
                    times = steps.denoiser_passes if phase == "denoise" else len(steps.seconds)
                    phases[phase][_batch_size(cell), setting.block_size].append(1e3 * seconds / times)
    extend, denoise, host = phases.values()
    return tuple(
        DraftingPhases(
            *place, _estimate(extend[place]), _estimate(denoise[place]), round(statistics.median(host[place]), DIGITS)
        )
        for place in sorted(extend)
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
    figures = acceptance_of(requests)
    drafting = [cell.drafting for cell in cells if cell.drafting]
    if not figures.num_steps or not drafting:
        return None
    most, share = setting.num_speculative_tokens, figures.num_drafted_steps / figures.num_steps
    by_position = [round(share * one, DIGITS) for one in figures.by_position[:most]]
    length = figures.tokens_per_step
    return AcceptanceLength(
        category=category,
        setting=setting,
        length=_rounded(length.estimate, length.low, length.high),
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
    num_requests = sum(len(cell.requests) for cell in cells)
    return MeasuredCell(
        category=category,
        batch_size=batch_size,
        setting=setting,
        tokens_per_s=_estimate([cell.tokens_per_s for cell in cells]),
        temperature=temperature,
        new_tokens=round(sum(len(one.token_ids) for cell in cells for one in cell.requests) / num_requests, DIGITS),
        first_token_ms=round(statistics.median(first_ms), DIGITS),
        prompt_steps=round(sum(one.num_prompt_steps for one in full) / num_requests, DIGITS),
        mean_batch_size=round(statistics.fmean(one.mean_batch_size for one in full), DIGITS),
    )


def _first_token_s(requests: Sequence[ServedRequest], full: Occupancy) -> float:
    """Mean time of a step that reads prompts, however many."""
    times = defaultdict[int, list[float]](list)
    for request, step in zip(requests, full.first_steps, strict=True):
        times[step].append(request.first_token_s)
    return statistics.fmean(map(statistics.fmean, times.values()))


def _estimate(values: Iterable[float]) -> Estimate:
    """Median and the middle 95 %, of at least one value."""
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
