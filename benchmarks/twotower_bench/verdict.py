"""What a prediction means: use it, use shorter drafts, or do not use it, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from twotower_bench.cost_model import Prediction

# Shorter drafts are recommended where they are better than the longest by more than this.
WORTH_TELLING = 1.02
# Where a smaller share of drafts is accepted, that is named as the reason, else what costs most.
FEW_ACCEPTED = 0.25


class Verdict(StrEnum):
    """What to do at one load."""

    USE = "use it"
    SHORTER = "use shorter drafts"
    DO_NOT_USE = "do not use it"


@dataclass(frozen=True)
class Advice:
    """What to do at one load, and why.

    Attributes:
        verdict: in a word.
        sentence: in a sentence.
        best: of all ways that were asked.
    """

    verdict: Verdict
    sentence: str
    best: Prediction

    def to_json(self) -> dict[str, Any]:
        """As JSON."""
        return {"verdict": self.verdict.value, "sentence": self.sentence, "best": self.best.to_json()}


def advise(predictions: Sequence[Prediction]) -> Advice:
    """The best of several ways to draft for one load, and whether it is good enough.

    Args:
        predictions: of one category and batch size; at least one.
    """
    best = max(predictions, key=lambda one: one.speed_up.value)
    low, high = best.speed_up.low or 0.0, best.speed_up.high or 0.0
    gain = f"{best.speed_up.value:.2f} times as fast ({low:.2f} to {high:.2f})"
    where = f"at batch size {best.batch_size}"
    if high <= 1:
        sentence = f"Do not use TwoTower here {where}, because {_why_not(best)}: at best {gain}."
        return Advice(Verdict.DO_NOT_USE, sentence, best)
    if low <= 1:
        sentence = (
            f"Do not use TwoTower here {where} on these numbers, because the best way, {best.setting.name}, is {gain}, "
            f"which may be no gain: {_why_not(best)}. Measured times and acceptance lengths would narrow it."
        )
        return Advice(Verdict.DO_NOT_USE, sentence, best)
    longest_drafts = max(one.setting.num_speculative_tokens for one in predictions)
    longest = max(
        (one for one in predictions if one.setting.num_speculative_tokens == longest_drafts),
        key=lambda one: one.speed_up.value,
    )
    margin = f"a round gains {best.acceptance_length.value:.2f} tokens and pays from {best.break_even_length:.2f}"
    if best.speed_up.value > WORTH_TELLING * longest.speed_up.value and best is not longest:
        return Advice(
            Verdict.SHORTER,
            f"Use shorter drafts {where}: {best.setting.name}, {gain}, because {margin}, and the longest drafts, "
            f"{longest.setting.name}, give {longest.speed_up.value:.2f}.",
            best,
        )
    return Advice(Verdict.USE, f"Use it {where}: {best.setting.name}, {gain}, because {margin}.", best)


def _why_not(one: Prediction) -> str:
    """The largest reason."""
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
