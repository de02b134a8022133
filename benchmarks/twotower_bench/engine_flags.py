"""Arguments of vLLM's `LLM()` as `vllm serve` takes them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def engine_flags(arguments: Mapping[str, Any]) -> list[str]:
    """Words of a command line; what is None is left to vLLM.

    Args:
        arguments: by name, of JSON values.
    """
    words: list[str] = []
    for name, value in arguments.items():
        flag = name.replace("_", "-")
        match value:
            case None:
                pass
            case bool():
                words.append(f"--{flag}" if value else f"--no-{flag}")
            case list() | tuple():
                words += [f"--{flag}", *map(_word, value)]
            case _:
                words += [f"--{flag}", _word(value)]
    return words


def _word(value: Any) -> str:
    return json.dumps(value) if isinstance(value, Mapping | list | tuple) else str(value)
