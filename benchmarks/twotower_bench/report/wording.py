"""Systems and loads as a reader of the report sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Load, System
from twotower_bench.summary import CellSummary, ServerSummary, Summary

# No speculation is grey in every plot, TwoTower blue, and these as here; other systems get what is left.
HUES = {BASELINE: 0, BASELINE_AGAIN: 0, "twotower": 1, "draft_model": 2, "ngram": 3, "suffix": 4}


class Place(NamedTuple):
    """Where systems are compared: a load of an engine, or the traffic of a server.

    Attributes:
        title: as a heading.
        kind: without its amount: prompts with their temperature unless that is 0, or a kind of loop.
        amount: within its kind.
        phrase: the amount in words that follow "at".
    """

    title: str
    kind: str
    amount: float
    phrase: str


def place_of(one: Summary) -> Place:
    """The place of a summary."""
    if isinstance(one, CellSummary):
        title, amount = load_in_words(one.load), one.load.concurrency
        return Place(title, title.rpartition(", ")[0], amount, _at_once(amount))
    assert isinstance(one, ServerSummary)
    traffic = one.traffic
    if traffic.is_closed:
        return Place(str(traffic), "closed loop", traffic.amount, _at_once(traffic.amount))
    return Place(str(traffic), "open loop", traffic.amount, str(traffic))


def load_in_words(load: Load) -> str:
    """Prompts, temperature unless that is 0, and requests at once."""
    temperature = f", temperature {load.temperature:g}" if load.temperature else ""
    return f"{category_in_words(load.category)}{temperature}, {load.concurrency} at once"


def category_in_words(category: str) -> str:
    """A kind of prompts, or all."""
    return "all prompts" if category == ALL_CATEGORIES else category


def _at_once(amount: float) -> str:
    return "1 request at a time" if amount == 1 else f"{amount:g} at once"


def hues_of(systems: Iterable[System]) -> dict[str, int]:
    """A hue for each system, by title."""
    titles = {one.name: one.title for one in systems}
    hues = {name: HUES[name] for name in titles if name in HUES}
    for name in titles:
        if name not in hues:
            hues[name] = next(hue for hue in range(1, len(titles) + len(HUES) + 1) if hue not in hues.values())
    return {titles[name]: hue for name, hue in hues.items()}


def interval_names(figures: Iterable[Any]) -> str:
    """Names of their speed-ups' intervals, in brackets after a space, as ` (95 % interval)`; "" without any."""
    found = [one.comparison for one in figures if getattr(one, "comparison", None)]
    names = dict.fromkeys(one.interval_name for one in found)
    return f" ({' or '.join(names)})" if names else ""


def short_title(system: System) -> str:
    """A title where it goes without saying that TwoTower drafts."""
    return system.title.removeprefix("TwoTower, ")


def is_rival(system: System) -> bool:
    """Whether a system speculates without TwoTower."""
    return not system.is_two_tower and system.name not in (BASELINE, BASELINE_AGAIN)


def listed(words: Sequence[str]) -> str:
    """Words with commas and an `and`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
