"""Numbers of `twotower-spec plan` as they are typed, for several batch sizes, block sizes and steps at once."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from twotower_bench.records import ALL_CATEGORIES, DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, DraftingPhases, Estimate, ServingProfile, VerifierStep
from twotower_spec.errors import ArgumentError

# The category of an acceptance length that was typed.
TYPED = "all"
_NUMBER = r"(\d+\.?\d*|\.\d+)"
_ENTRY = re.compile(rf"(?:(\d+)(?:x(\d+))?:)?{_NUMBER}(?:\+-{_NUMBER})?")


@dataclass(frozen=True)
class Asked:
    """What predictions are wanted of; None for everything that is known.

    Attributes:
        batch_sizes, block_sizes, steps, num_speculative_tokens: of blocks and loads.
        category: of the prompts.
        measured_only: whether fewer drafts than were measured are left out unless they are asked for.
    """

    batch_sizes: tuple[int, ...] | None
    block_sizes: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    num_speculative_tokens: tuple[int, ...] | None
    category: str | None
    measured_only: bool = False

    def with_defaults(self) -> Asked:
        """Without a profile nothing is known."""
        most = max(self.num_speculative_tokens or (15,))
        sizes = self.block_sizes or (max(16, most),)
        return replace(self, batch_sizes=self.batch_sizes or (1,), block_sizes=sizes, steps=self.steps or (1,))

    def of_measured(self, given: ServingProfile) -> Asked:
        """Of a profile without more being asked: prompts of all kinds together, batch sizes and drafts as measured."""
        categories = {one.category for one in given.acceptance_lengths}
        category = ALL_CATEGORIES if self.category is None and ALL_CATEGORIES in categories else self.category
        return replace(self, category=category, measured_only=True)


@dataclass(frozen=True)
class TypedNumbers:
    """Options as they were typed; None where not given."""

    verifier_step_ms: str | None
    verify_step_ms: str | None
    context_pass_ms: str | None
    denoiser_step_ms: str | None
    acceptance_length: str | None
    acceptance_by_position: str | None

    def refuse(self, reason: str) -> None:
        """Raises `ArgumentError` if any was given."""
        for name, value in vars(self).items():
            if value is not None:
                raise ArgumentError(f"--{name.replace('_', '-')} {value!r} {reason}; leave one of them out")

    def as_profile(self, asked: Asked, host_ms: float, derived_drafter: bool) -> ServingProfile:
        """What they say.

        Args:
            asked: what predictions are wanted of; tells what a single number is about.
            host_ms: of a drafting round.
            derived_drafter: whether the drafter's times come from its size.

        Raises:
            ArgumentError: one is missing or not understood.
        """
        asked = asked.with_defaults()
        if derived_drafter and (self.context_pass_ms or self.denoiser_step_ms or host_ms):
            raise ArgumentError(
                "--bandwidth-gb-s derives what --context-pass-ms, --denoiser-step-ms and --host-ms give; leave one out"
            )
        return ServingProfile(
            source="command line",
            verifier_steps=_verifier_steps(asked, self.verifier_step_ms, self.verify_step_ms),
            drafting_phases=()
            if derived_drafter
            else _phases(asked, self.context_pass_ms, self.denoiser_step_ms, host_ms),
            acceptance_lengths=_acceptance_lengths(asked, self.acceptance_length, self.acceptance_by_position),
        )


def _verifier_steps(asked: Asked, plain: str | None, verify: str | None) -> tuple[VerifierStep, ...]:
    if plain is None or verify is None:
        raise ArgumentError(
            "--verifier-step-ms and --verify-step-ms are missing; give both as measured or assumed, or --profile"
        )
    most = 1 + max(asked.num_speculative_tokens or (15,))
    steps = []
    for option, text, num_tokens, places in (
        ("--verifier-step-ms", plain, 1, 1),
        ("--verify-step-ms", verify, most, 2),
    ):
        for place, ms in _entries(option, text):
            if len(place) not in (0, places):
                raise ArgumentError(
                    f"{option} {text!r} is not understood; give one number, or "
                    f"{'BATCH:ms' if places == 1 else 'BATCHxTOKENS:ms'}, with commas"
                )
            batch_size = place[0] if place else _only(option, "--batch-size", asked.batch_sizes)
            steps.append(VerifierStep(batch_size, place[1] if len(place) == 2 else num_tokens, ms))
    return tuple(steps)


def _phases(asked: Asked, context: str | None, denoiser: str | None, host_ms: float) -> tuple[DraftingPhases, ...]:
    if context is None or denoiser is None:
        raise ArgumentError(
            "the drafter's times are missing; give --context-pass-ms and --denoiser-step-ms, or --bandwidth-gb-s to "
            "derive them, or --profile"
        )
    extend = _by_batch_and_block("--context-pass-ms", context, asked)
    denoise = _by_batch_and_block("--denoiser-step-ms", denoiser, asked)
    if extend.keys() != denoise.keys():
        raise ArgumentError("--context-pass-ms and --denoiser-step-ms differ in batch and block sizes; give the same")
    return tuple(DraftingPhases(*place, extend[place], denoise[place], host_ms) for place in extend)


def _by_batch_and_block(option: str, text: str, asked: Asked) -> dict[tuple[int, int], Estimate]:
    times: dict[tuple[int, int], Estimate] = {}
    for place, ms in _entries(option, text):
        match place:
            case ():
                batch_size = _only(option, "--batch-size", asked.batch_sizes)
                times[batch_size, _only(option, "--block-size", asked.block_sizes)] = ms
            case (batch_size, block_size):
                times[batch_size, block_size] = ms
            case _:
                raise ArgumentError(f"{option} {text!r} is not understood; give one number, or BATCHxBLOCK:ms")
    return times


def _acceptance_lengths(asked: Asked, length: str | None, by_position: str | None) -> tuple[AcceptanceLength, ...]:
    shares = _shares(by_position)
    most = len(shares) or max(asked.num_speculative_tokens or (15,))
    if length is None and not shares:
        raise ArgumentError("--acceptance-length is missing; give it, or --acceptance-by-position, or --profile")
    entries: list[tuple[tuple[int, ...], Estimate]]
    entries = [((), Estimate(1 + sum(shares)))] if length is None else list(_entries("--acceptance-length", length))
    found = []
    for place, estimate in entries:
        if len(place) == 1:
            raise ArgumentError(
                f"--acceptance-length {length!r} is not understood; give one number, or BLOCKxSTEPS:tokens"
            )
        block_size, steps = place or (
            _only("--acceptance-length", "--block-size", asked.block_sizes),
            _only("--acceptance-length", "--steps-per-block", asked.steps),
        )
        setting = DraftSetting(min(most, block_size), block_size, steps)
        found.append(AcceptanceLength(TYPED, setting, estimate, by_position=shares))
    return tuple(found)


def _only(option: str, of: str, values: tuple[int, ...] | None) -> int:
    if values is None or len(values) != 1:
        raise ArgumentError(
            f"{option} is one number, but {of} has several; give {option} for each of them (see --help)"
        )
    return values[0]


def _entries(option: str, text: str) -> Iterator[tuple[tuple[int, ...], Estimate]]:
    """`12.7`, `1:12.7,8:19.0+-0.5` or `1x8:13.1`: places and numbers."""
    for part in text.split(","):
        match = _ENTRY.fullmatch(part.strip())
        if match is None:
            raise ArgumentError(f"{option} {part.strip()!r} is not understood; give 12.7, 12.7+-0.3 or 8:12.7")
        first, second, number, error = match.groups()
        value = float(number)
        interval = (value - float(error), value + float(error)) if error else (None, None)
        try:
            yield tuple(int(place) for place in (first, second) if place), Estimate(value, *interval)
        except ArgumentError as wrong:
            raise ArgumentError(f"{option}: {wrong}") from wrong


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    if text is None:
        return None
    try:
        values = tuple(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        values = ()
    if not values or min(values) < 1:
        raise ArgumentError(f"{option} {text!r} is not allowed; give integers of at least 1, with commas")
    return values


def _shares(text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ArgumentError(
            f"--acceptance-by-position {text!r} is not allowed; give shares from 1 to 0, with commas"
        ) from None
