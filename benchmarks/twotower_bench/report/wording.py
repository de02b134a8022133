"""Systems and loads as a reader of the report sees them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Load, System

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


def place_of(one: Any) -> str:
    """The load or traffic of figures, as a heading."""
    return load_in_words(one.load) if hasattr(one, "load") else str(one.traffic)


def load_in_words(load: Load) -> str:
    """Prompts, temperature unless that is 0, and requests at once."""
    return f"{kind_of(load)}, {load.concurrency} at once"


def kind_of(load: Load) -> str:
    """The prompts of a load, and its temperature unless that is 0."""
    return category_in_words(load.category) + (f", temperature {load.temperature:g}" if load.temperature else "")


def category_in_words(category: str) -> str:
    """A kind of prompts, or all."""
    return "all prompts" if category == ALL_CATEGORIES else category


def listed(words: Sequence[str]) -> str:
    """Words with commas and an `and`."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
