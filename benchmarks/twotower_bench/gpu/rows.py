"""Results of a part: a row of JSON and a line for the terminal, both at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


class RowFile:
    """A file of JSON lines that is begun anew."""

    def __init__(self, path: Path) -> None:
        """Makes the file, and folders above it."""
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("", encoding="utf-8")
        self._path = path

    def add(self, line: str, **row: Any) -> None:
        """Writes a row, and prints its line."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(line, flush=True)
