"""Everything that goes to a terminal through rich: text from anywhere is shown as it is, never obeyed."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from twotower_spec.printable import printable, shortened

# A table may have whole values in its cells, and a line a command to paste; neither is a whole file.
LONGEST_TEXT = 10_000


class Terminal(Console):
    """Console on which strings are plain text: no markup, no emoji codes, control characters shown, bounded.

    Strings in tables, titles and rules are strings of the console; what shall have a style is `styled`.
    """

    def __init__(self, *, stderr: bool = False, highlight: bool = False) -> None:
        super().__init__(stderr=stderr, highlight=highlight, markup=False, emoji=False)

    def render_str(self, text: str, **how: Any) -> Text:
        """Makes text of a string; rich calls it for every string that it prints."""
        return super().render_str(printable(shortened(text, LONGEST_TEXT), keep="\n\t"), **how)


def styled(text: str, style: str = "") -> Text:
    """Text in one style, as safe to print as a string on a `Terminal`; its length is the caller's to bound."""
    return Text(printable(text, keep="\n\t"), style=style)


def progress_bar() -> Progress:
    """A bar on stderr, where results do not go; nothing when stderr is no terminal."""
    console = Terminal(stderr=True)
    columns = (_Description(), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console, disable=not console.is_terminal)


class _Description(ProgressColumn):
    def render(self, task: Task) -> Text:
        return styled(shortened(task.description))
