"""A section as Markdown, for documents that quote its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from twotower_bench.report.document import Origin, Section, Table


def section_lines(section: Section, level: int = 2) -> Iterator[str]:
    """A section without its plots, to stand under headings of the level above."""
    yield from (f"{'#' * level} {_text(section.title)}", "", _text(section.finding))
    for note in section.notes:
        yield from ("", _text(note))
    for table in section.tables:
        yield from ("", *_table(table, level + 1))
        for origin in section.origins:
            yield from ("", _origin(origin))


def _table(table: Table, level: int) -> Iterator[str]:
    """A table whose headings of groups become rows in bold."""
    yield from (f"{'#' * level} {_text(table.title)}", "", _row(map(_text, table.columns)))
    yield _row("--:" if place and table.is_numeric(name) else "---" for place, name in enumerate(table.columns))
    for heading, rows in table.groups.items():
        if heading:
            yield _row([f"**{_text(heading)}**", *[""] * (len(table.columns) - 1)])
        for row in rows:
            yield _row(_text(row.get(name, "")) for name in table.columns)
    if table.note:
        yield from ("", _text(table.note))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _origin(origin: Origin) -> str:
    # Backticks inside code are quoted by more of them around it.
    fence = "`" * (1 + max(map(len, re.findall("`+", origin.command)), default=0))
    space = " " if len(fence) > 1 else ""
    facts = f"{origin.hardware}; {origin.versions}; commit {origin.commit or 'unknown'}"
    return f"{_text(facts)}; {fence}{space}{origin.command}{space}{fence}"


def _text(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))
