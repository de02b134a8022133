"""Loading of the tokenizer beside a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower_spec.checkpoint.index import TOKENIZER_FILES, resolve_checkpoint
from twotower_spec.errors import ArgumentError


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
        if (directory / "tokenizer.json").is_file():
            fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory)
            return fast
        if (directory / "tokenizer_config.json").is_file():
            from transformers import AutoTokenizer  # brings all of transformers' models, which few checkpoints need

            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                directory, trust_remote_code=trust_remote_code
            )
            return tokenizer
    except Exception as error:  # tokenizers raises Exception itself; transformers whatever a malformed file leads to
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ArgumentError(f"the tokenizer in {directory} cannot be read ({reason}); repair its files") from error
    return None
