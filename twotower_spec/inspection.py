"""What is in a checkpoint, what it would need in memory, and what is wrong with it; no weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from twotower_spec.checkpoint import CheckpointIndex, compare_with_index, resolve_checkpoint
from twotower_spec.checkpoint.index import part_of
from twotower_spec.config import DiffusionConfig, TwoTowerConfig
from twotower_spec.errors import TwoTowerError
from twotower_spec.model import as_dtype, stored_dtype
from twotower_spec.towers.model import TwoTowers


@dataclass(frozen=True)
class PartSummary:
    """Tensors of one tower as they are stored: number, parameters, bytes, and tensors per dtype."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that loading and serving would take.

    Attributes:
        dtype: of the weights in memory.
        num_requests: requests held at once.
        context_length: tokens per request.
        context_weights, denoiser_weights: towers with their heads; the denoiser with the time conditioning.
        state_per_request: Mamba states, keys and values of one request in the pool, on the context tower's device.
        block_context_per_request: the read-only view of it that the denoiser holds during a block.
    """

    dtype: str
    num_requests: int
    context_length: int
    context_weights: int
    denoiser_weights: int
    state_per_request: int
    block_context_per_request: int

    @property
    def context_device(self) -> int:
        """Bytes on the context tower's device."""
        return self.context_weights + self.num_requests * self.state_per_request

    @property
    def denoiser_device(self) -> int:
        """Bytes on the denoiser's device."""
        return self.denoiser_weights + self.num_requests * self.block_context_per_request


@dataclass(frozen=True)
class Inspection:
    """Everything `inspect` shows.

    Attributes:
        directory: of the checkpoint.
        config: None if config.json is refused.
        parts: per tower ("context", "denoiser", and "other" for names of neither).
        memory: None if config.json is refused.
        problems: one sentence each; empty if the checkpoint can be loaded.
    """

    directory: Path
    config: TwoTowerConfig | None
    parts: dict[str, PartSummary]
    memory: MemoryEstimate | None
    problems: list[str]


def inspect_checkpoint(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    dtype: torch.dtype | str | None = None,
    num_requests: int = 1,
    context_length: int = 4096,
) -> Inspection:
    """Looks at a checkpoint without reading its weights.

    Args:
        name_or_path: directory or hub id.
        revision: of a hub id.
        dtype: of the weights in memory, for the estimate; None for the stored one.
        num_requests: requests held at once, for the estimate.
        context_length: tokens per request, for the estimate.

    Raises:
        CheckpointError: there is no such directory or hub id.
        ArgumentError: the dtype is unknown.
    """
    wanted_dtype = as_dtype(dtype)
    directory = resolve_checkpoint(name_or_path, revision)
    problems: list[str] = []
    config: TwoTowerConfig | None = None
    index: CheckpointIndex | None = None
    try:
        config = TwoTowerConfig.from_pretrained(directory)
    except TwoTowerError as error:
        problems.append(str(error))
    try:
        index = CheckpointIndex(directory)
    except TwoTowerError as error:
        problems.append(str(error))
    if config and index:
        expected = dict(TwoTowers(config, context_device="meta").checkpoint_tensors())
        problems += compare_with_index(index, expected)
    elif index:
        problems += index.problems
    memory = None
    if config:
        load_dtype = wanted_dtype or (stored_dtype(index, config) if index else config.dtype or torch.float32)
        memory = _estimate(config, load_dtype, num_requests, context_length)
    return Inspection(directory, config, _summarise(index) if index else {}, memory, problems)


def _summarise(index: CheckpointIndex) -> dict[str, PartSummary]:
    parts = {}
    for part in ("context", "denoiser", "other"):
        tensors = [stored for name, stored in index.items() if (part_of(name) or "other") == part]
        if tensors or part != "other":
            parts[part] = PartSummary(
                num_tensors=len(tensors),
                num_parameters=sum(torch.Size(t.shape).numel() for t in tensors),
                num_bytes=sum(t.nbytes for t in tensors),
                dtypes=dict(Counter(str(t.dtype).removeprefix("torch.") for t in tensors)),
            )
    return parts


def _estimate(config: TwoTowerConfig, dtype: torch.dtype, num_requests: int, context_length: int) -> MemoryEstimate:
    towers = TwoTowers(config, dtype, context_device="meta")

    def weight_bytes(tower: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in tower.parameters())

    mamba, per_token = config.mamba_bytes_per_request(dtype), config.kv_bytes_per_token(dtype)
    return MemoryEstimate(
        dtype=str(dtype).removeprefix("torch."),
        num_requests=num_requests,
        context_length=context_length,
        context_weights=weight_bytes(towers.context),
        denoiser_weights=weight_bytes(towers.denoiser),
        state_per_request=mamba + context_length * per_token,
        block_context_per_request=mamba + (context_length + DiffusionConfig().block_size) * per_token,
    )
