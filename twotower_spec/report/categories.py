"""Loads of one category each, taken together."""

from __future__ import annotations

from collections.abc import Sequence

from twotower_spec.evaluation.serving import ALL_CATEGORIES, ServingCell, over_categories


def all_together(cells: Sequence[ServingCell]) -> list[ServingCell]:
    """A cell over all categories for every system, concurrency, temperature and repeat in which each was measured.

    Empty where there is one category alone, or loads hold all prompts as it is. A run that was stopped has places
    where some categories are missing: what is left there would be compared with other prompts.
    """
    categories = {cell.load.category for cell in cells}
    if len(categories) < 2 or ALL_CATEGORIES in categories:
        return []
    return [one for one in over_categories(cells) if {request.category for request in one.requests} == categories]
