"""Measured cells, found and put together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from twotower_bench.records import ALL_CATEGORIES, BASELINE, BASELINE_AGAIN, Drafting, Load, ServingCell, System


def cells_of(cells: Sequence[ServingCell], system: str, load: Load) -> list[ServingCell]:
    """Repeats of one system under one load, in order."""
    return sorted(
        (cell for cell in cells if cell.system.name == system and cell.load == load), key=lambda cell: cell.repeat
    )


def over_categories(cells: Sequence[ServingCell]) -> list[ServingCell]:
    """Categories that were measured one after the other as one cell, for every system, concurrency and repeat.

    Empty where there is one category alone, or loads hold all prompts as it is. A run that was stopped has places where
    some categories are missing: these are left out, since they would be compared with other prompts.
    """
    categories = {cell.load.category for cell in cells}
    if len(categories) < 2 or ALL_CATEGORIES in categories:
        return []
    groups: dict[tuple[str, Load, int], list[ServingCell]] = {}
    for cell in cells:
        together = replace(cell.load, category=ALL_CATEGORIES)
        groups.setdefault((cell.system.name, together, cell.repeat), []).append(cell)
    return [
        ServingCell(
            system=group[0].system,
            load=load,
            repeat=repeat,
            seconds=sum(cell.seconds for cell in group),
            requests=tuple(request for cell in group for request in cell.requests),
            steps=tuple(steps for cell in group for steps in cell.steps),
            drafting=_added_up([cell.drafting for cell in group if cell.drafting]),
        )
        for (_, load, repeat), group in groups.items()
        if {cell.load.category for cell in group} == categories
    ]


def _added_up(parts: Sequence[Drafting]) -> Drafting | None:
    if not parts:
        return None
    seconds, without_drafts = Counter[str](), Counter[str]()
    for part in parts:
        seconds.update(part.seconds)
        without_drafts.update(part.without_drafts)
    return Drafting(
        rounds=sum(part.rounds for part in parts),
        context_tokens=sum(part.context_tokens for part in parts),
        denoiser_passes=sum(part.denoiser_passes for part in parts),
        request_denoiser_passes=sum(part.request_denoiser_passes for part in parts),
        seconds=dict(seconds),
        without_drafts=dict(without_drafts),
        # Bins of the same bounds are merged where they are looked at.
        calibration=tuple(one for part in parts for one in part.calibration),
    )


def in_order_of_tables(systems: Iterable[System]) -> list[System]:
    """Different ones by name: no speculation, the same again, rivals, TwoTower; else as they come.

    Cells are measured in an order that is drawn.
    """

    def rank(system: System) -> tuple[bool, bool, bool]:
        return system.name != BASELINE, system.name != BASELINE_AGAIN, system.is_two_tower

    return sorted({system.name: system for system in systems}.values(), key=rank)
