"""Writing of files as a whole: a failure leaves the file as it was before."""

from __future__ import annotations

import os
from pathlib import Path

from twotower_spec.errors import ArgumentError


def replace_file(path: Path, content: bytes) -> None:
    """Replaces a file as a whole: readers see the old file or the new one, never a part.

    Raises:
        OSError: it cannot be written; the old one stays.
    """
    partial = _partial(path)
    try:
        partial.write_bytes(content)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def make_folder(path: Path) -> None:
    """Makes a folder, with those above it, unless it is there.

    Raises:
        ArgumentError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArgumentError(f"folder {path} cannot be made ({error.strerror}); give another") from error


def check_writable(path: Path, option: str = "--json") -> None:
    """Refuses a file that could not be written in the end.

    Args:
        path: of the file.
        option: that names it.

    Raises:
        ArgumentError: with the reason.
    """
    try:
        if path.exists() and not path.is_file():
            raise ArgumentError(f"{option} {path} is not a regular file; give another")
        _partial(path).touch()
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be written ({error.strerror}); give another") from error
    _partial(path).unlink()


def write_atomically(path: Path, text: str, option: str = "--json") -> None:
    """Writes text as a file of its own.

    Raises:
        ArgumentError: it cannot be written; the old one stays.
    """
    content = text.encode()
    try:
        replace_file(path, content)
    except OSError as error:
        raise ArgumentError(f"{option} {path} cannot be written ({error.strerror}); give another") from error


def _partial(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}")
