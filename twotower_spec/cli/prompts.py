"""Prompts of the command line: read from arguments, text files and JSON lines, and encoded."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from twotower_spec.errors import ArgumentError

_TEXT_FIELDS = ("prompt", "text")


@dataclass(frozen=True)
class Prompt:
    """One prompt, as text, as token ids, or both once it is encoded."""

    text: str | None = None
    token_ids: list[int] | None = None


def read_prompts(texts: list[str], token_ids: list[str], prompt_file: Path | None) -> list[Prompt]:
    """Reads prompts from exactly one of the three sources.

    Args:
        texts: prompts as text.
        token_ids: comma-separated ids, one string per prompt.
        prompt_file: one prompt per line; with the suffix .jsonl one object per line with "prompt", "text" or
            "token_ids".

    Raises:
        ArgumentError: none or several sources, or a line that cannot be read.
    """
    sources = [bool(texts), bool(token_ids), prompt_file is not None]
    if sum(sources) != 1:
        raise ArgumentError(
            f"{sum(sources)} sources of prompts were given; give one of a text, --token-ids or --prompt-file"
        )
    if texts:
        return [Prompt(text=text) for text in texts]
    if token_ids:
        return [Prompt(token_ids=_parse_ids(ids)) for ids in token_ids]
    assert prompt_file is not None
    try:
        # utf-8-sig drops a byte order mark. Not splitlines(): JSON strings may hold Unicode's other line separators.
        lines = prompt_file.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArgumentError(f"prompt file {prompt_file} cannot be read ({error}); give a UTF-8 text file") from error
    parse = _parse_json if prompt_file.suffix == ".jsonl" else _parse_line
    prompts = [parse(line, f"{prompt_file}:{i}") for i, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise ArgumentError(f"prompt file {prompt_file} holds no prompt; give at least one line")
    return prompts


def encode(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
    """Adds token ids to prompts that have only text.

    Raises:
        ArgumentError: a text without a tokenizer.
    """
    if tokenizer is None and any(prompt.token_ids is None for prompt in prompts):
        raise ArgumentError("the checkpoint has no tokenizer, so text cannot be encoded; give --token-ids 12,44,7")
    return [
        prompt
        if prompt.token_ids is not None or tokenizer is None
        else Prompt(prompt.text, list(tokenizer(prompt.text)["input_ids"]))
        for prompt in prompts
    ]


def _parse_ids(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--token-ids {ids!r} is not a list of ids; give integers like 12,44,7") from error


def _parse_line(line: str, _where: str) -> Prompt:
    return Prompt(text=line)


def _parse_json(line: str, where: str) -> Prompt:
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise ArgumentError(f"{where} is not JSON ({error}); give one object per line") from error
    if isinstance(row, dict):
        ids = row.get("token_ids")
        if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
            return Prompt(token_ids=ids)
        for name in _TEXT_FIELDS:
            if isinstance(row.get(name), str):
                return Prompt(text=row[name])
    raise ArgumentError(f'{where} has no prompt; give an object with "prompt", "text" or "token_ids"')
