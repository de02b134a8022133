"""Tables for a terminal, sections of the report as text, and what is said under them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from twotower_bench.measurement_file import MeasurementFile
from twotower_spec.machine import commit, describe_machine
from twotower_spec.terminal import Terminal

if TYPE_CHECKING:
    from twotower_bench.report.document import Section  # matplotlib

Row = Mapping[str, str]


def print_table(console: Terminal, columns: Sequence[str], groups: Mapping[str, Sequence[Row]]) -> None:
    """Prints rows under the headings of their groups; columns that do not fit beside the first go on below.

    Args:
        console: where they go.
        columns: the first names the rows.
        groups: by heading, "" for none; a row has texts by column.
    """
    everything = [row for rows in groups.values() for row in rows]
    widths = {name: max(map(len, (name, *(row.get(name, "") for row in everything)))) for name in columns}
    for part in _side_by_side(widths, console.width):

        def show(row: Row, style: str = "", part: Sequence[str] = part) -> None:
            first, *others = (row.get(name, "") for name in part)
            cells = (text.rjust(widths[name]) for name, text in zip(part[1:], others, strict=True))
            line = "  ".join((first.ljust(widths[part[0]]), *cells))
            console.print(line.rstrip(), style=style, soft_wrap=True)

        console.print()
        show(dict(zip(part, part, strict=True)), "underline")
        for heading, rows in groups.items():
            if heading:
                console.print(heading, style="bold", soft_wrap=True)
            for row in rows:
                show(row)


def print_section(console: Terminal, section: Section, *titles: str) -> None:
    """Prints a section of the report: its finding, what to know about it, and tables.

    Args:
        console: where it goes.
        section: as the page shows it.
        titles: of the tables that are shown; all without any.
    """
    for line in (section.finding, *section.notes):
        console.print(line, soft_wrap=True)
    for found in section.tables:
        if found.rows and (not titles or found.title in titles):
            console.print(f"\n{found.title}", style="bold")
            print_table(console, found.columns, found.groups)
            console.print(found.note, style="dim", soft_wrap=True)


def print_remarks(console: Terminal, lines: Sequence[str], file: MeasurementFile[Any]) -> None:
    """Prints sentences under tables, then what was measured with, and how."""
    where = file.where
    vllm = next((f"vllm {v}" for name, v in where["versions"].items() if name.startswith("vllm") and v), "vllm ?")
    for line in (*lines, f"{describe_machine()}, {vllm}, commit {commit() or 'unknown'}", where["command"]):
        console.print(line, soft_wrap=True)


def too_long(num_prompts: int, prompt_ids: Sequence[str]) -> list[str]:
    """A sentence on prompts that were not measured, if there are any."""
    missing = num_prompts - len(set(prompt_ids))
    return [f"{missing} of {num_prompts} prompts were too long and are left out."] if missing else []


def _side_by_side(widths: Mapping[str, int], most: int) -> Iterator[list[str]]:
    """Names of columns that stand beside the first one in `most` characters."""
    first, *others = widths
    part = [first]
    for name in others:
        if len(part) > 1 and sum(widths[one] + 2 for one in (*part, name)) - 2 > most:
            yield part
            part = [first]
        part.append(name)
    yield part
