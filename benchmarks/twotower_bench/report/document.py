"""Parts of a report: sections with a sentence, a picture and tables, which page, Markdown and JSON are made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes

Row = Mapping[str, str]


@dataclass(frozen=True)
class Origin:
    """Machine, versions and command of a measurement, stated under every table.

    Attributes:
        hardware: processor, cores, threads, GPU.
        versions: Python's and those of packages.
        commit: of this code; None where it was no checkout.
        command: the one that measured.
    """

    hardware: str
    versions: str
    commit: str | None
    command: str


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: what it shows.
        groups: rows by the heading that they stand under, "" for none; a row has texts by column.
        note: what the columns mean, in sentences.
    """

    title: str
    groups: Mapping[str, Sequence[Row]]
    note: str = ""

    @property
    def rows(self) -> list[Row]:
        """Rows of all groups."""
        return [row for rows in self.groups.values() for row in rows]

    @property
    def columns(self) -> list[str]:
        """Columns in which any row has something to say, in order."""
        names = dict.fromkeys(name for row in self.rows for name in row)
        return [name for name in names if any(row.get(name) for row in self.rows)]

    def is_numeric(self, column: str) -> bool:
        """Whether a column holds numbers."""
        return any(row.get(column, "").lstrip("+-−")[:1].isdigit() for row in self.rows)


@dataclass(frozen=True)
class Plot:
    """Panels that belong together, each in a figure of its own, with what was measured and how to read it."""

    title: str
    caption: str
    panels: Sequence[Axes]


@dataclass(frozen=True)
class Section:
    """One kind of measurement from one file.

    Attributes:
        title: its heading.
        finding: its answer in a sentence.
        notes: what to know about the finding and the measurement.
        tables: in order; those without rows are left out of a report.
        plot: its first panel stands beside the finding.
        figures: what tables and plot show, as numbers.
        name: unique in a report; for anchors.
        origins: of its measurements.
    """

    title: str
    finding: str
    notes: Sequence[str]
    tables: Sequence[Table]
    plot: Plot
    figures: Sequence[Any]
    name: str = ""
    origins: Sequence[Origin] = ()


@dataclass(frozen=True)
class Report:
    """Sections, at least one, and the names of the files they were made from; the page opens with the first one's
    finding.
    """

    title: str
    sources: Sequence[str]
    sections: Sequence[Section]
