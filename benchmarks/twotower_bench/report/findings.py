"""The sentence that answers whether TwoTower pays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from twotower_bench.records import BASELINE, BASELINE_AGAIN, System
from twotower_bench.report.wording import listed, short_title, times
from twotower_spec.evaluation.statistics import Comparison

UNKNOWN = "too few repeats for a verdict"
# Verdicts after "it is".
TALLY = {"slower": "slower", "no difference": "no different", UNKNOWN: "without a verdict"}


@dataclass(frozen=True)
class Outcome:
    """A system in one place beside no speculation there.

    Attributes:
        system: which.
        place: load or traffic, in words.
        speed_up: over no speculation.
        comparison: the same with interval and noise; None with too few repeats.
    """

    system: System
    place: str
    speed_up: float
    comparison: Comparison | None

    @property
    def verdict(self) -> str:
        """In a few words."""
        return self.comparison.verdict if self.comparison else UNKNOWN


def finding(outcomes: Sequence[Outcome]) -> str:
    """The best of TwoTower, how often it gains, and its best rival.

    The best is one that is faster beyond the noise, if there is any. The best of several settings is called so: chosen
    from the runs that its figures are of, it looks better than it is.

    Args:
        outcomes: of all systems in all places.
    """
    own = [one for one in outcomes if one.system.is_two_tower]
    if not own:
        return "TwoTower was not compared with no speculation here."
    by_place = [max((one for one in own if one.place == place), key=_rank) for place in dict.fromkeys(_places(own))]
    best = max(by_place, key=_rank)
    ratio = f"{_ratio(best, len({one.system.name for one in own}))}{_noise(outcomes, best)} for {best.place}."
    if len(by_place) == 1:
        return f"{_beginning(best)}: {ratio}{_rival(outcomes, best)}"
    verdicts = Counter(one.verdict for one in by_place)
    others = [f"{TALLY[verdict]} under {count}" for verdict, count in verdicts.items() if verdict != best.verdict]
    rest = f" It is {listed(others)}." if others else ""
    return (
        f"{_beginning(best)} under {verdicts[best.verdict]} of {len(by_place)} loads: at best {ratio}{rest}"
        f"{_rival(outcomes, best)}"
    )


def _places(outcomes: Sequence[Outcome]) -> list[str]:
    return [one.place for one in outcomes]


def _rank(outcome: Outcome) -> tuple[bool, float]:
    return outcome.verdict == "faster", outcome.speed_up


def _beginning(best: Outcome) -> str:
    if best.verdict == "faster":
        return "TwoTower pays"
    if best.verdict == UNKNOWN:
        return "Whether TwoTower pays is open"
    if best.verdict == "no difference":
        return "TwoTower gains nothing that can be told from noise"
    return "TwoTower does not pay"


def _ratio(outcome: Outcome, num_settings: int) -> str:
    chosen = f"; best of {num_settings} settings; measure it anew to confirm" if num_settings > 1 else ""
    title = short_title(outcome.system)
    setting = "" if title == "TwoTower" else f" with {title}"
    if outcome.comparison is None:
        return f"{times(outcome.speed_up)} the speed of no speculation{setting} ({UNKNOWN}{chosen})"
    found = outcome.comparison
    return (
        f"{times(found.speed_up.value)} the speed of no speculation{setting} ({found.interval_name} "
        f"{found.speed_up.low:.2f} to {found.speed_up.high:.2f}, A/A noise {found.noise_floor:.2f}×: "
        f"{found.verdict}{chosen})"
    )


def _noise(outcomes: Sequence[Outcome], best: Outcome) -> str:
    """What no speculation gives against itself, where no verdict says so; "" where it does, or nobody knows."""
    again = [one for one in outcomes if one.place == best.place and one.system.name == BASELINE_AGAIN]
    if best.comparison or not again:
        return ""
    return f", where no speculation run again gives {times(again[0].speed_up)},"


def _rival(outcomes: Sequence[Outcome], best: Outcome) -> str:
    """A sentence on the best of the others in the same place; "" without any."""
    rivals = [
        one
        for one in outcomes
        if one.place == best.place and not one.system.is_two_tower and one.system.name not in (BASELINE, BASELINE_AGAIN)
    ]
    if not rivals:
        return ""
    rival = max(rivals, key=lambda one: one.speed_up)
    return f" The best rival there is {rival.system.title} with {times(rival.speed_up)} ({rival.verdict})."
