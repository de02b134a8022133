"""What was measured about a verifier, a drafter and a load, in one JSON file: `plan --profile` reads it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, ClassVar

from twotower_bench.records import DraftSetting
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError

FORMAT = 1


@dataclass(frozen=True)
class Measured:
    """A number and its 95 % interval, if that is known. In JSON a plain number where it is not.

    Attributes:
        value: positive.
        low, high: bounds, around the value, which of a few measurements are no more than their range; None where nobody
            knows.

    Raises:
        ArgumentError: it is not positive and finite, or outside its interval.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __post_init__(self) -> None:
        check_positive("value", self.value)
        if (self.low is None) != (self.high is None):
            raise ArgumentError(f"value {self.value} has one end of an interval; give both low and high, or neither")
        if self.low is not None and self.high is not None and not self.low <= self.value <= self.high < math.inf:
            raise ArgumentError(
                f"value {self.value} is outside its interval {self.low} to {self.high}; give low <= value <= high"
            )


class _NumberIsEnough:
    """Lets pydantic read a plain number where an object with value, low and high may stand."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], Any]) -> Any:
        from pydantic_core import core_schema

        def from_number(raw: Any) -> Any:
            return raw if isinstance(raw, Mapping) else {"value": raw}

        return core_schema.no_info_before_validator_function(from_number, handler(source))


MeasuredNumber = Annotated[Measured, _NumberIsEnough()]


@dataclass(frozen=True)
class VerifierStep:
    """Time of one step of the serving engine with the verifier, everything but drafting included.

    Attributes:
        batch_size: requests in it.
        num_tokens: that it reads per request: 1 in a plain step, 1 + K in one that verifies K drafts.
        ms: of the whole batch.
    """

    batch_size: int
    num_tokens: int
    ms: MeasuredNumber

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("num_tokens", self.num_tokens, minimum=1)


@dataclass(frozen=True)
class DraftingPhases:
    """Times of drafting one block, for the whole batch.

    Attributes:
        batch_size: requests in it.
        block_size: positions that are denoised.
        extend_ms: the context tower reads what was accepted.
        denoise_ms: one denoiser pass.
        host_ms: everything else, per round; 0 is allowed.
    """

    batch_size: int
    block_size: int
    extend_ms: MeasuredNumber
    denoise_ms: MeasuredNumber
    host_ms: float = 0.0

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, minimum=1)
        check_integer("block_size", self.block_size, minimum=1)
        if not 0 <= self.host_ms < math.inf:
            raise ArgumentError(f"host_ms {self.host_ms} is not allowed; give 0 or more")


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
        ArgumentError: a number is out of range, or they contradict each other.
    """

    category: str
    setting: DraftSetting
    length: MeasuredNumber
    temperature: float = 0.0
    batch_size: int | None = None
    num_draft_tokens: float | None = None
    denoiser_passes: float | None = None
    by_position: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        most = 1 + self.setting.num_speculative_tokens
        if not 1 <= self.length.value <= most:
            raise ArgumentError(
                f"acceptance length {self.length.value:g} is not possible with K {most - 1}; give a number from 1 to "
                f"{most}"
            )
        if self.num_draft_tokens is not None and not 0 <= self.num_draft_tokens <= most - 1:
            raise ArgumentError(f"num_draft_tokens {self.num_draft_tokens} is not from 0 to K {most - 1}; correct it")
        if self.denoiser_passes is not None and not 0 <= self.denoiser_passes < math.inf:
            raise ArgumentError(f"denoiser_passes {self.denoiser_passes} is not allowed; give 0 or more, or null")
        shares = self.by_position
        if shares and len(shares) != most - 1:
            raise ArgumentError(f"by_position has {len(shares)} shares for K {most - 1}; give one for every draft")
        if not all(0 <= later <= share <= 1 for share, later in pairwise((*shares, 0.0))):
            raise ArgumentError(f"by_position {list(shares)} does not fall from at most 1 to at least 0; correct it")


@dataclass(frozen=True)
class MeasuredCell:
    """Tokens per second that were measured.

    Attributes:
        category: kind of prompts.
        batch_size: requests at once, at most.
        setting: how blocks were drafted; None for no drafting.
        tokens_per_s: of the whole batch, prompts and the ends of texts included.
        temperature: of the verifier's text.
    """

    category: str
    batch_size: int
    setting: DraftSetting | None
    tokens_per_s: MeasuredNumber
    temperature: float = 0.0
    # Older files have more fields here.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "ignore"}

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, minimum=1)


@dataclass(frozen=True)
class ServingProfile:
    """All that was measured on one machine.

    Attributes:
        source: the command and date, or the document, that the numbers come from.
        machine: hardware, as `describe_machine` or `machine_info` have it.
        versions: of packages, and the commit.
        verifier_steps, drafting_phases, acceptance_lengths, measured_cells: see the classes.
        format: version of this layout.

    Raises:
        ArgumentError: the format is another one, or two entries stand for one place.
    """

    source: str
    machine: Mapping[str, Any] = field(default_factory=dict)
    versions: Mapping[str, Any] = field(default_factory=dict)
    verifier_steps: tuple[VerifierStep, ...] = ()
    drafting_phases: tuple[DraftingPhases, ...] = ()
    acceptance_lengths: tuple[AcceptanceLength, ...] = ()
    measured_cells: tuple[MeasuredCell, ...] = ()
    format: int = FORMAT
    # Entries inherit this: a misspelt field is refused instead of left out.
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {"extra": "forbid"}

    def __post_init__(self) -> None:
        if self.format != FORMAT:
            raise ArgumentError(f"format {self.format} of the profile is not known; this version reads {FORMAT}")
        steps = [(step.batch_size, step.num_tokens) for step in self.verifier_steps]
        phases = [(phase.batch_size, phase.block_size) for phase in self.drafting_phases]
        lengths = [(one.category, one.setting, one.temperature, one.batch_size) for one in self.acceptance_lengths]
        for name, places in (("verifier_steps", steps), ("drafting_phases", phases), ("acceptance_lengths", lengths)):
            twice = [place for i, place in enumerate(places) if place in places[:i]]
            if twice:
                raise ArgumentError(f"{name} has two entries for {twice[0]}; keep one")

    def measured_speed_up(
        self, category: str, temperature: float, batch_size: int, setting: DraftSetting
    ) -> float | None:
        """Tokens/s of a measured cell over those without drafting under the same load; None if one was not measured."""
        speeds = {
            one.setting: one.tokens_per_s.value
            for one in self.measured_cells
            if (one.category, one.temperature, one.batch_size) == (category, temperature, batch_size)
        }
        return speeds[setting] / speeds[None] if {setting, None} <= speeds.keys() else None

    def save(self, path: Path) -> None:
        """Writes it."""
        path.write_text(json.dumps(jsonable(self), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def parse(cls, text: str) -> ServingProfile:
        """Reads the text of a file.

        Raises:
            ArgumentError: something is missing, unknown or of the wrong type; with its place.
        """
        from pydantic import TypeAdapter, ValidationError  # where profiles are read: the command line imports this

        try:
            return TypeAdapter(cls).validate_json(text, strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place, reason = ".".join(map(str, ("profile", *first["loc"]))), first["msg"]
            if first["type"] == "value_error":  # of this file's own checks, which say what to give
                raise ArgumentError(f"{place}: {first['ctx']['error']}") from error
            if first["type"] == "unexpected_keyword_argument":
                reason = f"unknown field {first['loc'][-1]!r}"
            raise ArgumentError(f"{place}: {reason}; docs/planning.md has the fields") from error

    @classmethod
    def load(cls, path: Path) -> ServingProfile:
        """Reads a file.

        Raises:
            ArgumentError: it cannot be read, or is no profile.
        """
        try:
            return cls.parse(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"profile {path} cannot be read ({error}); give a file of this command's format") from (
                error
            )
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error


def jsonable(record: Any) -> Any:
    """A dataclass as JSON, where a number without an interval is a number."""

    def plain(items: list[tuple[str, Any]]) -> Any:
        values = dict(items)
        return values["value"] if values.keys() == {"value", "low", "high"} and values["low"] is None else values

    return asdict(record, dict_factory=plain)


def check_positive(name: str, value: float) -> None:
    """Refuses what is not a positive finite number.

    Raises:
        ArgumentError: with the name and value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} {value!r} is not allowed; give a number above 0")
