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

from twotower_spec.errors import ArgumentError

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
    """Documents of a user's files: one per line of .jsonl (field "text"), otherwise the whole file.

    Raises:
        ArgumentError: a file is not there, empty, or no text.
    """
    for path in paths:
        try:
            content = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise ArgumentError(f"text file {path} cannot be read: {error}; give UTF-8 text or JSON lines") from error
        if not content.strip():
            raise ArgumentError(f"text file {path} is empty; give UTF-8 text or JSON lines")
        if path.suffix != ".jsonl":
            yield content
            continue
        for number, line in enumerate(content.split("\n"), 1):
            if line.strip():
                yield _text_of(line, path, number)


def _text_of(line: str, path: Path, number: int) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ArgumentError(f"{path}, line {number} is not JSON ({error}); give one object per line") from error
    if not isinstance(row, dict) or not isinstance(row.get("text"), str):
        raise ArgumentError(f'{path}, line {number} has no field "text"; give objects like {{"text": "..."}}')
    return str(row["text"])
