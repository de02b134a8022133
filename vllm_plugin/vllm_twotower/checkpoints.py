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
        folders = [_folder(model, revision), _folder(other, other_revision)]
        return folders[0].samefile(folders[1])
    except Exception:  # nothing is there, and what is loaded will say so
        return False


def _folder(name: str, revision: str | None) -> Path:
    """Folder with the config.json of a directory or of a commit in the hub cache."""
    file: str | None = cached_file(name, "config.json", revision=revision)
    if file is None:
        raise FileNotFoundError(name)
    return Path(file).parent  # not of what it links to: commits of a hub id share files
