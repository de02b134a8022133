"""Saving in the published layout; a file appears under its final name only when it is whole."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from twotower_spec.checkpoint.index import INDEX_FILE, SINGLE_FILE
from twotower_spec.errors import CheckpointError

DEFAULT_SHARD_BYTES = 5 << 30


def save_checkpoint(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    dtypes: Mapping[str, torch.dtype],
    config_json: str,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Writes config.json and weights, in shards with an index when they are larger than one.

    Everything is written next to its final place first and moved there when all of it is complete. Files that an
    earlier checkpoint left in the directory under other shard names are removed then.

    Args:
        directory: is created; other files in it are left alone.
        tensors: published name to tensor, on any device.
        dtypes: dtype to write a tensor in, where it is not its own.
        config_json: text of config.json.
        max_shard_bytes: most bytes of tensors in one file.

    Raises:
        CheckpointError: the disk is full or cannot be written; nothing is left under the final names.
    """
    directory = Path(directory)
    sizes = {name: t.numel() * dtypes.get(name, t.dtype).itemsize for name, t in tensors.items()}
    try:
        if directory.exists() and not directory.is_dir():
            raise CheckpointError(f"{directory} is a file; give a directory to save the checkpoint in")
        directory.mkdir(parents=True, exist_ok=True)
        _check_space(directory, sum(sizes.values()))
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=directory) as name:
            draft = Path(name)
            shards = list(_shards(sizes, max_shard_bytes))
            files = _file_names(len(shards))
            for file, names in zip(files, shards, strict=True):
                content = {n: tensors[n].detach().to("cpu", dtypes.get(n, tensors[n].dtype)) for n in names}
                save_file({n: t.contiguous() for n, t in content.items()}, draft / file, metadata={"format": "pt"})
            if len(files) > 1:
                weight_map = {n: file for file, names in zip(files, shards, strict=True) for n in names}
                index = {
                    "metadata": {"total_size": sum(sizes.values())},
                    "weight_map": dict(sorted(weight_map.items())),
                }
                (draft / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
            (draft / "config.json").write_text(config_json)
            _make_readable(draft)
            _move_into_place(draft, directory)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"the checkpoint could not be saved in {directory} ({error}); free space or give "
            f"another directory, nothing was left there"
        ) from error


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise OSError(f"{needed} bytes are needed and {free} are free")


def _shards(sizes: Mapping[str, int], max_shard_bytes: int) -> Iterator[list[str]]:
    names: list[str] = []
    total = 0
    for name, size in sizes.items():
        if names and total + size > max_shard_bytes:
            yield names
            names, total = [], 0
        names.append(name)
        total += size
    yield names


def _file_names(count: int) -> list[str]:
    if count == 1:
        return [SINGLE_FILE]
    return [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _make_readable(draft: Path) -> None:
    """Gives every file the permissions of any new file: safetensors makes its files private to the user."""
    usual = (draft / "config.json").stat().st_mode
    for path in draft.iterdir():
        path.chmod(usual)


def _move_into_place(draft: Path, directory: Path) -> None:
    written = {path.name for path in draft.iterdir()}
    # config.json and the index come last: without them no reader takes the directory for a checkpoint.
    for name in sorted(written, key=lambda n: (n == "config.json", n == INDEX_FILE, n)):
        (draft / name).replace(directory / name)
    stale = [*directory.glob("model-*-of-*.safetensors"), directory / SINGLE_FILE, directory / INDEX_FILE]
    for path in stale:
        if path.name not in written:
            path.unlink(missing_ok=True)
