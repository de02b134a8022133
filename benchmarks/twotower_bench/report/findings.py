"""Whether TwoTower pays: one sentence that answers, and what to know beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from twotower_bench.records import BASELINE, BASELINE_AGAIN
from twotower_bench.report.columns import times
from twotower_bench.report.wording import is_rival, listed, place_of, short_title
from twotower_bench.summary import ServerSummary, Summary
from twotower_spec.evaluation.statistics import FEWEST_ROUNDS

AT_ONCE = " at once"
# Places that a clause names one by one.
MOST_PLACES = 4


def places_of(summaries: Sequence[Summary]) -> dict[str, list[Summary]]:
    """Systems that were compared with no speculation, by place in words that follow "at"."""
    is_one_kind = isinstance(summaries[0], ServerSummary) or len({place_of(one).kind for one in summaries}) == 1
    places: dict[str, list[Summary]] = {}
    for one in summaries:
        if one.speed_up is not None and one.system.name != BASELINE:
            place = place_of(one)
            places.setdefault(place.phrase + ("" if is_one_kind else f" ({place.kind})"), []).append(one)
    return places


def finding(places: Mapping[str, Sequence[Summary]]) -> str:
    """How fast TwoTower is where it is faster, slower or no different: of its settings, the best in each place.

    Args:
        places: see `places_of`.
    """
    best = _best_by_place(places)
    if not best:
        return "TwoTower was not compared with no speculation here."
    verdicts = dict.fromkeys(one.verdict for one in best.values())
    text = "; ".join(_clause(best, verdict, is_first=not number) for number, verdict in enumerate(verdicts))
    return f"{text[0].upper()}{text[1:]}."


def remarks(places: Mapping[str, Sequence[Summary]]) -> list[str]:
    """The best summary with its doubts, and the best rival in the same place; empty where nothing was compared."""
    if not (by_place := _best_by_place(places)):
        return []
    place, best = max(by_place.items(), key=lambda pair: _rank(pair[1]))
    title = short_title(best.system)
    text = f"Best: {times(best.speed_up)} at {place}" + ("" if title == "TwoTower" else f" with {title}")
    if best.comparison:
        ratio, noise = best.comparison.speed_up, best.comparison.noise_floor
        text += f" ({best.comparison.interval_name} {ratio.low:.2f} to {ratio.high:.2f}, A/A noise {noise:.2f}×)"
    elif again := [one for one in places[place] if one.system.name == BASELINE_AGAIN]:
        text += f"; no speculation run again gives {times(again[0].speed_up)} there"
    num_settings = len({one.system.name for own in places.values() for one in own if one.system.is_two_tower})
    if num_settings > 1:
        text += f"; it is the best of {num_settings} settings, so measure it anew to confirm"
    rivals = [one for one in places[place] if is_rival(one.system)]
    if not rivals:
        return [f"{text}."]
    rival = max(rivals, key=lambda one: one.speed_up or 0.0)
    return [f"{text}.", f"The best rival there is {rival.system.title} with {times(rival.speed_up)} ({rival.verdict})."]


def _best_by_place(places: Mapping[str, Sequence[Summary]]) -> dict[str, Summary]:
    """TwoTower's best in each place where it was compared."""
    own = {place: [one for one in summaries if one.system.is_two_tower] for place, summaries in places.items()}
    return {place: max(summaries, key=_rank) for place, summaries in own.items() if summaries}


def _rank(one: Summary) -> tuple[bool, float]:
    """Larger for the better: what is faster beyond the noise comes before all that is not."""
    return one.verdict == "faster", one.speed_up or 0.0


def _clause(best: Mapping[str, Summary], verdict: str, *, is_first: bool) -> str:
    """Places that have one verdict in common."""
    own = {place: one for place, one in best.items() if one.verdict == verdict}
    where, ratios = _places(list(own), len(best)), _ratios([one.speed_up or 0.0 for one in own.values()])
    who = "TwoTower" if is_first else "it"
    if verdict == "faster":
        return f"{where} {who} is {ratios} times as fast as no speculation"
    if verdict == "slower":
        return f"{where} {who} is slower, {ratios} times as fast as no speculation"
    if verdict == "no difference":
        between = " between TwoTower and no speculation" if is_first else ""
        return f"{where} there is no difference beyond noise{between}"
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
