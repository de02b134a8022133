"""The tokenizer that lies beside a checkpoint's weights."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from twotower_spec.errors import ArgumentError


def load_tokenizer(directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer that lies beside the weights, or None if there is none.

    Raises:
        ArgumentError: its files cannot be read.
    """
    try:
        if (directory / "tokenizer.json").is_file():
            fast: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(directory)
            return fast
        if (directory / "tokenizer_config.json").is_file():
            tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
            return tokenizer
    except Exception as error:  # tokenizers raises Exception itself; transformers whatever a malformed file leads to
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ArgumentError(f"the tokenizer in {directory} cannot be read ({reason}); repair its files") from error
    return None
