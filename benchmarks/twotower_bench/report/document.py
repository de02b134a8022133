"""What a report consists of: sections of tables and plots, as data that every format is made from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Where measurements come from; one line under every table.

    Attributes:
        hardware: processor, cores, threads, GPU.
        versions: of Python and packages.
        commit: of this code; None where it was no checkout.
        command: that measured.
    """

    hardware: str
    versions: str
    commit: str | None
    command: str


@dataclass(frozen=True)
class Row:
    """Of a table.

    Attributes:
        cells: one for every column; "" where there is nothing to say.
        mark: a word that sets the row apart, as "Pareto"; "" for none.
    """

    cells: tuple[str, ...]
    mark: str = ""


@dataclass(frozen=True)
class RowGroup:
    """Rows under a heading; "" for none."""

    heading: str
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows.

    Attributes:
        title: what it shows.
        columns: headings.
        groups: its rows.
        note: what the headings mean, in sentences.
    """

    title: str
    columns: tuple[str, ...]
    groups: tuple[RowGroup, ...]
    note: str = ""

    @property
    def num_rows(self) -> int:
        """Of all groups."""
        return sum(len(group.rows) for group in self.groups)

    def is_numeric(self, column: int) -> bool:
        """Whether a column holds numbers."""
        cells = (row.cells[column] for group in self.groups for row in group.rows)
        return any(cell.lstrip("+-−")[:1].isdigit() for cell in cells)


@dataclass(frozen=True)
class Line:
    """Points that may be connected.

    Attributes:
        label: in the legend.
        hue: number of colour, marker and dashes.
        xs, ys: where; as many of each.
        low, high: ends of intervals around `ys`; both empty for none.
        is_connected: whether a line joins them.
        weights: areas of the markers, the largest 1; empty for all alike.
    """

    label: str
    hue: int
    xs: tuple[float, ...]
    ys: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    is_connected: bool = True
    weights: tuple[float, ...] = ()


@dataclass(frozen=True)
class Bars:
    """A layer of horizontal bars, stacked on the layers before; a value for every name of the panel's y axis."""

    label: str
    hue: int
    values: tuple[float, ...]


@dataclass(frozen=True)
class Band:
    """An area between two lines, in the colour of the baseline."""

    label: str
    xs: tuple[float, ...]
    low: tuple[float, ...]
    high: tuple[float, ...]


@dataclass(frozen=True)
class Reference:
    """A thin line to compare with: at a height, or the diagonal where that is None."""

    label: str
    height: float | None = None


Mark = Line | Bars | Band | Reference


@dataclass(frozen=True)
class Axis:
    """Of a panel.

    Attributes:
        label: what it shows, with the unit.
        names: in place of numbers: positions 0, 1, ... are called so.
        ticks: numbers that are written; empty for what the plot chooses.
        is_logarithmic: to the base 2.
        limits: both ends; None for what the marks need.
    """

    label: str
    names: tuple[str, ...] = ()
    ticks: tuple[float, ...] = ()
    is_logarithmic: bool = False
    limits: tuple[float, float] | None = None


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    title: str
    x: Axis
    y: Axis
    marks: tuple[Mark, ...]


@dataclass(frozen=True)
class Plot:
    """Panels with one legend.

    Attributes:
        name: unique in a section; of files and anchors.
        title: what it shows.
        caption: what was measured, in a sentence or two.
        reading: one sentence on how to read it.
        panels: at least one.
    """

    name: str
    title: str
    caption: str
    reading: str
    panels: tuple[Panel, ...]

    @property
    def legend(self) -> list[Mark]:
        """The marks that a legend names, each label once, in order."""
        return list({mark.label: mark for panel in self.panels for mark in panel.marks}.values())


@dataclass(frozen=True)
class Section:
    """One kind of measurement from one file.

    Attributes:
        name: unique in a report; of anchors and files.
        title: its heading.
        finding: its answer in a sentence.
        origins: of its measurements, stated under every table.
        tables, plots: in order.
        notes: what to know about the measurement.
        figures: its figures, as JSON.
    """

    name: str
    title: str
    finding: str
    origins: tuple[Origin, ...]
    tables: tuple[Table, ...]
    plots: tuple[Plot, ...]
    notes: tuple[str, ...] = ()
    figures: Sequence[Mapping[str, Any]] = field(default=(), repr=False)

    def file_name(self, plot: Plot) -> str:
        """Of a plot, without its ending."""
        return f"{self.name}-{plot.name}"


@dataclass(frozen=True)
class Report:
    """All sections.

    Attributes:
        title: its heading.
        sources: names of the files that it was made from.
        sections: at least one.
    """

    title: str
    sources: tuple[str, ...]
    sections: tuple[Section, ...]
