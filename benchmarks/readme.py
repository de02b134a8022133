"""Writing of the tables of kernels/README.md: python -m benchmarks.readme NAME < TABLE"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

README = Path(__file__).parents[1] / "kernels" / "README.md"


def write_section(name: str, text: str, path: Path = README) -> None:
    """Puts the text between the markers `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: the file has no such markers.
    """
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    before, found, rest = path.read_text(encoding="utf-8").partition(begin)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no section {name}; put the lines {begin} and {end} where it shall stand")
    path.write_text(f"{before}{begin}\n{text.strip()}\n{end}{after}", encoding="utf-8")


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Formats a Markdown table; bars inside a cell are escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |" for line in lines)


if __name__ == "__main__":
    write_section(sys.argv[1], sys.stdin.read())
