"""A section as Markdown, for documents that quote its tables."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from twotower_bench.report.document import Section


def section_lines(section: Section, level: int = 2) -> Iterator[str]:
    """A section without its plots, to stand under headings of the level above; headings of groups are rows in bold."""
    yield from (f"{'#' * level} {_text(section.title)}", "", _text(section.finding))
    for note in section.notes:
        yield from ("", _text(note))
    for table in section.tables:
        names = table.columns
        yield from ("", f"{'#' * (level + 1)} {_text(table.title)}", "", _row(map(_text, names)))
        yield _row("--:" if place and table.is_numeric(name) else "---" for place, name in enumerate(names))
        for heading, rows in table.groups.items():
            if heading:
                yield _row([f"**{_text(heading)}**", *[""] * (len(names) - 1)])
            yield from (_row(_text(row.get(name, "")) for name in names) for row in rows)
        if table.note:
            yield from ("", _text(table.note))
        for origin in section.origins:
            # Backticks inside code are quoted by more of them around it.
            fence = "`" * (1 + max(map(len, re.findall("`+", origin.command)), default=0))
            code = f"{fence} {origin.command} {fence}" if len(fence) > 1 else f"`{origin.command}`"
            facts = f"{origin.hardware}; {origin.versions}; commit {origin.commit or 'unknown'}"
            yield from ("", f"{_text(facts)}; {code}")


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _text(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))
