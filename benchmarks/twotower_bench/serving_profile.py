"""Step times and acceptance lengths that `plan --profile` predicts from: the file, and how measured cells fill it."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from twotower_bench.records import DecodingSteps, DraftSetting, ServingCell, read_row
from twotower_bench.summary import acceptance_of
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import Estimate
from twotower_spec.files import write_atomically
from twotower_spec.reading import read_json

# A time of fewer steps says little.
FEWEST_STEPS = 3
# Of a number that was measured in several cells; of a few of them this is nearly the range.
TAILS = (0.025, 0.975)
DIGITS = 5

Count = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True)
class Measured(Estimate):
    """A number above 0 with its 95 % interval, which of a few measurements is no more than their range."""

    def __post_init__(self) -> None:
        if not (self.value > 0 and self.low <= self.value <= self.high < math.inf):
            raise ArgumentError(
                f"value {self.value} with interval {self.low} to {self.high} is not allowed; give 0 < value and low <= "
                f"value <= high"
            )


Number = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Measured


def value_of(number: Number) -> float:
    """A number without its interval."""
    return number.value if isinstance(number, Estimate) else number


@dataclass(frozen=True)
class VerifierStep:
    """Time of a step of the whole batch, drafting left out, in which every request reads 1 + its drafts."""

    batch_size: Count
    num_tokens: Count
    ms: Number


@dataclass(frozen=True)
class DraftingPhases:
    """Times of drafting for the whole batch: context pass, one denoiser pass, and everything else per round."""

    batch_size: Count
    block_size: Count
    extend_ms: Number
    denoise_ms: Number
    host_ms: NotNegative = 0.0


@dataclass(frozen=True)
class AcceptanceLength:
    """Tokens that a round gains: accepted drafts + 1.

    Attributes:
        category: kind of prompts.
        setting: how the blocks were drafted.
        length: per round, from 1 to 1 + K.
        temperature: of the verifier's text.
        batch_size: that it holds for; None for all, as where blocks take one pass: fixed with one step.
        num_draft_tokens: verified per round on average; None for K.
        denoiser_passes: of the whole batch, per round on average; None for `steps_per_block`.
        by_position: share of rounds that accepted the draft at each position, as in `DraftingSummary`; may be empty.

    Raises:
        ArgumentError: they contradict each other.
    """

    category: str
    setting: DraftSetting
    length: Number
    temperature: float = 0.0
    batch_size: int | None = None
    num_draft_tokens: NotNegative | None = None
    denoiser_passes: NotNegative | None = None
    by_position: tuple[Share, ...] = ()

    def __post_init__(self) -> None:
        most, length, shares = self.setting.num_speculative_tokens, value_of(self.length), self.by_position
        if not 1 <= length <= 1 + most:
            raise ArgumentError(
                f"acceptance length {length:g} is not possible with K {most}; give a number from 1 to {1 + most}"
            )
        if shares and (len(shares) != most or list(shares) != sorted(shares, reverse=True)):
            raise ArgumentError(
                f"by_position {list(shares)} is not allowed; give one share for each of {most} drafts, none above the "
                f"one before it"
            )


@dataclass(frozen=True)
class ServingProfile:
    """All that was measured on one machine, in one JSON file (docs/planning.md): `plan --profile` reads it."""

    source: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    verifier_steps: tuple[VerifierStep, ...] = ()
    drafting_phases: tuple[DraftingPhases, ...] = ()
    acceptance_lengths: tuple[AcceptanceLength, ...] = ()
    format: Literal[1] = 1

    def save(self, path: Path) -> None:
        """Writes it.

        Raises:
            ArgumentError: it cannot be written; the old one stays.
        """
        write_atomically(path, json.dumps(asdict(self), indent=1) + "\n", option="--profile")

    @classmethod
    def load(cls, path: Path) -> ServingProfile:
        """Reads a file; unknown fields are ignored.

        Raises:
            ArgumentError: it cannot be read, or something is missing or out of range.
        """
        raw = read_json(path, "profile", "give a file that bench sweep --profile wrote")
        return read_row(cls, raw, str(path), "a profile", "docs/planning.md has the fields")


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
