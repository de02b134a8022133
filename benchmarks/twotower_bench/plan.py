"""What drafting with TwoTower gains under a load, from step times and acceptance lengths, and whether it pays.

`speed_up` is the formula. `CostModel` takes its terms from times that were measured or assumed, or from the drafter's
size, and carries their doubt to the result; `advise` says what the result means.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from twotower_bench.drafter_size import DrafterSize
from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, DraftingPhases, Measured, VerifierStep
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import Estimate

# Two runs of one engine differ by as much (docs/benchmarks.md, A/A noise): a speed-up within it is none.
BAND = 0.02
# Where a smaller share of drafts is accepted, that is named as the reason, else what costs most.
FEW_ACCEPTED = 0.25


def speed_up(
    acceptance_length: float,
    plain_ms: float,
    verify_ms: float,
    extend_ms: float,
    denoise_ms: float,
    num_passes: float = 1.0,
    host_ms: float = 0.0,
) -> float:
    """Tokens per second with drafts over those without, under the same load.

        L t(1) / (t(1 + K) + extend + passes * denoise + host)

    A round with K drafts per request gains L tokens of each, in the time of the denominator; a plain step gains one, in
    t(1). All times are of the whole batch.

    Args:
        acceptance_length: L, accepted drafts + 1.
        plain_ms: t(1), a step in which the verifier reads one token per request.
        verify_ms: t(1 + K), a step in which it reads K drafts more.
        extend_ms: the context tower reads what was accepted.
        denoise_ms: one pass of the denoiser tower.
        num_passes: of the denoiser tower in a round.
        host_ms: all else that drafting takes in a round.
    """
    return acceptance_length * plain_ms / (verify_ms + extend_ms + num_passes * denoise_ms + host_ms)


@dataclass(frozen=True)
class Prediction:
    """One way to draft, under one load.

    Attributes:
        category, temperature: of the text.
        batch_size: requests at once.
        setting: how blocks are drafted.
        acceptance_length: tokens per round and request.
        plain_ms, verify_ms: a step without drafts, and one that verifies them.
        extend_ms, denoise_ms, host_ms: drafting, per round.
        tokens_per_s, plain_tokens_per_s: of the whole batch, with drafting and without.
        speed_up: their ratio.
        break_even_length: acceptance length at which it is 1.
        measured_speed_up: beside it, where somebody measured it.
    """

    category: str
    temperature: float
    batch_size: int
    setting: DraftSetting
    acceptance_length: Estimate
    plain_ms: float
    verify_ms: float
    extend_ms: float
    denoise_ms: float
    host_ms: float
    tokens_per_s: Estimate
    plain_tokens_per_s: Estimate
    speed_up: Estimate
    break_even_length: float
    measured_speed_up: float | None = None

    @property
    def drafting_ms(self) -> float:
        """All three phases."""
        return self.extend_ms + self.denoise_ms + self.host_ms

    @property
    def load(self) -> tuple[str, float, int]:
        """Category, temperature and batch size: ways to draft are compared under the same."""
        return self.category, self.temperature, self.batch_size


# What a number is, and where: batch size, and tokens per request or block size.
Number = tuple[str, int, int]
Numbers = Mapping[Number, float]
VERIFIER, EXTEND, DENOISE, HOST = "a verifier step", "the context pass", "the denoiser pass", "the drafter's host work"
LENGTH: Number = ("acceptance length", 0, 0)
# One factor for all passes of a drafter that was not measured: their errors have one cause, the bound.
SIZE_FACTOR: Number = ("times the bound", 0, 0)


@dataclass(frozen=True)
class _Terms:
    """Terms of the formula, named as in `speed_up`."""

    acceptance_length: float
    plain_ms: float
    verify_ms: float
    extend_ms: float
    denoise_ms: float
    num_passes: float
    host_ms: float

    @property
    def speed_up(self) -> float:
        return speed_up(**vars(self))


class CostModel:
    """Predicts from step times of the verifier and of the drafter.

    For an interval, each number in turn takes the ends of its own interval while the others keep their values. The
    changes of the result's logarithm are added by root of sum of squares, those downwards and those upwards
    separately. That assumes independent errors, and is exact where only one number is in doubt.

    Args:
        verifier_steps: by batch size and tokens per request; straight lines in between, nothing beyond.
        drafting: phases that were measured, or the drafter's size.
        assumed_error: half the interval of a number that has none, as a share of it.
    """

    def __init__(
        self,
        verifier_steps: Iterable[VerifierStep],
        drafting: Iterable[DraftingPhases] | DrafterSize,
        assumed_error: float = 0.1,
    ) -> None:
        if not 0 <= assumed_error < 1:
            raise ArgumentError(f"assumed_error {assumed_error} is not allowed; give a share from 0 to below 1")
        self.assumed_error = assumed_error
        self._size = drafting if isinstance(drafting, DrafterSize) else None
        self._known = {(VERIFIER, step.batch_size, step.num_tokens): step.ms for step in verifier_steps}
        self._host: dict[Number, float] = {}
        if isinstance(drafting, DrafterSize):
            self._known[SIZE_FACTOR] = Measured(1.0)
            return
        for phase in drafting:
            place = (phase.batch_size, phase.block_size)
            self._known |= {(EXTEND, *place): phase.extend_ms, (DENOISE, *place): phase.denoise_ms}
            self._host[HOST, *place] = phase.host_ms

    def predict(
        self, batch_size: int, acceptance: AcceptanceLength, num_speculative_tokens: int | None = None
    ) -> Prediction:
        """Speed-up of one way to draft.

        Args:
            batch_size: requests at once.
            acceptance: what drafts of this kind gain.
            num_speculative_tokens: drafts of each block that are verified; None for all that were measured.

        Raises:
            ArgumentError: it is outside what was given.
        """
        most = acceptance.setting.num_speculative_tokens
        num_drafts = most if num_speculative_tokens is None else num_speculative_tokens
        known = {**self._known, LENGTH: acceptance.length}
        values = {number: one.value for number, one in known.items()}
        terms = self._terms(values, batch_size, acceptance, num_drafts)
        changed = [
            self._terms({**values, number: end}, batch_size, acceptance, num_drafts)
            for number, one in known.items()
            for end in self._ends(one)
        ]

        def estimate(of: Callable[[_Terms], float]) -> Estimate:
            value = of(terms)
            changes = [math.log(of(one) / value) for one in changed]
            below, above = (
                math.hypot(*(min(one, 0.0) for one in changes)),
                math.hypot(*(max(one, 0.0) for one in changes)),
            )
            return Estimate(value, value * math.exp(-below), value * math.exp(above))

        return Prediction(
            category=acceptance.category,
            temperature=acceptance.temperature,
            batch_size=batch_size,
            setting=replace(acceptance.setting, num_speculative_tokens=num_drafts),
            acceptance_length=estimate(lambda one: one.acceptance_length),
            plain_ms=terms.plain_ms,
            verify_ms=terms.verify_ms,
            extend_ms=terms.extend_ms,
            denoise_ms=terms.num_passes * terms.denoise_ms,
            host_ms=terms.host_ms,
            tokens_per_s=estimate(lambda one: 1e3 * batch_size / one.plain_ms * one.speed_up),
            plain_tokens_per_s=estimate(lambda one: 1e3 * batch_size / one.plain_ms),
            speed_up=estimate(lambda one: one.speed_up),
            break_even_length=terms.acceptance_length / terms.speed_up,
        )

    def _ends(self, one: Measured) -> tuple[float, float]:
        if one.low is None or one.high is None:
            return one.value * (1 - self.assumed_error), one.value * (1 + self.assumed_error)
        return max(one.low, 1e-3 * one.value), one.high  # a time is never 0, whatever its interval says

    def _terms(self, values: Numbers, batch_size: int, acceptance: AcceptanceLength, num_drafts: int) -> _Terms:
        setting = acceptance.setting
        length = length_of_first(num_drafts, acceptance, values[LENGTH])
        # Where the policy chose, a lower limit shortens those drafts alone that were longer.
        drafted = num_drafts if acceptance.num_draft_tokens is None else min(acceptance.num_draft_tokens, num_drafts)
        if self._size:
            extend = values[SIZE_FACTOR] * self._size.pass_ms(batch_size * length)
            denoise = values[SIZE_FACTOR] * self._size.pass_ms(batch_size * setting.block_size)
            host = 0.0
        else:
            extend, denoise, host = (
                time_at(what, "block size", times, batch_size, setting.block_size)
                for what, times in ((EXTEND, values), (DENOISE, values), (HOST, self._host))
            )
        return _Terms(
            acceptance_length=length,
            plain_ms=time_at(VERIFIER, "tokens per request", values, batch_size, 1),
            verify_ms=time_at(VERIFIER, "tokens per request", values, batch_size, 1 + drafted),
            extend_ms=extend,
            denoise_ms=denoise,
            num_passes=setting.steps_per_block if acceptance.denoiser_passes is None else acceptance.denoiser_passes,
            host_ms=host,
        )


def time_at(what: str, axis: str, times: Numbers, batch_size: float, x: float) -> float:
    """The time at a place: straight lines between those that are known, nothing beyond.

    A batch size without times on both sides of `x` is passed over: some may have been measured with fewer drafts.

    Args:
        what: is timed.
        axis: name of `x`, for errors.
        times: with others, which are left aside.
        batch_size: requests.
        x: tokens per request, or block size.

    Raises:
        ArgumentError: it is outside what is known.
    """
    rows: dict[int, dict[int, float]] = {}
    for (name, size, at), ms in times.items():
        if name == what:
            rows.setdefault(size, {})[at] = ms
    reaching = sorted(size for size, row in rows.items() if min(row) <= x <= max(row))
    if not reaching or not reaching[0] <= batch_size <= reaching[-1]:
        raise _unknown_time(what, axis, rows, batch_size, x)
    over_x = [np.interp(x, sorted(rows[size]), [rows[size][at] for at in sorted(rows[size])]) for size in reaching]
    return float(np.interp(batch_size, reaching, over_x))


def _unknown_time(
    what: str, axis: str, rows: Mapping[int, Mapping[int, float]], batch_size: float, x: float
) -> ArgumentError:
    if not rows:
        return ArgumentError(f"no time of {what} is known; give one")
    where, given = f"batch size {batch_size:g}", sorted(rows)
    if given[0] <= batch_size <= given[-1]:
        short = (size for size, row in rows.items() if not min(row) <= x <= max(row))
        nearest = min(short, key=lambda size: abs(size - batch_size))
        where, given = f"{axis} at batch size {nearest} {x:g}", sorted(rows[nearest])
    span = f"{given[0]}" if len(given) == 1 else f"{given[0]} to {given[-1]}"
    return ArgumentError(
        f"{what} for {where} is not predicted: times are given for {span}, and beyond them nothing is extrapolated; "
        f"measure it there"
    )


def length_of_first(num_drafts: int, acceptance: AcceptanceLength, length: float | None = None) -> float:
    """Tokens that a round gains if only the first drafts of each block are verified.

    Without shares by position, every draft is taken to have the same chance after those before it.

    Args:
        num_drafts: at most those that were measured.
        acceptance: of all drafts.
        length: another acceptance length of all drafts than the measured one, as an end of its interval; what the first
            drafts gain changes by the same factor.

    Raises:
        ArgumentError: `num_drafts` is outside what was measured.

    Source: Leviathan et al. 2023, "Fast inference from transformers via speculative decoding", equation 1.
    """
    most, whole = acceptance.setting.num_speculative_tokens, acceptance.length.value
    if not 1 <= num_drafts <= most:
        raise ArgumentError(
            f"K {num_drafts} is outside what was measured, 1 to {most} drafts of a block of "
            f"{acceptance.setting.block_size}; measure the acceptance length of longer drafts"
        )
    length = whole if length is None else min(max(length, 1.0), 1.0 + most)
    if num_drafts == most or whole == 1:
        return min(length, 1.0 + num_drafts)
    # The length and the shares may be counted differently at the ends of texts, so only ratios of shares are used.
    shares = acceptance.by_position or _even_shares(whole, most)
    of_first = sum(shares[:num_drafts]) / sum(shares) if any(shares) else 0.0
    return min(1.0 + (length - 1) * of_first, 1.0 + num_drafts)


def _even_shares(length: float, num_drafts: int) -> Sequence[float]:
    """Shares by position that add up to this length if every draft has one chance, which bisection finds."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(middle**i for i in range(num_drafts + 1)) < length else (low, middle)
    return [high**i for i in range(1, num_drafts + 1)]


@dataclass(frozen=True)
class Advice:
    """What to do under one load, and why.

    Attributes:
        outcome: whether drafting pays; "no difference" where the interval includes 1 or the speed-up is within `BAND`.
        sentence: the same with the way to draft, its numbers and the reason.
        best: of all ways that were asked for.
    """

    outcome: Literal["drafting pays", "no difference", "drafting does not pay"]
    sentence: str
    best: Prediction


def advise(predictions: Sequence[Prediction]) -> Advice:
    """Says whether the best of several ways to draft is good enough.

    Args:
        predictions: of one category and batch size; at least one.
    """
    best = max(predictions, key=lambda one: one.speed_up.value)
    value, low, high = best.speed_up.value, best.speed_up.low, best.speed_up.high
    gain = f"{value:.2f} times as fast ({low:.2f} to {high:.2f})"
    where = f"at batch size {best.batch_size}"
    if high <= 1 and value <= 1 - BAND:
        sentence = f"Drafting does not pay {where}, because {_why_not(best)}: at best {gain}."
        return Advice("drafting does not pay", sentence, best)
    if low <= 1 or value < 1 + BAND:
        sentence = (
            f"No difference is to be expected {where}: the best way, {best.setting.name}, is {gain}, and "
            f"{_why_not(best)}. Do not draft there, or narrow it with measured times and acceptance lengths."
        )
        return Advice("no difference", sentence, best)
    most = max(one.setting.num_speculative_tokens for one in predictions)
    longest = max(
        (one for one in predictions if one.setting.num_speculative_tokens == most), key=lambda one: one.speed_up.value
    )
    sentence = (
        f"Drafting pays {where}: {best.setting.name}, {gain}, because a round gains {best.acceptance_length.value:.2f} "
        f"tokens and pays from {best.break_even_length:.2f}"
    )
    if value > (1 + BAND) * longest.speed_up.value:
        sentence += f"; the longest drafts, {longest.setting.name}, give {longest.speed_up.value:.2f}"
    return Advice("drafting pays", f"{sentence}.", best)


def _why_not(one: Prediction) -> str:
    """Names the largest reason against drafting."""
    drafts, plain = one.setting.num_speculative_tokens, one.plain_ms
    if one.break_even_length >= 1 + drafts:
        return (
            f"even {drafts} accepted drafts of {drafts} would not pay: a round takes {one.break_even_length:.1f} plain "
            f"steps ({one.drafting_ms:.1f} ms drafting and {one.verify_ms:.1f} ms verifying, beside {plain:.1f} ms)"
        )
    extra_ms = one.verify_ms - plain
    if one.acceptance_length.value - 1 < FEW_ACCEPTED * drafts:
        return (
            f"a round gains {one.acceptance_length.value:.2f} tokens and pays from {one.break_even_length:.2f}: too "
            f"few drafts are accepted"
        )
    if one.drafting_ms > extra_ms:
        return f"drafting takes {one.drafting_ms:.1f} ms a round, beside a verifier step of {plain:.1f} ms"
    return (
        f"verifying {drafts} drafts takes {extra_ms:.1f} ms more than a plain step of {plain:.1f} ms, as where the "
        f"verifier computes all the time instead of waiting for memory"
    )
