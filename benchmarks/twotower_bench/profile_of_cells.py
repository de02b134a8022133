"""A serving profile of measured cells: what `plan --profile` reads, from what a sweep has measured."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from twotower_bench.plan import AcceptanceLength, DraftingPhases, Measured, ServingProfile, VerifierStep
from twotower_bench.records import DecodingSteps, DraftSetting, ServingCell
from twotower_bench.summary import acceptance_of

# A time of fewer steps says little.
FEWEST_STEPS = 3
# Of a number that was measured in several cells; of a few of them this is nearly the range.
TAILS = (0.025, 0.975)
DIGITS = 5


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
    shapes: dict[tuple[int, int], list[DecodingSteps]] = {}
    blocks: dict[tuple[int, int], list[DecodingSteps]] = {}
    lengths: dict[tuple[str, DraftSetting, float, int | None], list[ServingCell]] = {}
    for cell in cells:
        setting, batch_size = cell.system.setting, min(cell.load.concurrency, len(cell.requests))
        if setting is None and cell.system.speculative_config is not None:
            continue
        # Steps in which the batch was full and every request had all drafts.
        shape = batch_size, 1 + (setting.num_speculative_tokens if setting else 0)
        full = [one for one in cell.steps if (one.num_reqs, one.num_tokens) == shape]
        shapes.setdefault(shape, []).extend(full)
        if setting is None:
            continue
        if setting.policy != "adaptive":
            own = blocks.setdefault((batch_size, setting.block_size), [])
            own += [one for one in full if one.denoiser_passes]
        # The slowest request decides how many passes a block takes, where it is not always one.
        is_one_pass = setting.steps_per_block == 1 and setting.policy == "fixed"
        for category in sorted({cell.load.category, *(request.category for request in cell.requests)}):
            place = category, setting, cell.load.temperature, None if is_one_pass else batch_size
            lengths.setdefault(place, []).append(cell)
    return ServingProfile(
        source=source,
        machine=machine,
        versions=versions,
        verifier_steps=tuple(VerifierStep(*shape, _median_ms(steps)) for shape, steps in _often(shapes)),
        drafting_phases=tuple(_phases(*block, steps) for block, steps in _often(blocks)),
        acceptance_lengths=tuple(one for place, group in lengths.items() for one in _acceptance_length(*place, group)),
    )


def _often(found: Mapping[tuple[int, int], list[DecodingSteps]]) -> list[tuple[tuple[int, int], list[DecodingSteps]]]:
    """Steps by shape, where there are enough to say something."""
    enough = {shape for shape, steps in found.items() if sum(len(one.seconds) for one in steps) >= FEWEST_STEPS}
    return [(shape, found[shape]) for shape in sorted(enough)]


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


def _with_spread(value: float, cells: Sequence[float]) -> float | Measured:
    """A number with the middle 95 % of the cells' own; without an interval where there is one cell."""
    return round(value, DIGITS) if len(cells) == 1 else _rounded(value, *np.quantile(cells, TAILS).tolist())


def _rounded(*value_low_high: float) -> Measured:
    value, low, high = (round(one, DIGITS) for one in value_low_high)
    return Measured(value, min(low, value), max(high, value))
