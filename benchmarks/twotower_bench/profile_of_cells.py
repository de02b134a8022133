"""A serving profile of measured cells: what `plan --profile` reads, from what a sweep has measured."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from twotower_bench.plan import AcceptanceLength, DraftingPhases, Measured, ServingProfile, VerifierStep
from twotower_bench.records import DecodingSteps, DraftSetting, ServingCell
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
    drafting = [(cell, cell.system.setting) for cell in cells if cell.system.setting]
    full = [(one, steps) for cell, one in drafting for steps in _full_steps(cell, one.num_speculative_tokens)]
    verifying = [steps for cell in plain for steps in _full_steps(cell, 0)] + [steps for _, steps in full]
    known = [(one, steps) for one, steps in full if one.policy != "adaptive" and steps.denoiser_passes]
    alike = _grouped(
        ((category, one, cell.load.temperature, _batch_size_that_matters(cell, one)), cell)
        for cell, one in drafting
        for category in sorted({cell.load.category, *(request.category for request in cell.requests)})
    )
    return ServingProfile(
        source=source,
        machine=machine,
        versions=versions,
        verifier_steps=tuple(
            VerifierStep(*shape, _median_ms(group))
            for shape, group in _often(((steps.num_reqs, steps.num_tokens), steps) for steps in verifying)
        ),
        drafting_phases=tuple(
            _phases(*shape, group)
            for shape, group in _often(((steps.num_reqs, one.block_size), steps) for one, steps in known)
        ),
        acceptance_lengths=tuple(one for place, group in alike.items() for one in _acceptance_length(*place, group)),
    )


def _full_steps(cell: ServingCell, num_drafts: int) -> list[DecodingSteps]:
    """Steps in which the batch was full and every request had all drafts."""
    return [one for one in cell.steps if (one.num_reqs, one.num_tokens) == (_batch_size(cell), 1 + num_drafts)]


def _often(pairs: Iterable[tuple[K, DecodingSteps]]) -> list[tuple[K, list[DecodingSteps]]]:
    """Steps by shape, where there are enough to say something."""
    groups = sorted(_grouped(pairs).items())
    return [(shape, group) for shape, group in groups if sum(len(one.seconds) for one in group) >= FEWEST_STEPS]


def _median_ms(found: Sequence[DecodingSteps]) -> float | Measured:
    """Median of all steps; the interval is of the cells' own medians."""
    median = statistics.median(seconds for steps in found for seconds in steps.seconds)
    return _with_spread(1e3 * median, [1e3 * statistics.median(steps.seconds) for steps in found])


def _phases(batch_size: int, block_size: int, found: Sequence[DecodingSteps]) -> DraftingPhases:
    """Medians of the cells' means, per round and per denoiser pass."""
    extend, denoise, host = (
        [
            1e3 * steps.drafting_s[phase] / (steps.denoiser_passes if phase == "denoise" else len(steps.seconds))
            for steps in found
        ]
        for phase in ("extend", "denoise", "host")
    )
    extend_ms, denoise_ms = (_with_spread(statistics.median(cells), cells) for cells in (extend, denoise))
    return DraftingPhases(batch_size, block_size, extend_ms, denoise_ms, round(statistics.median(host), DIGITS))


def _acceptance_length(
    category: str, setting: DraftSetting, temperature: float, batch_size: int | None, cells: Sequence[ServingCell]
) -> Iterator[AcceptanceLength]:
    """The length of one place, or nothing where nothing was drafted."""
    requests = [one for cell in cells for one in cell.requests if category in (cell.load.category, one.category)]
    found = acceptance_of(requests, beyond_end=True)  # whole rounds: a text's end is not the drafter's choice
    drafting = [cell.drafting for cell in cells if cell.drafting]
    if not found.num_steps or not drafting:
        return
    most, share = setting.num_speculative_tokens, found.num_drafted_steps / found.num_steps
    by_position = [round(share * one, DIGITS) for one in found.by_position[:most]]
    # Passes of whole batches are what takes time.
    passes = sum(one.denoiser_passes for one in drafting) / sum(one.rounds for one in drafting)
    length = found.tokens_per_step
    yield AcceptanceLength(
        category=category,
        setting=setting,
        length=_rounded(length.value, length.low, length.high),
        temperature=temperature,
        batch_size=batch_size,
        num_draft_tokens=round(share * found.mean_draft_tokens, DIGITS),
        denoiser_passes=round(passes, DIGITS),
        by_position=(*by_position, *[0.0] * (most - len(by_position))),
    )


def _batch_size(cell: ServingCell) -> int:
    return min(cell.load.concurrency, len(cell.requests))


def _batch_size_that_matters(cell: ServingCell, setting: DraftSetting) -> int | None:
    """Batch size where the slowest request decides how many passes a block takes; None where it is always one."""
    return None if setting.steps_per_block == 1 and setting.policy == "fixed" else _batch_size(cell)


def _grouped(pairs: Iterable[tuple[K, V]]) -> dict[K, list[V]]:
    groups = defaultdict[K, list[V]](list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _with_spread(value: float, cells: Sequence[float]) -> float | Measured:
    """A number with the middle 95 % of the cells' own; without an interval where there is one cell."""
    return round(value, DIGITS) if len(cells) == 1 else _rounded(value, *np.quantile(cells, TAILS).tolist())


def _rounded(*value_low_high: float) -> Measured:
    value, low, high = (round(one, DIGITS) for one in value_low_high)
    return Measured(value, min(low, value), max(high, value))
