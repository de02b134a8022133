"""Numbers of `twotower-spec plan` as they are typed, for several batch sizes, block sizes and steps at once."""

from __future__ import annotations

import re
from dataclasses import dataclass

from twotower_bench.records import ALL_CATEGORIES, DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, DraftingPhases, Measured, ServingProfile, VerifierStep
from twotower_spec.errors import ArgumentError

_NUMBER = r"(\d+\.?\d*|\.\d+)"
_ENTRY = re.compile(rf"(?:(\d+(?:x\d+)?):)?{_NUMBER}(?:\+-{_NUMBER})?")
Place = tuple[int, ...]


@dataclass(frozen=True)
class Asked:
    """Loads and blocks that were asked for; None for all that are known."""

    batch_sizes: tuple[int, ...] | None
    block_sizes: tuple[int, ...] | None
    steps: tuple[int, ...] | None
    num_speculative_tokens: tuple[int, ...] | None


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
        """Makes a profile of the typed numbers.

        Args:
            asked: tells which load and block a single number is about.
            host_ms: of a drafting round.
            derived_drafter: whether the drafter's times come from its size.

        Raises:
            ArgumentError: one is missing or not understood.
        """
        if self.verifier_step_ms is None or self.verify_step_ms is None:
            raise ArgumentError(
                "--verifier-step-ms and --verify-step-ms are missing; give both as measured or assumed, or --profile"
            )
        if derived_drafter and (self.context_pass_ms or self.denoiser_step_ms or host_ms):
            raise ArgumentError(
                "--bandwidth-gb-s derives what --context-pass-ms, --denoiser-step-ms and --host-ms give; leave one out"
            )
        most = max(asked.num_speculative_tokens or (15,))
        batch = ("--batch-size", asked.batch_sizes or (1,))
        block = ("--block-size", asked.block_sizes or (max(16, most),))
        steps = ("--steps-per-block", asked.steps or (1,))
        plain = _numbers("--verifier-step-ms", self.verifier_step_ms, "BATCH", batch)
        verify = _numbers("--verify-step-ms", self.verify_step_ms, "BATCHxTOKENS", batch, ("-K", (1 + most,)))
        return ServingProfile(
            source="command line",
            verifier_steps=(
                *(VerifierStep(size, 1, ms) for (size,), ms in plain.items()),
                *(VerifierStep(size, num_tokens, ms) for (size, num_tokens), ms in verify.items()),
            ),
            drafting_phases=() if derived_drafter else self._phases(batch, block, host_ms),
            acceptance_lengths=self._acceptance_lengths(block, steps, most),
        )

    def _phases(self, batch: tuple[str, Place], block: tuple[str, Place], host_ms: float) -> tuple[DraftingPhases, ...]:
        if self.context_pass_ms is None or self.denoiser_step_ms is None:
            raise ArgumentError(
                "the drafter's times are missing; give --context-pass-ms and --denoiser-step-ms, or --bandwidth-gb-s "
                "to derive them, or --profile"
            )
        extend = _numbers("--context-pass-ms", self.context_pass_ms, "BATCHxBLOCK", batch, block)
        denoise = _numbers("--denoiser-step-ms", self.denoiser_step_ms, "BATCHxBLOCK", batch, block)
        if extend.keys() != denoise.keys():
            raise ArgumentError(
                "--context-pass-ms and --denoiser-step-ms differ in batch and block sizes; give the same"
            )
        return tuple(
            DraftingPhases(size, block_size, ms, denoise[size, block_size], host_ms)
            for (size, block_size), ms in extend.items()
        )

    def _acceptance_lengths(
        self, block: tuple[str, Place], steps: tuple[str, Place], most: int
    ) -> tuple[AcceptanceLength, ...]:
        option, shares = "--acceptance-length", _shares(self.acceptance_by_position)
        if self.acceptance_length is not None:
            found = _numbers(option, self.acceptance_length, "BLOCKxSTEPS", block, steps)
        elif shares:
            found = {(_only(option, *block), _only(option, *steps)): Measured(1 + sum(shares))}
        else:
            raise ArgumentError("--acceptance-length is missing; give it, or --acceptance-by-position, or --profile")
        return tuple(
            AcceptanceLength(
                ALL_CATEGORIES, DraftSetting(min(len(shares) or most, size), size, passes), length, by_position=shares
            )
            for (size, passes), length in found.items()
        )


def _numbers(option: str, text: str, form: str, *alone: tuple[str, Place]) -> dict[Place, Measured]:
    """Reads numbers by place: `1:12.7,8:19.0+-0.5` or `1x8:13.1`, or `12.7` where there is only one place.

    Args:
        option, text: as typed.
        form: of a place.
        alone: for every part of it, the option that has it and what that says, for a number without a place.
    """
    found: dict[Place, Measured] = {}
    for part in map(str.strip, text.split(",")):
        match = _ENTRY.fullmatch(part)
        if match is None or (match[1] and match[1].count("x") != form.count("x")):
            raise ArgumentError(f"{option} {part!r} is not understood; give 12.7, 12.7+-0.3 or {form}:12.7")
        place = tuple(map(int, match[1].split("x"))) if match[1] else tuple(_only(option, *one) for one in alone)
        if place in found:
            raise ArgumentError(f"{option} {text!r} has two numbers for one place; give one")
        value = float(match[2])
        ends: tuple[float | None, float | None] = (None, None)
        if match[3] is not None:
            ends = (value - float(match[3]), value + float(match[3]))
        try:
            found[place] = Measured(value, *ends)
        except ArgumentError as wrong:
            raise ArgumentError(f"{option}: {wrong}") from wrong
    return found


def _only(option: str, of: str, values: Place) -> int:
    if len(values) != 1:
        raise ArgumentError(
            f"{option} is one number, but {of} has several; give {option} for each of them (see --help)"
        )
    return values[0]


def integers(option: str, text: str | None) -> tuple[int, ...] | None:
    """Reads `1,8`; None if not given.

    Raises:
        ArgumentError: it is not like that.
    """
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
