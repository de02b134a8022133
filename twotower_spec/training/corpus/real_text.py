"""Real text whose licence allows shipping weights trained on it: GSM8K (MIT) and Python's standard library (PSF)."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

from twotower_spec.errors import FileError
from twotower_spec.reading import holds_json_lines, read_json_lines, read_text

CALCULATOR_MARK = re.compile(r"<<[^>]*>>")
LEFT_OUT = {
    "test",
    "tests",
    "idlelib",
    "lib2to3",
    "encodings",
    "site-packages",
    "dist-packages",
    "ensurepip",
    "turtledemo",
}
# How messages call a user's file, and what they ask for.
_CALLED = ("text file", "give UTF-8 text, or JSON lines with the field text")
# One file in this many is held out, chosen by a hash of its path.
HELD_OUT_FILES = 20


def word_problem(row: dict[str, str]) -> tuple[str, str]:
    """Question and answer of a GSM8K row, in the form of the generated problems; calculator marks are removed."""
    steps, _, result = CALCULATOR_MARK.sub("", row["answer"]).partition("\n#### ")
    return f"Question: {row['question'].strip()}\nAnswer:", f" {steps.strip()}\nThe answer is {result.strip()}.\n"


def gsm8k_train() -> Iterator[str]:
    """The training problems of GSM8K, which lie in this package.

    Source: openai/grade-school-math, MIT licence (see data/README.md).
    """
    data = files("twotower_spec.training") / "data" / "gsm8k_train.jsonl.gz"
    for line in gzip.decompress(data.read_bytes()).decode().splitlines():
        yield "".join(word_problem(json.loads(line)))


def standard_library(held_out: bool = False) -> Iterator[tuple[str, str]]:
    """Name and text of the modules of the running interpreter's standard library, tests and tables left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root).as_posix()
        if LEFT_OUT & set(name.split("/")[:-1]) or is_held_out(name) != held_out:
            continue
        text = path.read_bytes().decode("utf-8", errors="ignore").replace("\r\n", "\n")
        if text.strip():
            yield name, text


def is_held_out(name: str) -> bool:
    """Whether a module is kept out of training, by a hash of its path within the library."""
    return hashlib.sha256(name.encode()).digest()[0] % HELD_OUT_FILES == 0


def user_texts(paths: list[Path]) -> Iterator[str]:
    """Documents of a user's files: one per line of JSON lines (field "text"), otherwise the whole file.

    Raises:
        FileError: a file is not there, empty, or no text.
    """
    for path in paths:
        documents = _texts_of_rows(path) if holds_json_lines(path) else [read_text(path, *_CALLED)]
        is_empty = True
        for text in documents:
            is_empty = is_empty and not text.strip()
            yield text
        if is_empty:
            raise FileError(f"{_CALLED[0]} {path} is empty; {_CALLED[1]}")


def _texts_of_rows(path: Path) -> Iterator[str]:
    for place, row in read_json_lines(path, *_CALLED):
        if not isinstance(row.get("text"), str):
            raise FileError(f'{place} has no field "text"; give objects like {{"text": "..."}}')
        yield row["text"]
