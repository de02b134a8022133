"""Readers for every file that a user brings: within bounds, and refused in one sentence with file, line and remedy.

Files are UTF-8 with or without a byte order mark; `.gz` after the name is unpacked; `-` is standard input.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any

from twotower_spec.errors import FileError

STDIN = Path("-")
JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")

MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 16 << 20
MAX_DEPTH = 100
MAX_DIGITS = 100

_SURROGATE_ESCAPE = re.compile(r"\\u[dD][89a-fA-F]")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


def is_file(path: Path) -> bool:
    """Whether a file is there; pathlib raises for names that are too long for any file."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_directory(path: Path) -> bool:
    """Whether a directory is there, likewise."""
    try:
        return path.is_dir()
    except OSError:
        return False


def holds_json_lines(path: Path, beginning: str = "") -> bool:
    """Whether a file is JSON lines, by its name, or standard input, by a brace at its beginning; else plain text."""
    if path == STDIN:
        return beginning.lstrip().startswith("{")
    return Path(path.name.lower().removesuffix(".gz")).suffix in JSON_LINES_SUFFIXES


def read_text(path: Path, what: str = "", remedy: str = "give a text file in UTF-8") -> str:
    """The content of a text file.

    Args:
        path: of the file.
        what: that messages call it, as "prompt file".
        remedy: that messages end with.

    Raises:
        FileError: it cannot be read, is too large, or is no UTF-8.
    """
    with _refusing(path, what, remedy), _opened(path) as file:
        # In pieces: asked for all that is allowed, Python would take that much memory before it reads a byte.
        content = bytearray()
        while piece := file.read(MAX_LINE_BYTES):
            content += piece
            if len(content) > MAX_FILE_BYTES:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
        return content.decode("utf-8-sig")


def read_json(path: Path, what: str = "", remedy: str = "give a JSON file") -> Any:
    """The content of a JSON file.

    Args:
        path: of the file.
        what, remedy: as in `read_text`.

    Raises:
        FileError: it cannot be read, or is not JSON.
    """
    return parse_json(read_text(path, what, remedy), path, remedy)


def read_toml(path: Path, what: str = "", remedy: str = "give a TOML file") -> dict[str, Any]:
    """The table of a TOML file; see `read_json`."""
    text = read_text(path, what, remedy)
    with _refusing(path, what, remedy):
        table = tomllib.loads(text)
        _check_bounds(table)
        return table


def read_json_lines(
    path: Path, what: str = "", remedy: str = "give one JSON object per line"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Objects of a file of JSON lines with their places, `FILE:LINE`; empty lines are left out.

    Args:
        path: of the file, whatever its name ends in.
        what, remedy: as in `read_text`.

    Raises:
        FileError: it cannot be read, or a line is no object.
    """
    for number, line in _read_lines(path, what, remedy):
        yield f"{path}:{number}", _parse_object(line, path, remedy, number)


def read_rows(
    path: Path, what: str = "", remedy: str = "give one JSON object per line"
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of JSON lines or, by the name of the file, of plain text: there a line is the field `prompt` of a row.

    Otherwise as `read_json_lines`.
    """
    lines = _read_lines(path, what, remedy)
    first = next(lines, None)
    if first is None:
        return
    as_json = holds_json_lines(path, first[1])
    for number, line in chain([first], lines):
        yield f"{path}:{number}", _parse_object(line, path, remedy, number) if as_json else {"prompt": line}


def parse_json(text: str, source: object, remedy: str, line: int | None = 1) -> Any:
    """The value of a JSON text.

    Args:
        text: JSON; NaN and infinities are allowed, as Python writes them.
        source: the file or the option that it comes from.
        remedy: that messages end with.
        line: number of its first line; None for an option, which has none.

    Raises:
        FileError: it is not JSON, nests too deep, or holds too long an integer or half a surrogate pair.
    """
    try:
        value = json.loads(text, parse_int=_integer)
        # Only brackets nest, and half a character comes from an escape, or from text that is no file's.
        deep = text.count("[") + text.count("{") > MAX_DEPTH
        if deep or _SURROGATE_ESCAPE.search(text) or not _is_encodable(text):
            _check_bounds(value)
    except json.JSONDecodeError as error:
        place = source if line is None else f"{source}:{line + error.lineno - 1}"
        raise FileError(f"{place} is not JSON ({error.msg} at column {error.colno}); {remedy}") from error
    except (ValueError, RecursionError) as error:
        place = source if line is None else f"{source}:{line}"
        raise FileError(f"{place} is not JSON that is read here ({_reason(error)}); {remedy}") from error
    return value


def _parse_object(text: str, path: Path, remedy: str, line: int) -> dict[str, Any]:
    row = parse_json(text, path, remedy, line)
    if not isinstance(row, dict):
        raise FileError(f"{path}:{line} is no JSON object; {remedy}")
    return row


def check_text(text: str, place: str) -> str:
    """The same text, if it can be encoded: no tokenizer takes half of a surrogate pair.

    Raises:
        FileError: it cannot, with the place.
    """
    if not _is_encodable(text):
        raise FileError(f"{place} holds {_half_character(text)}; write whole characters, in UTF-8")
    return text


def _read_lines(path: Path, what: str, remedy: str) -> Iterator[tuple[int, str]]:
    """Numbers and text of the lines that are not empty. Unicode's line separators, which JSON may hold, end none."""
    number, left = 0, MAX_FILE_BYTES
    with _refusing(path, what, remedy), _opened(path) as file:
        while line := file.readline(MAX_LINE_BYTES + 1):
            number, left = number + 1, left - len(line)
            if len(line) > MAX_LINE_BYTES:
                raise ValueError(f"line {number} has more than {MAX_LINE_BYTES} bytes")
            if left < 0:
                raise ValueError(f"it has more than {MAX_FILE_BYTES} bytes")
            try:
                text = (line.removeprefix(_BYTE_ORDER_MARK) if number == 1 else line).decode()
            except UnicodeDecodeError as error:
                raise ValueError(f"line {number}: {_reason(error)}") from error
            if text.strip():
                yield number, text.rstrip("\r\n")


@contextmanager
def _refusing(path: Path, what: str, remedy: str) -> Iterator[None]:
    """Turns whatever reading a file raises into the one error."""
    try:
        yield
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        name = "standard input" if path == STDIN else str(path)
        called = f"{what} {name}" if what else name
        raise FileError(f"{called} cannot be read ({_reason(error)}); {remedy}") from error


def _opened(path: Path) -> AbstractContextManager[Any]:
    """A file of bytes."""
    if path == STDIN:
        if sys.stdin is None:
            raise OSError("it is closed")
        return nullcontext(sys.stdin.buffer)
    return gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb")


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is no text in UTF-8"
    if isinstance(error, RecursionError):
        return f"it nests deeper than {MAX_DEPTH} levels"
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"it has an integer of {len(digits)} digits, and {MAX_DIGITS} are allowed")
    return int(digits)


def _check_bounds(value: Any) -> None:
    """Refuses nesting, integers and text that code after it could not take, without recursion of its own."""
    left = [(value, 1)]
    while left:
        item, depth = left.pop()
        if isinstance(item, dict | list):
            if depth > MAX_DEPTH:
                raise RecursionError
            left += [(key, depth) for key in item] if isinstance(item, dict) else []
            left += [(part, depth + 1) for part in (item.values() if isinstance(item, dict) else item)]
        elif isinstance(item, str) and not _is_encodable(item):
            raise ValueError(f"it holds {_half_character(item)}")
        elif isinstance(item, int) and abs(item) >= 10**MAX_DIGITS:
            raise ValueError(f"it has an integer of more than {MAX_DIGITS} digits")


def _is_encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _half_character(text: str) -> str:
    half = next(character for character in text if "\ud800" <= character <= "\udfff")
    return f"half of a surrogate pair (\\u{ord(half):04x}), which is no character"
