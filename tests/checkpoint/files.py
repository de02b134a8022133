"""Copies of the golden checkpoints to break, and the content of checkpoint files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.support.golden_files import checkpoint

INDEX = "model.safetensors.index.json"


def copy_checkpoint(name: str, parent: Path) -> Path:
    return Path(shutil.copytree(checkpoint(name), parent / name))


def stored_tensors(directory: Path) -> dict[str, Tensor]:
    """Every tensor of every shard, whatever the index says."""
    tensors: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        tensors |= load_file(shard)
    return tensors


def stored_bytes(directory: Path) -> dict[str, tuple[torch.dtype, list[int], bytes]]:
    """Dtype, shape and bits of every tensor."""
    return {
        name: (tensor.dtype, list(tensor.shape), tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, tensor in stored_tensors(directory).items()
    }


def file_bytes(directory: Path) -> dict[str, bytes]:
    """Every file below the directory, hidden ones included."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def change_shard(shard: Path, **changes: Tensor | None) -> None:
    """Rewrites a shard with some tensors replaced, added, or left out (None); `__` in a name stands for a dot."""
    tensors: dict[str, Any] = dict(load_file(shard))
    tensors |= {name.replace("__", "."): tensor for name, tensor in changes.items()}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, shard)


def read_index(directory: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((directory / INDEX).read_text())
    return content


def write_index(directory: Path, weight_map: dict[str, str]) -> None:
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
