"""Checkpoints as vLLM's settings name them: which are TwoTower's, and which are one and the same."""

from __future__ import annotations

from pathlib import Path

from transformers import PretrainedConfig
from transformers.utils.hub import cached_file

from twotower_spec.config import ARCHITECTURE


def is_two_tower(model: object, revision: object = None) -> bool:
    """Whether a directory or hub id holds a TwoTower checkpoint, by its config.json alone; never raises."""
    if not isinstance(model, str):
        return False
    try:
        if Path(model).is_dir() and not Path(model, "config.json").is_file():
            return False
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision)
        return ARCHITECTURE in (raw.get("architectures") or [])
    except Exception:  # whatever is wrong there, vLLM will say it
        return False


def is_same(model: str, revision: str | None, other: str, other_revision: str | None) -> bool:
    """Whether two names mean one checkpoint, also where one is a hub id and one its downloaded files; never raises."""
    try:
        one, another = (
            Path(str(cached_file(name, "config.json", revision=of))).parent
            for name, of in ((model, revision), (other, other_revision))
        )
        return one.samefile(another)
    except Exception:  # nothing is there, and what is loaded will say so
        return False
