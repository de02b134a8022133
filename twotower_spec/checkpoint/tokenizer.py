"""The tokenizer beside a checkpoint's weights, and texts as its ids."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower_spec.checkpoint.index import TOKENIZER_FILES, resolve_checkpoint
from twotower_spec.errors import ArgumentError, FileError, TwoTowerError, first_line
from twotower_spec.reading import check_text, is_file, read_json


def find_tokenizer(
    name_or_path: str | Path, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase | None:
    """Reads the tokenizer of a directory or hub id; of the latter nothing else is downloaded.

    Args:
        name_or_path: directory or hub id.
        revision: of a hub id.
        trust_remote_code: run a tokenizer's own Python, for one without tokenizer.json.

    Returns:
        The tokenizer, or None if there is none.

    Raises:
        CheckpointError: it is neither a directory nor a hub id that can be downloaded.
        ArgumentError: its files cannot be read.
    """
    files = (*TOKENIZER_FILES, "config.json", *(["*.py"] if trust_remote_code else []))
    return load_tokenizer(resolve_checkpoint(name_or_path, revision, files), trust_remote_code)


def load_tokenizer(directory: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase | None:
    """Reads the tokenizer that lies beside the weights; None if there is none.

    Raises:
        ArgumentError: its files cannot be read.
    """
    try:
        if is_file(directory / "tokenizer.json"):
            fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory)
            return fast
        if is_file(directory / "tokenizer_config.json"):
            from transformers import AutoTokenizer  # brings all of transformers' models, which few checkpoints need

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code
            )
            return tokenizer
    except BaseException as error:
        if not _is_fault(error):
            raise
        raise ArgumentError(
            f"the tokenizer in {directory} cannot be read ({_reason(directory, error)}); repair its files"
        ) from error
    return None


def encode_texts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], what: str = "prompt", **options: Any
) -> list[list[int]]:
    """Token ids of texts.

    Args:
        tokenizer: any.
        texts: to encode.
        what: they are called in messages, with their number.
        options: of the tokenizer's call.

    Raises:
        ArgumentError: the tokenizer does not take a text.
    """
    encoded = []
    for number, text in enumerate(texts):
        try:
            encoded.append(list(tokenizer(check_text(text, f"{what} {number}"), **options)["input_ids"]))
        except TwoTowerError:
            raise
        except BaseException as error:
            if not _is_fault(error):
                raise
            raise ArgumentError(
                f"the tokenizer does not take {what} {number} ({first_line(error)}); write it otherwise"
            ) from error
    return encoded


def _is_fault(error: BaseException) -> bool:
    """Whether files or text are at fault: anything may be raised, by Rust even what is no `Exception`."""
    return isinstance(error, Exception) or type(error).__name__ == "PanicException"


def _reason(directory: Path, error: BaseException) -> str:
    """The first file that is no JSON, with its line; else what was raised."""
    for path in sorted(directory.glob("*token*.json")):
        try:
            read_json(path)
        except FileError as reason:
            return str(reason).partition("; ")[0]
    return first_line(error)
