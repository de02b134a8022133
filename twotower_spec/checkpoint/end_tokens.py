"""End tokens of a checkpoint: the ids at which vLLM ends a text of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from twotower_spec.errors import ConfigError
from twotower_spec.reading import is_file, read_json

# Sections of a config.json of several parts, of which transformers takes the first for the language model.
_LANGUAGE_MODELS = ("decoder", "generator", "text_config")


def end_token_ids(directory: Path, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int) -> list[int]:
    """Ids that end a text: the tokenizer's, and those of generation_config.json or, without one, of config.json.

    A file may name one id or a list of them. Ids that no text can hold are left out.

    Args:
        directory: of the checkpoint.
        tokenizer: of the checkpoint; None if it has none.
        vocab_size: ids that the model has.

    Returns:
        The ids in order, none twice.

    Raises:
        ConfigError: a file cannot be read, or what it names is no token id.

    Source: `try_get_generation_config` in vllm/transformers_utils/config.py, `GenerationConfig.from_model_config` of
    transformers, and `update_from_generation_config` in vllm/sampling_params.py.
    """
    named = _named(directory)
    own = tokenizer.eos_token_id if tokenizer is not None else None
    ids = {*named, *([own] if own is not None else [])}
    return sorted(token for token in ids if 0 <= token < vocab_size)


def _named(directory: Path) -> list[int]:
    """Ids that the files of a checkpoint name."""
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if is_file(path):
            value = _end_of(_object(path))
            ids = value if isinstance(value, list) else [] if value is None else [value]
            if not all(type(token) is int for token in ids):
                raise ConfigError(f"eos_token_id {value!r} in {path} is no token id; give one, or a list of them")
            return ids
    return []


def _object(path: Path) -> Mapping[str, Any]:
    try:
        content = read_json(path, remedy="download it again")
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path} holds no JSON object; download it again")
    return content


def _end_of(content: Mapping[str, Any]) -> Any:
    if content.get("eos_token_id") is not None:
        return content["eos_token_id"]
    part: Mapping[str, Any] = next(
        (content[name] for name in _LANGUAGE_MODELS if isinstance(content.get(name), dict)), {}
    )
    return part.get("eos_token_id")
