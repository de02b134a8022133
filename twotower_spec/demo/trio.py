"""Paths of the bundled trio and its held-out prompts."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal

from twotower_spec.errors import CheckpointError

Model = Literal["verifier", "twotower", "draft"]
Category = Literal["maths", "python", "real"]
CATEGORIES: tuple[Category, ...] = ("maths", "python", "real")


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt that no model of the trio was trained on.

    Attributes:
        prompt: text.
        category: maths and python are generated; real is GSM8K's test split and held-out standard library files.
        held_out: what was kept from training: template, values, seed, split or file.
        source: template, row or file it comes from.
    """

    prompt: str
    category: Category
    held_out: str
    source: str


def trio_directory() -> Path:
    """The folder that holds the bundled models."""
    return Path(str(files("twotower_spec.demo") / "trio"))


def trio_path(model: Model) -> Path:
    """Directory of one of the bundled models.

    Raises:
        CheckpointError: the package was installed without its weights.
    """
    path = trio_directory() / model
    if not (path / "model.safetensors").is_file():
        raise CheckpointError(
            f"this installation has no bundled {model} ({path}); reinstall twotower-spec with its package data, or "
            f"train one with `twotower-spec train all`"
        )
    return path


@cache
def held_out_prompts(category: Category) -> tuple[HeldOutPrompt, ...]:
    """The held-out prompts of a category."""
    text = (files("twotower_spec.demo") / "prompts" / f"{category}.jsonl").read_text(encoding="utf-8")
    rows = [json.loads(line) for line in text.split("\n") if line]
    return tuple(HeldOutPrompt(row["prompt"], category, row["held_out"], row["source"]) for row in rows)
