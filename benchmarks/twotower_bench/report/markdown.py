"""A report as Markdown, with its plots as linked images."""

from __future__ import annotations

import re
from collections.abc import Iterator

from twotower_bench.report.document import Origin, Plot, Report, Section, Table


def markdown_of(report: Report) -> str:
    """The whole file."""
    lines = [f"# {report.title}", "", f"Made from {', '.join(map(_text, report.sources))}."]
    for section in report.sections:
        lines += ["", *section_lines(section)]
        for plot in section.plots:
            lines += ["", *_plot(section, plot)]
    return "\n".join(lines) + "\n"


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
    """Headings of groups become rows in bold."""
    yield from (f"{'#' * level} {_text(table.title)}", "", _row(table.columns))
    yield _row(["--:" if i and table.is_numeric(i) else "---" for i in range(len(table.columns))])
    for group in table.groups:
        if group.heading:
            yield _row([f"**{_text(group.heading)}**", *[""] * (len(table.columns) - 1)], escape=False)
        for row in group.rows:
            first = row.cells[0] + (f" ({row.mark})" if row.mark else "")
            yield _row([first, *row.cells[1:]])
    if table.note:
        yield from ("", _text(table.note))


def _row(cells: tuple[str, ...] | list[str], escape: bool = True) -> str:
    return f"| {' | '.join(map(_text, cells) if escape else cells)} |"


def _origin(origin: Origin) -> str:
    # Backticks inside code are quoted by more of them around it.
    fence = "`" * (1 + max(map(len, re.findall("`+", origin.command)), default=0))
    space = " " if len(fence) > 1 else ""
    facts = f"{origin.hardware}; {origin.versions}; commit {origin.commit or 'unknown'}"
    return f"{_text(facts)}; {fence}{space}{origin.command}{space}{fence}"


def _plot(section: Section, plot: Plot) -> Iterator[str]:
    yield from (f"### {_text(plot.title)}", "", f"![{_text(plot.title)}]({section.file_name(plot)}.png)", "")
    yield f"{_text(plot.caption)} {_text(plot.reading)}"


def _text(text: str) -> str:
    return re.sub(r"([\\`*_<>|\[\]#])", r"\\\1", " ".join(text.split()))
