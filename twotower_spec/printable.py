"""Text from outside (files, folder names, models, other programs) in a form that a terminal or a log can take."""

from __future__ import annotations

LONGEST_LINE = 1000
MOST_LINES = 40
# What our own messages put between the lines of a list; any other line break came with a value.
LIST_ITEM = "\n  "


def printable(text: str, keep: str = "") -> str:
    r"""Shows characters that a terminal would obey instead of print, as `repr` does: `\x1b`, `\u202e`, `\ud800`.

    Args:
        text: from anywhere.
        keep: characters that stay as they are, such as line breaks.
    """
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() or one in keep else one.encode("unicode_escape").decode("ascii") for one in text
    )


def shortened(text: str, longest: int = LONGEST_LINE) -> str:
    """Leaves out the middle of a text that is longer; of a message the end, which has the remedy, stays."""
    if len(text) <= longest:
        return text
    gap = f" ... {len(text)} characters, the middle left out ... "
    tail = longest // 3
    return text[: longest - tail - len(gap)] + gap + text[len(text) - tail :]


def as_message(text: str) -> str:
    """Makes a message of bounded length: a sentence, with a list or without; line breaks in values are shown."""
    first, *items = text.split(LIST_ITEM)
    if len(items) > MOST_LINES:
        items = [*items[: MOST_LINES - 1], f"... {len(items) - MOST_LINES + 1} more"]
    # First, so that no whole file is made printable; then, because escapes are longer than what they show.
    return LIST_ITEM.join(shortened(printable(shortened(line))) for line in (first, *items))


def byte_text(count: int | None) -> str:
    """Bytes in the largest unit that leaves them above 1; "?" for a number that is not known."""
    if count is None:
        return "?"
    size = float(count)
    for unit in ("B", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.2f} GiB"
