"""Prompts of the command line: read from arguments, text files and JSON lines, and encoded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import encode_texts
from twotower_spec.errors import ArgumentError, FileError
from twotower_spec.reading import check_text, read_rows

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
        prompt_file: one prompt per line; of JSON lines (.jsonl, .ndjson, .json) one object per line with "prompt",
            "text" or "token_ids". `-` is standard input.

    Raises:
        ArgumentError: none or several sources, or a line that cannot be read.
    """
    sources = [bool(texts), bool(token_ids), prompt_file is not None]
    if sum(sources) != 1:
        raise ArgumentError(
            f"{sum(sources)} sources of prompts were given; give one of a text, --token-ids or --prompt-file"
        )
    if texts:
        return [Prompt(text=check_text(text, f"prompt {i}")) for i, text in enumerate(texts)]
    if token_ids:
        return [Prompt(token_ids=_parse_ids(ids)) for ids in token_ids]
    assert prompt_file is not None
    prompts = [_prompt_of(row, place) for place, row in read_rows(prompt_file, "prompt file")]
    if not prompts:
        raise ArgumentError(f"prompt file {prompt_file} holds no prompt; give at least one line")
    return prompts


def encode(prompts: list[Prompt], tokenizer: PreTrainedTokenizerBase | None) -> list[Prompt]:
    """Adds token ids to prompts that have only text.

    Raises:
        ArgumentError: a text without a tokenizer, or one that the tokenizer does not take.
    """
    texts = [prompt.text or "" for prompt in prompts if prompt.token_ids is None]
    if not texts:
        return prompts
    if tokenizer is None:
        raise ArgumentError("the checkpoint has no tokenizer, so text cannot be encoded; give --token-ids 12,44,7")
    encoded = iter(encode_texts(tokenizer, texts))
    return [Prompt(prompt.text, next(encoded)) if prompt.token_ids is None else prompt for prompt in prompts]


def _parse_ids(ids: str) -> list[int]:
    try:
        return [int(part) for part in ids.split(",")]
    except ValueError as error:
        raise ArgumentError(f"--token-ids {ids!r} is not a list of ids; give integers like 12,44,7") from error


def _prompt_of(row: Mapping[str, Any], place: str) -> Prompt:
    ids = row.get("token_ids")
    if isinstance(ids, list) and all(isinstance(i, int) for i in ids):
        return Prompt(token_ids=ids)
    for name in _TEXT_FIELDS:
        if isinstance(row.get(name), str):
            return Prompt(text=row[name])
    raise FileError(f'{place} has no prompt; give an object with "prompt", "text" or "token_ids"')
