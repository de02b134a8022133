"""What was measured about a verifier, a drafter and a load, in one JSON file: `plan --profile` reads it."""

from __future__ import annotations

import json
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from twotower_bench.records import DraftSetting
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError

FORMAT = 1
T = TypeVar("T")


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval. In JSON a plain number where there is none, else value, low and high.

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

    def to_json(self) -> Any:
        """See the class."""
        return self.value if self.low is None else {"value": self.value, "low": self.low, "high": self.high}


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
    ms: Estimate

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
    extend_ms: Estimate
    denoise_ms: Estimate
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
        by_position: share of rounds that accepted the draft at each position, as in `DraftingReport`; may be empty.

    Raises:
        ArgumentError: a number is out of range, or they contradict each other.
    """

    category: str
    setting: DraftSetting
    length: Estimate
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

    def of_first(self, num_speculative_tokens: int) -> float:
        """Acceptance length if only the first drafts of each block are verified.

        From `by_position`, or else as if every draft had the same chance to be accepted after those before it.

        Raises:
            ArgumentError: more drafts than were measured.
        """
        most = self.setting.num_speculative_tokens
        if not 1 <= num_speculative_tokens <= most:
            raise ArgumentError(
                f"K {num_speculative_tokens} is outside what was measured, 1 to {most} drafts of a block of "
                f"{self.setting.block_size}; measure the acceptance length of longer drafts"
            )
        if num_speculative_tokens == most:
            return self.length.value
        if self.by_position:
            # The mean and the shares may come from two counts that differ by the ends of texts.
            gained = sum(self.by_position)
            scale = (self.length.value - 1) / gained if gained else 0.0
            return 1 + scale * sum(self.by_position[:num_speculative_tokens])
        return _geometric(_constant_rate(self.length.value, most), num_speculative_tokens)


@dataclass(frozen=True)
class MeasuredCell:
    """Tokens per second that were measured, for the cost model to be held against.

    Attributes:
        category: kind of prompts.
        batch_size: requests at once; at most, with `mean_batch_size`.
        setting: how blocks were drafted; None for no drafting.
        tokens_per_s: of the whole batch.
        temperature: of the verifier's text.
        new_tokens: per request, where whole requests were timed; None where decoding alone was.
        first_token_ms: time to the first token: of a step that reads prompts, those of the whole batch or one; None
            where not known, and then counted as one plain step.
        prompt_steps: steps that read prompts, per request: 1 where no two begin together; None where a whole batch
            does.
        mean_batch_size: requests in a step on average, where the batch was not full all the time; None where it was.
        unused_tokens: per request, that its last round gained beyond the end of its text; None where not known, and
            then counted as half a round.

    Raises:
        ArgumentError: a number is out of range.
    """

    category: str
    batch_size: int
    setting: DraftSetting | None
    tokens_per_s: Estimate
    temperature: float = 0.0
    new_tokens: float | None = None
    first_token_ms: float | None = None
    prompt_steps: float | None = None
    mean_batch_size: float | None = None
    unused_tokens: float | None = None

    def __post_init__(self) -> None:
        check_integer("batch_size", self.batch_size, minimum=1)
        if self.prompt_steps is not None and not 0 < self.prompt_steps <= 1:
            raise ArgumentError(f"prompt_steps {self.prompt_steps} is not allowed; give more than 0 and at most 1")
        if self.mean_batch_size is not None and not 1 <= self.mean_batch_size <= self.batch_size:
            raise ArgumentError(
                f"mean_batch_size {self.mean_batch_size} is not from 1 to batch_size {self.batch_size}; correct it"
            )
        if self.new_tokens is not None and not 1 <= self.new_tokens < math.inf:
            raise ArgumentError(f"new_tokens {self.new_tokens} is not allowed; give 1 or more, or null")
        if self.unused_tokens is not None and not 0 <= self.unused_tokens < math.inf:
            raise ArgumentError(f"unused_tokens {self.unused_tokens} is not allowed; give 0 or more, or null")
        if self.first_token_ms is not None:
            check_positive("first_token_ms", self.first_token_ms)


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

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {f.name: _plain(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, raw: Any) -> ServingProfile:
        """From what `to_json` gives.

        Raises:
            ArgumentError: something is missing, unknown or of the wrong type; with its place.
        """
        profile: ServingProfile = _read(cls, raw, "profile")
        return profile

    def save(self, path: Path) -> None:
        """Writes it."""
        path.write_text(json.dumps(self.to_json(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> ServingProfile:
        """Reads a file.

        Raises:
            ArgumentError: it cannot be read, or is no profile.
        """
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArgumentError(f"profile {path} cannot be read ({error}); give a file of this command's format") from (
                error
            )
        try:
            return cls.from_json(raw)
        except ArgumentError as error:
            raise ArgumentError(f"{path}: {error}") from error


def check_positive(name: str, value: float) -> None:
    """Refuses what is not a positive finite number.

    Raises:
        ArgumentError: with the name and value.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ArgumentError(f"{name} {value!r} is not allowed; give a number above 0")


def _geometric(rate: float, num_drafts: int) -> float:
    return sum(rate**i for i in range(num_drafts + 1))


def _constant_rate(length: float, num_drafts: int) -> float:
    """The acceptance rate that gives this length, by bisection.

    Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", equation 1.
    """
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _geometric(middle, num_drafts) < length else (low, middle)
    return high


def _plain(value: Any) -> Any:
    if isinstance(value, Estimate):
        return value.to_json()
    if is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return dict(value) if isinstance(value, Mapping) else value


def _read(kind: Any, raw: Any, where: str) -> Any:
    """A value of the annotated type from JSON; `where` is its place."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return None if raw is None else _read(arguments[0], raw, where)
    if origin is tuple:
        _expect(isinstance(raw, list), raw, "a list", where)
        return tuple(_read(arguments[0], one, f"{where}[{i}]") for i, one in enumerate(raw))
    if origin is Literal:
        _expect(raw in arguments, raw, " or ".join(map(repr, arguments)), where)
        return raw
    if kind is Estimate and not isinstance(raw, Mapping):
        return _made(Estimate, {"value": _read(float, raw, where)}, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _read_object(kind, raw, where)
    if kind is float:
        _expect(isinstance(raw, int | float) and not isinstance(raw, bool), raw, "a number", where)
        return float(raw)
    if kind in (int, str):
        _expect(isinstance(raw, kind) and not isinstance(raw, bool), raw, f"a value of type {kind.__name__}", where)
        return raw
    _expect(isinstance(raw, Mapping), raw, "an object", where)
    return raw


def _read_object(kind: type[T], raw: Any, where: str) -> T:
    _expect(isinstance(raw, Mapping), raw, "an object", where)
    hints = get_type_hints(kind)
    unknown = sorted(set(raw) - set(hints))
    if unknown:
        raise ArgumentError(f"{where} has the unknown field {unknown[0]!r}; allowed are {', '.join(hints)}")
    return _made(kind, {name: _read(hints[name], value, f"{where}.{name}") for name, value in raw.items()}, where)


def _made(kind: type[T], values: dict[str, Any], where: str) -> T:
    try:
        return kind(**values)
    except ArgumentError as error:
        raise ArgumentError(f"{where}: {error}") from error
    except TypeError as error:  # of dataclass's __init__: a field is missing
        raise ArgumentError(f"{where}: {str(error).partition('() ')[2]}; add it") from error


def _expect(right: bool, raw: Any, what: str, where: str) -> None:
    if not right:
        raise ArgumentError(f"{where} is {raw!r}; give {what}")
