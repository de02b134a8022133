"""Systems and loads as a reader of the report sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Load, System, Traffic
from twotower_bench.summary import CellSummary, ServerSummary, Summary

# No speculation is grey in every plot, TwoTower blue, and these as here; other systems get what is left.
HUES = {BASELINE: 0, BASELINE_AGAIN: 0, "twotower": 1, "draft_model": 2, "ngram": 3, "suffix": 4}


def hues_of(systems: Iterable[System]) -> dict[str, int]:
    """A hue for each system, by title."""
    titles = {one.name: one.title for one in systems}
    hues = {name: HUES[name] for name in titles if name in HUES}
    for name in titles:
        if name not in hues:
            hues[name] = next(hue for hue in range(1, len(titles) + len(HUES) + 1) if hue not in hues.values())
    return {titles[name]: hue for name, hue in hues.items()}


def short_title(system: System) -> str:
    """A title where it goes without saying that TwoTower drafts."""
    return system.title.removeprefix("TwoTower, ")


def is_rival(system: System) -> bool:
    """Whether a system speculates without TwoTower."""
    return not system.is_two_tower and system.name not in (BASELINE, BASELINE_AGAIN)


def place_of(one: Summary) -> str:
    """The load or traffic of a summary, as a heading."""
    return load_in_words(one.load) if isinstance(one, CellSummary) else str(traffic_of(one))


def load_in_words(load: Load) -> str:
    """Prompts, temperature unless that is 0, and requests at once."""
    temperature = f", temperature {load.temperature:g}" if load.temperature else ""
    return f"{category_in_words(load.category)}{temperature}, {load.concurrency} at once"


def kind_of(one: Summary) -> str:
    """The load of a summary without its amount: prompts with their temperature unless that is 0, or a kind of loop."""
    if isinstance(one, CellSummary):
        return load_in_words(one.load).rpartition(", ")[0]
    return "closed loop" if traffic_of(one).is_closed else "open loop"


def amount_of(one: Summary) -> float:
    """The load of a summary within its kind."""
    return one.load.concurrency if isinstance(one, CellSummary) else traffic_of(one).amount


def amount_in_words(one: Summary) -> str:
    """The same in words that follow "at"."""
    if kind_of(one) == "open loop":
        return str(traffic_of(one))
    return "1 request at a time" if amount_of(one) == 1 else f"{amount_of(one):g} at once"


def traffic_of(one: Summary) -> Traffic:
    """The traffic of a summary that is no engine's."""
    assert isinstance(one, ServerSummary)
    return one.traffic


def category_in_words(category: str) -> str:
    """A kind of prompts, or all."""
    return "all prompts" if category == ALL_CATEGORIES else category


def listed(words: Sequence[str]) -> str:
    """Words with commas and an `and`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
