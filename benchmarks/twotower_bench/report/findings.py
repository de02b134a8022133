"""Whether TwoTower pays: one sentence that answers, and what to know beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from twotower_bench.records import BASELINE_AGAIN, System
from twotower_bench.report.columns import times
from twotower_bench.report.wording import is_rival, listed, short_title
from twotower_spec.evaluation.statistics import FEWEST_ROUNDS, Comparison

AT_ONCE = " at once"
# Places that a clause names one by one.
MOST_PLACES = 4


@dataclass(frozen=True)
class Outcome:
    """A system in one place beside no speculation there.

    Attributes:
        system: the one that is compared.
        place: a load in words that follow "at".
        speed_up: over no speculation.
        comparison: the same with interval and noise; None with too few repeats.
    """

    system: System
    place: str
    speed_up: float
    comparison: Comparison | None

    @property
    def verdict(self) -> str:
        """The comparison in a word or two; "" without one."""
        return self.comparison.verdict if self.comparison else ""


def at_once(concurrency: int, kind: str = "") -> str:
    """A number of requests as a place, with the kind of prompts in brackets if it is given."""
    place = "1 request at a time" if concurrency == 1 else f"{concurrency}{AT_ONCE}"
    return f"{place} ({kind})" if kind else place


def finding(outcomes: Sequence[Outcome]) -> str:
    """How fast TwoTower is where it is faster, slower or no different: of its settings, the best in each place.

    Args:
        outcomes: of all systems in all places.
    """
    best = _best_by_place(outcomes)
    if not best:
        return "TwoTower was not compared with no speculation here."
    clauses = [
        _clause([one for one in best if one.verdict == verdict], len(best), is_first=not number)
        for number, verdict in enumerate(dict.fromkeys(one.verdict for one in best))
    ]
    text = "; ".join(clauses)
    return f"{text[0].upper()}{text[1:]}."


def remarks(outcomes: Sequence[Outcome]) -> list[str]:
    """The best outcome with its doubts, and the best rival in the same place; empty where nothing was compared."""
    if not (places := _best_by_place(outcomes)):
        return []
    best = max(places, key=_rank)
    there = [one for one in outcomes if one.place == best.place]
    title = short_title(best.system)
    text = f"Best: {times(best.speed_up)} at {best.place}" + ("" if title == "TwoTower" else f" with {title}")
    if best.comparison:
        ratio, noise = best.comparison.speed_up, best.comparison.noise_floor
        text += f" ({best.comparison.interval_name} {ratio.low:.2f} to {ratio.high:.2f}, A/A noise {noise:.2f}×)"
    elif again := [one for one in there if one.system.name == BASELINE_AGAIN]:
        text += f"; no speculation run again gives {times(again[0].speed_up)} there"
    num_settings = len({one.system.name for one in outcomes if one.system.is_two_tower})
    if num_settings > 1:
        text += f"; it is the best of {num_settings} settings, so measure it anew to confirm"
    sentences = [f"{text}."]
    if rival := max((one for one in there if is_rival(one.system)), key=lambda one: one.speed_up, default=None):
        verdict = f" ({rival.verdict})" if rival.verdict else ""
        sentences.append(f"The best rival there is {rival.system.title} with {times(rival.speed_up)}{verdict}.")
    return sentences


def _best_by_place(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """TwoTower's best in each place, in order."""
    own = [one for one in outcomes if one.system.is_two_tower]
    places = dict.fromkeys(one.place for one in own)
    return [max((one for one in own if one.place == place), key=_rank) for place in places]


def _rank(outcome: Outcome) -> tuple[bool, float]:
    """Larger for the better: what is faster beyond the noise comes before all that is not."""
    return outcome.verdict == "faster", outcome.speed_up


def _clause(outcomes: Sequence[Outcome], num_places: int, *, is_first: bool) -> str:
    """Places that have one verdict in common."""
    where, ratios = _places([one.place for one in outcomes], num_places), _ratios([one.speed_up for one in outcomes])
    who, verdict = "TwoTower" if is_first else "it", outcomes[0].verdict
    if verdict == "faster":
        return f"{where} {who} is {ratios} times as fast as no speculation"
    if verdict == "slower":
        return f"{where} {who} is slower, {ratios} times as fast as no speculation"
    if verdict == "no difference":
        between = " between TwoTower and no speculation" if is_first else ""
        return f"{where} there is no difference{between} beyond noise"
    return (
        f"{where} {who} was {ratios} times as fast as no speculation, which takes {FEWEST_ROUNDS} repeats and an A/A "
        f"run to tell from noise"
    )


def _places(places: Sequence[str], num_places: int) -> str:
    if len(places) > MOST_PLACES:
        return f"under {len(places)} of {num_places} loads"
    # "4, 8 and 16 at once": the words are said once.
    pairs = zip(places, [*places[1:], ""], strict=True)
    return f"at {listed([one.removesuffix(AT_ONCE) if after.endswith(AT_ONCE) else one for one, after in pairs])}"


def _ratios(values: Sequence[float]) -> str:
    """One number, or the lowest and the highest; with one decimal where one is 2 or more."""
    digits = 1 if max(values) >= 2 else 2
    return " to ".join(dict.fromkeys(f"{one:.{digits}f}" for one in (min(values), max(values))))
