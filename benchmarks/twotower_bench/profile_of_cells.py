"""A serving profile of measured cells: what `plan --profile` reads, from what a sweep has measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from twotower_bench.records import DecodingSteps, DraftSetting, ServingCell
from twotower_bench.serving_profile import (
    AcceptanceLength,
    DraftingPhases,
    Measured,
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
K = TypeVar("K")
V = TypeVar("V")


def serving_profile(
    cells: Sequence[ServingCell], source: str, machine: Mapping[str, Any], versions: Mapping[str, Any]
) -> ServingProfile:
    """Collects what cells say about no speculation and about TwoTower with known settings; other systems are left out.

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
        verifier_steps=_verifier_steps([*plain, *drafting]),
        drafting_phases=_drafting_phases(drafting),
        acceptance_lengths=_acceptance_lengths(drafting),
        measured_cells=_measured_cells([*baseline, *drafting]),
    )


def _verifier_steps(cells: Sequence[ServingCell]) -> tuple[VerifierStep, ...]:
    """Plain steps of no speculation, and of TwoTower those that verify all K drafts of everyone."""
    found = _grouped(((steps.num_reqs, steps.num_tokens), steps) for cell in cells for steps in _full_steps(cell))
    return tuple(
        VerifierStep(*shape, _median_ms([steps.seconds for steps in group]))
        for shape, group in sorted(found.items())
        if _are_enough(group)
    )


def _drafting_phases(cells: Sequence[ServingCell]) -> tuple[DraftingPhases, ...]:
    """Means over policies that always draft and steps in which everyone had K drafts, by batch and block size."""
    found = _grouped(
        ((steps.num_reqs, _setting(cell).block_size), steps)
        for cell in cells
        if _setting(cell).policy != "adaptive"
        for steps in _full_steps(cell)
        if steps.denoiser_passes
    )
    return tuple(_phases(*shape, group) for shape, group in sorted(found.items()) if _are_enough(group))


def _phases(batch_size: int, block_size: int, found: Sequence[DecodingSteps]) -> DraftingPhases:
    extend, denoise, host = (
        [
            1e3 * steps.drafting_s[phase] / (steps.denoiser_passes if phase == "denoise" else len(steps.seconds))
            for steps in found
        ]
        for phase in ("extend", "denoise", "host")
    )
    return DraftingPhases(
        batch_size, block_size, _measured(extend), _measured(denoise), round(statistics.median(host), DIGITS)
    )


def _full_steps(cell: ServingCell) -> list[DecodingSteps]:
    """Steps in which the batch was full and every request had all drafts."""
    num_tokens = 1 + _setting(cell).num_speculative_tokens if cell.system.setting else 1
    return [one for one in cell.steps if (one.num_reqs, one.num_tokens) == (_batch_size(cell), num_tokens)]


def _are_enough(found: Sequence[DecodingSteps]) -> bool:
    return sum(len(steps.seconds) for steps in found) >= FEWEST_STEPS


def _median_ms(cells: Sequence[Sequence[float]]) -> Measured:
    """Median of all steps; the interval is the middle 95 % of the cells' own medians, nearly their range."""
    median = 1e3 * statistics.median(chain.from_iterable(cells))
    return _with_spread(median, [1e3 * statistics.median(seconds) for seconds in cells])


def _acceptance_lengths(cells: Sequence[ServingCell]) -> tuple[AcceptanceLength, ...]:
    """Lengths by category of the requests and of the load, setting, temperature, and batch size where it matters."""
    found = _grouped(
        ((category, _setting(cell), cell.load.temperature, _batch_size_that_matters(cell)), cell)
        for cell in cells
        for category in {cell.load.category, *(one.category for one in cell.requests)}
    )
    lengths = (_acceptance_length(*place, group) for place, group in found.items())
    return tuple(sorted((one for one in lengths if one), key=_place))


def _acceptance_length(
    category: str, setting: DraftSetting, temperature: float, batch_size: int | None, cells: Sequence[ServingCell]
) -> AcceptanceLength | None:
    requests = [
        one for cell in cells for one in cell.requests if category in (cell.load.category, one.category)
    ]  # fmt: skip
    figures = acceptance_of(requests, beyond_end=True)  # whole rounds: a text's end is not the drafter's choice
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
        # Passes of whole batches are what takes time.
        denoiser_passes=round(
            sum(one.denoiser_passes for one in drafting) / sum(one.rounds for one in drafting), DIGITS
        ),
        by_position=(*by_position, *[0.0] * (most - len(by_position))),
    )


def _measured_cells(cells: Sequence[ServingCell]) -> tuple[MeasuredCell, ...]:
    repeats = _grouped(
        ((cell.load.category, cell.load.temperature, _batch_size(cell), cell.system.setting), cell.tokens_per_s)
        for cell in cells
    )
    return tuple(
        MeasuredCell(category, batch_size, setting, _measured(rates), temperature)
        for (category, temperature, batch_size, setting), rates in sorted(repeats.items(), key=lambda one: one[0][:3])
    )


def _batch_size(cell: ServingCell) -> int:
    return min(cell.load.concurrency, len(cell.requests))


def _batch_size_that_matters(cell: ServingCell) -> int | None:
    """Batch size where the slowest request decides how many passes a block takes; None where it is always one."""
    setting = _setting(cell)
    return None if setting.steps_per_block == 1 and setting.policy == "fixed" else _batch_size(cell)


def _setting(cell: ServingCell) -> DraftSetting:
    assert cell.system.setting is not None
    return cell.system.setting


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


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups = defaultdict[K, list[V]](list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _measured(values: Sequence[float]) -> Measured:
    return _with_spread(statistics.median(values), values)


def _with_spread(value: float, cells: Sequence[float]) -> Measured:
    """A number with the middle 95 % of the cells' own; without an interval where there is one cell."""
    if len(cells) == 1:
        return Measured(round(value, DIGITS))
    return _rounded(value, *np.quantile(cells, TAILS).tolist())


def _rounded(value: float, low: float, high: float) -> Measured:
    value = round(value, DIGITS)
    return Measured(value, min(round(low, DIGITS), value), max(round(high, DIGITS), value))
