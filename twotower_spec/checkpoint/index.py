"""Index of a checkpoint: the shard and the part of the model that each tensor belongs to; reads headers only."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open

from twotower_spec.checkpoint.quantised import STORED_EXPERT_DTYPES, may_be_quantised
from twotower_spec.errors import CheckpointError, FileError, first_line
from twotower_spec.reading import is_directory, is_file, read_json

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

# Time conditioning belongs to the denoiser: it is placed and loaded with it.
PARTS = {
    "context": ("context_tower.", "context_lm_head."),
    "denoiser": ("denoiser_tower.", "lm_head.", "t_embedder.", "t_block.", "scale_shift_tables."),
}

# Buffers of rotary embeddings, which old files hold though they are computed: nothing here reads them.
_COMPUTED = (".inv_freq", ".cos_cached", ".sin_cached")

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.tiktoken")
_ALL_FILES = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja")


@dataclass(frozen=True)
class StoredTensor:
    """Place, shape and dtype of one stored tensor."""

    shard: Path
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the stored tensor."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize


def part_of(name: str) -> str | None:
    """Names the part that a tensor belongs to: `context`, `denoiser`, or None for neither."""
    for part, prefixes in PARTS.items():
        if name.startswith(prefixes):
            return part
    return None


def resolve_checkpoint(
    name_or_path: str | Path, revision: str | None = None, files: Iterable[str] = _ALL_FILES
) -> Path:
    """Finds the local directory of a checkpoint; a hub id is downloaded.

    Args:
        name_or_path: directory or hub id.
        revision: of a hub id.
        files: patterns of those that are downloaded; by default safetensors, json and tokenizer files.

    Raises:
        CheckpointError: it is neither a directory nor a hub id that can be downloaded.
    """
    directory = Path(name_or_path)
    if is_directory(directory):
        return directory
    if is_file(directory):
        raise CheckpointError(f"{directory} is a file; give the directory that holds config.json and the weights")
    try:
        return Path(snapshot_download(str(name_or_path), revision=revision, allow_patterns=list(files)))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = first_line(error)
        raise CheckpointError(
            f"{str(name_or_path)!r} is neither a directory here nor a hub id that can be downloaded ({reason}); "
            f"check the path, or download the checkpoint first"
        ) from error


class CheckpointIndex(Mapping[str, StoredTensor]):
    """Every tensor of a checkpoint by its published name.

    Attributes:
        directory: where the checkpoint is.
        problems: disagreements between the index file and the shards, one sentence each.
    """

    def __init__(self, directory: Path) -> None:
        """Reads the headers of all shards.

        Raises:
            CheckpointError: no safetensors there, or a shard is missing, truncated, corrupt or of an unknown dtype.
        """
        self.directory = directory
        self.problems: list[str] = []
        self._tensors: dict[str, StoredTensor] = {}
        listed = self._listed_shards()
        for shard in sorted(set(listed.values())) if listed else [SINGLE_FILE]:
            for name, tensor in _read_header(directory / shard):
                if listed and name not in listed:
                    self.problems.append(f"{name} is in {shard} but {INDEX_FILE} does not list it")
                elif listed and listed[name] != shard:
                    self.problems.append(f"{name} is in {shard} but {INDEX_FILE} places it in {listed[name]}")
                self._tensors[name] = tensor
        for name, shard in listed.items():
            if name not in self._tensors:
                self.problems.append(f"{name} is not in {shard}, where {INDEX_FILE} places it")

    def __getitem__(self, name: str) -> StoredTensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def _listed_shards(self) -> dict[str, str]:
        """Maps tensor names to shard file names, as the index file lists them; empty for a single file."""
        path = self.directory / INDEX_FILE
        if not path.is_file():
            if not (self.directory / SINGLE_FILE).is_file():
                raise CheckpointError(_no_safetensors(self.directory))
            return {}
        try:
            listed = read_json(path)["weight_map"]
            shards = {str(name): str(shard) for name, shard in listed.items() if not name.endswith(_COMPUTED)}
            if not shards:
                raise ValueError("weight_map is empty")
        except FileError as error:
            raise CheckpointError(f"{path} is not a safetensors index ({error})") from error
        except (ValueError, KeyError, AttributeError, TypeError) as error:
            raise CheckpointError(f"{path} is not a safetensors index ({error!r}); download it again") from error
        files = sorted(set(shards.values()))
        outside = [shard for shard in files if Path(shard).is_absolute() or ".." in Path(shard).parts]
        if outside:
            raise CheckpointError(
                f"{path} names a shard outside its folder, {outside[0]!r}; shards lie beside the index, a link there "
                f"may point elsewhere"
            )
        absent = [shard for shard in files if not is_file(self.directory / shard)]
        if absent:
            raise CheckpointError(f"{path} names shards that are not there: {', '.join(absent)}; download them again")
        return shards


def _no_safetensors(directory: Path) -> str:
    pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for p in directory.glob(pattern))
    if pickles:
        return (
            f"{directory} holds weights as {', '.join(pickles)}, which can run code when read; only safetensors is "
            f"read here, convert them first"
        )
    return f"{directory} has neither {SINGLE_FILE} nor {INDEX_FILE}; give the directory of a TwoTower checkpoint"


def _read_header(shard: Path) -> Iterator[tuple[str, StoredTensor]]:
    try:
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 (not a mapping)
                if name.endswith(_COMPUTED):
                    continue
                piece = opened.get_slice(name)
                dtype = str(piece.get_dtype())
                known = _DTYPES | STORED_EXPERT_DTYPES if may_be_quantised(name) else _DTYPES
                if dtype not in known:
                    raise CheckpointError(
                        f"{name} in {shard.name} has dtype {dtype}, {_meaning(dtype)}; allowed are "
                        f"{', '.join(_DTYPES)}, use the checkpoint as it was published"
                    )
                yield name, StoredTensor(shard, known[dtype], tuple(piece.get_shape()))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{shard} is truncated or corrupt ({error}); download it again") from error


def _meaning(dtype: str) -> str:
    """Describes a dtype that no weights here have, by its safetensors name."""
    if dtype.startswith(("I", "U")):
        return "integers"
    if dtype == "BOOL":
        return "truth values"
    return "floats of quantised weights" if dtype.startswith("F") else "numbers that are not read here"
