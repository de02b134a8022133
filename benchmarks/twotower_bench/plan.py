"""Speed-up of drafting with TwoTower under a load, from step times and acceptance lengths, and whether it pays.

The formula is the adaptive policy's own, `twotower_spec.drafting.policies.costs.speed_up`; `CostModel` carries the
doubt of its terms to the result, and `advise` says what the result means.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from twotower_bench.drafter_size import DrafterSize
from twotower_bench.records import DraftSetting
from twotower_bench.serving_profile import AcceptanceLength, Number, ServingProfile, value_of
from twotower_spec.drafting.policies.costs import speed_up
from twotower_spec.errors import ArgumentError
from twotower_spec.evaluation.statistics import Estimate

# Two runs of one engine differ by as much (docs/benchmarks.md, A/A noise): a speed-up within it is none.
BAND = 0.02
# Where a smaller share of drafts is accepted, that is named as the reason, else what costs most.
FEW_ACCEPTED = 0.25


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

    @property
    def drafting_ms(self) -> float:
        """All three phases."""
        return self.extend_ms + self.denoise_ms + self.host_ms

    @property
    def load(self) -> tuple[str, float, int]:
        """Category, temperature and batch size: ways to draft are compared under the same."""
        return self.category, self.temperature, self.batch_size


# A number's name and place: batch size, and tokens per request or block size.
Place = tuple[str, int, int]
VERIFIER, EXTEND, DENOISE, HOST = "a verifier step", "the context pass", "the denoiser pass", "the drafter's host work"
LENGTH: Place = ("acceptance length", 0, 0)
# One factor for all passes of a drafter that was not measured: their errors have one cause, the bound.
SIZE_FACTOR: Place = ("times the bound", 0, 0)
# Figures of a prediction that get an interval.
IN_DOUBT = ("acceptance_length", "tokens_per_s", "plain_tokens_per_s", "speed_up")


@dataclass(frozen=True)
class CostModel:
    """Predicts from step times of the verifier and of the drafter.

    For an interval, each number in turn takes the ends of its own interval while the others keep their values. The
    changes of the result's logarithm are added by root of sum of squares, those downwards and those upwards
    separately. That assumes independent errors, and is exact where only one number is in doubt.

    Attributes:
        profile: step times; straight lines in between, nothing beyond.
        size: of a drafter that was not measured, instead of the profile's drafting phases.
        assumed_error: half the interval of a number that has none, as a share of it.
    """

    profile: ServingProfile
    size: DrafterSize | None = None
    assumed_error: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.assumed_error < 1:
            raise ArgumentError(f"assumed_error {self.assumed_error} is not allowed; give a share from 0 to below 1")

    def predict(self, batch_size: int, acceptance: AcceptanceLength, num_drafts: int | None = None) -> Prediction:
        """Speed-up of one way to draft.

        Args:
            batch_size: requests at once.
            acceptance: what drafts of this kind gain.
            num_drafts: of each block, that are verified; None for all that were measured.

        Raises:
            ArgumentError: it is outside what was given.
        """
        num_drafts = acceptance.setting.num_speculative_tokens if num_drafts is None else num_drafts
        known = self._known(acceptance)
        values = {place: one.value for place, one in known.items()}
        figures = self._figures(values, batch_size, acceptance, num_drafts)
        changed = [
            self._figures({**values, place: end}, batch_size, acceptance, num_drafts)
            for place, one in known.items()
            for end in (one.low, one.high)
        ]

        def estimate(name: str) -> Estimate:
            value = figures[name]
            changes = [math.log(one[name] / value) for one in changed]
            below, above = (math.hypot(*(end(one, 0.0) for one in changes)) for end in (min, max))
            return Estimate(value, value * math.exp(-below), value * math.exp(above))

        with_doubt: dict[str, Any] = {**figures, **{name: estimate(name) for name in IN_DOUBT}}
        setting = replace(acceptance.setting, num_speculative_tokens=num_drafts)
        return Prediction(acceptance.category, acceptance.temperature, batch_size, setting, **with_doubt)

    def _known(self, acceptance: AcceptanceLength) -> dict[Place, Estimate]:
        """All numbers, with intervals; host work has none."""
        numbers: dict[Place, Number | Estimate] = {LENGTH: acceptance.length}
        numbers |= {(VERIFIER, one.batch_size, one.num_tokens): one.ms for one in self.profile.verifier_steps}
        if self.size:
            numbers[SIZE_FACTOR] = 1.0
        for one in self.profile.drafting_phases if not self.size else ():
            place = (one.batch_size, one.block_size)
            host = Estimate(one.host_ms, one.host_ms, one.host_ms)
            numbers |= {(EXTEND, *place): one.extend_ms, (DENOISE, *place): one.denoise_ms, (HOST, *place): host}
        return {place: self._estimate(number) for place, number in numbers.items()}

    def _estimate(self, number: Number | Estimate) -> Estimate:
        if isinstance(number, Estimate):  # a time is never 0, whatever its interval says
            return replace(number, low=max(number.low, 1e-3 * number.value))
        return Estimate(number, number * (1 - self.assumed_error), number * (1 + self.assumed_error))

    def _figures(
        self, values: Mapping[Place, float], batch_size: int, acceptance: AcceptanceLength, num_drafts: int
    ) -> dict[str, float]:
        """Numbers of a `Prediction`."""
        block_size, passes = acceptance.setting.block_size, acceptance.denoiser_passes
        length = length_of_first(num_drafts, acceptance, values[LENGTH])
        # Where the policy chose, a lower limit shortens those drafts alone that were longer.
        drafted = num_drafts if acceptance.num_draft_tokens is None else min(acceptance.num_draft_tokens, num_drafts)
        if self.size:
            factor, host = values[SIZE_FACTOR], 0.0
            extend = factor * self.size.context_pass_ms(batch_size * length)
            denoise = factor * self.size.denoiser_pass_ms(batch_size * block_size)
        else:
            extend, denoise, host = (time_at(what, values, batch_size, block_size) for what in (EXTEND, DENOISE, HOST))
        denoise *= acceptance.setting.steps_per_block if passes is None else passes
        plain, verify = (time_at(VERIFIER, values, batch_size, 1 + drafts) for drafts in (0, drafted))
        gain, plain_rate = speed_up(length, plain, verify, extend, denoise, host_s=host), 1e3 * batch_size / plain
        return {
            "acceptance_length": length,
            "plain_ms": plain,
            "verify_ms": verify,
            "extend_ms": extend,
            "denoise_ms": denoise,
            "host_ms": host,
            "tokens_per_s": plain_rate * gain,
            "plain_tokens_per_s": plain_rate,
            "speed_up": gain,
            "break_even_length": length / gain,
        }


def time_at(what: str, times: Mapping[Place, float], batch_size: int, x: float) -> float:
    """The time at a place: straight lines between those that are known, nothing beyond.

    A batch size without times on both sides of `x` is passed over: some may have been measured with fewer drafts.

    Args:
        what, times: the name of one among several that are timed.
        batch_size, x: requests, and tokens of each or block size.

    Raises:
        ArgumentError: it is outside what is known.
    """
    rows: dict[int, dict[int, float]] = {}
    for name, size, at in sorted(times):
        if name == what:
            rows.setdefault(size, {})[at] = times[name, size, at]
    over_x = {
        size: float(np.interp(x, list(row), list(row.values())))
        for size, row in rows.items()
        if min(row) <= x <= max(row)
    }
    if not over_x or not min(over_x) <= batch_size <= max(over_x):
        axis = "tokens per request" if what == VERIFIER else "block size"
        known = "; ".join(f"batch size {size}: {axis} {', '.join(map(str, row))}" for size, row in rows.items())
        raise ArgumentError(
            f"{what} for batch size {batch_size}, {axis} {x:g} is outside what was measured ({known or 'nothing'}); "
            f"measure it there, nothing is extrapolated"
        )
    return float(np.interp(batch_size, list(over_x), list(over_x.values())))


def length_of_first(num_drafts: int, acceptance: AcceptanceLength, length: float | None = None) -> float:
    """Tokens that a round gains if only the first drafts of each block are verified.

    Args:
        num_drafts: at most those that were measured; without shares by position exactly those.
        acceptance: of all drafts.
        length: another acceptance length of all drafts than the measured one, as an end of its interval; what the first
            drafts gain changes by the same factor.

    Raises:
        ArgumentError: `num_drafts` is outside what was measured.
    """
    most, shares = acceptance.setting.num_speculative_tokens, acceptance.by_position
    if num_drafts != most and not (shares and 1 <= num_drafts < most):
        allowed = f"1 to {most}" if shares else f"{most}, as there is no acceptance by position for shorter drafts"
        raise ArgumentError(f"K {num_drafts} is outside what was measured; give {allowed}, or measure it")
    gained = min(max(value_of(acceptance.length) if length is None else length, 1.0), 1.0 + most) - 1
    # The length and the shares may be counted differently at the ends of texts, so only ratios of shares are used.
    of_first = 1.0 if num_drafts == most else sum(shares[:num_drafts]) / (sum(shares) or 1.0)
    return min(1 + gained * of_first, 1.0 + num_drafts)


@dataclass(frozen=True)
class Advice:
    """Advice for one load: whether drafting pays, and why.

    Attributes:
        outcome: whether drafting pays; "no difference" where the interval includes 1 or the speed-up is within `BAND`.
        sentence: the same with the way to draft, its numbers and the reason.
        best: of all ways that were asked for.
    """

    outcome: Literal["drafting pays", "no difference", "drafting does not pay"]
    sentence: str
    best: Prediction


def advise(predictions: Sequence[Prediction]) -> Advice:
    """Says whether the best of several ways to draft, of one load, is good enough."""
    best = max(predictions, key=lambda one: one.speed_up.value)
    value, low, high = best.speed_up.value, best.speed_up.low, best.speed_up.high
    gain, where = f"{value:.2f} times as fast ({low:.2f} to {high:.2f})", f"at batch size {best.batch_size}"
    if high <= 1 and value <= 1 - BAND:
        sentence = f"Drafting does not pay {where}, because {_why_not(best)}: at best {gain}."
        return Advice("drafting does not pay", sentence, best)
    if low <= 1 or value < 1 + BAND:
        sentence = (
            f"No difference is to be expected {where}: the best way, {best.setting.name}, is {gain}, and "
            f"{_why_not(best)}. Do not draft there, or narrow it with measured times and acceptance lengths."
        )
        return Advice("no difference", sentence, best)
    longest = max(predictions, key=lambda one: (one.setting.num_speculative_tokens, one.speed_up.value))
    beside = f"; the longest drafts, {longest.setting.name}, give {longest.speed_up.value:.2f}"
    sentence = (
        f"Drafting pays {where}: {best.setting.name}, {gain}, because a round gains {best.acceptance_length.value:.2f} "
        f"tokens and pays from {best.break_even_length:.2f}"
        f"{beside if value > (1 + BAND) * longest.speed_up.value else ''}."
    )
    return Advice("drafting pays", sentence, best)


def _why_not(one: Prediction) -> str:
    """Names the largest reason against drafting."""
    drafts, plain, extra = one.setting.num_speculative_tokens, one.plain_ms, one.verify_ms - one.plain_ms
    length, needed = one.acceptance_length.value, one.break_even_length
    if needed >= 1 + drafts:
        return (
            f"even {drafts} accepted drafts of {drafts} would not pay: a round takes {needed:.1f} plain steps "
            f"({one.drafting_ms:.1f} ms drafting and {one.verify_ms:.1f} ms verifying, beside {plain:.1f} ms)"
        )
    if length - 1 < FEW_ACCEPTED * drafts:
        return f"a round gains {length:.2f} tokens and pays from {needed:.2f}: too few drafts are accepted"
    if one.drafting_ms > extra:
        return f"drafting takes {one.drafting_ms:.1f} ms a round, beside a verifier step of {plain:.1f} ms"
    return (
        f"verifying {drafts} drafts takes {extra:.1f} ms more than a plain step of {plain:.1f} ms, as where the "
        f"verifier computes all the time instead of waiting for memory"
    )
