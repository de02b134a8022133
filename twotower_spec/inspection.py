"""Inspection of a checkpoint: its content, the memory it would need, and its problems; no weights are read."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from twotower_kernels.experts import FOUR_BITS
from twotower_spec.checkpoint import CheckpointIndex, compare_with_index, find_tokenizer, resolve_checkpoint
from twotower_spec.checkpoint.index import StoredTensor, part_of
from twotower_spec.checkpoint.quantised import weight_of_scale
from twotower_spec.config import DiffusionConfig, TwoTowerConfig, check_experts_dtype, read_config
from twotower_spec.drafting.vocabulary import VocabularyComparison, compare_vocabularies
from twotower_spec.errors import ArgumentError, CheckpointError, ConfigError, TwoTowerError
from twotower_spec.model import as_dtype, stored_dtype
from twotower_spec.towers.model import TwoTowers, towers_without_memory


@dataclass(frozen=True)
class PartSummary:
    """Tensors of one tower as they are stored: number, parameters, bytes, and tensors per dtype."""

    num_tensors: int
    num_parameters: int
    num_bytes: int
    dtypes: dict[str, int]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of memory that loading and serving would take.

    Attributes:
        dtype: of the weights in memory.
        experts_dtype: of routed experts that are quantised; None for the same.
        num_requests: requests held at once.
        context_length: tokens per request.
        context_weights, denoiser_weights: towers with their heads; the denoiser with the time conditioning.
        state_per_request: Mamba states, keys and values of one request in the pool, on the context tower's device.
        block_context_per_request: the read-only view of it that the denoiser holds during a block.
    """

    dtype: str
    experts_dtype: str | None
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
        memory: None if config.json is refused, or makes what no memory holds.
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
    experts_dtype: str | None = None,
    num_requests: int = 1,
    context_length: int = 4096,
) -> Inspection:
    """Looks at a checkpoint without reading its weights.

    Args:
        name_or_path: directory or hub id.
        revision: of a hub id.
        dtype: of the weights in memory, for the estimate; None for the stored one.
        experts_dtype: of routed experts that are quantised while they load, for the estimate; None for as stored.
        num_requests: requests held at once, for the estimate.
        context_length: tokens per request, for the estimate.

    Raises:
        CheckpointError: there is no such directory or hub id.
        ArgumentError: a dtype is unknown, or experts are not quantised to it.
    """
    wanted_dtype = as_dtype(dtype)
    check_experts_dtype(experts_dtype)
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
    towers: TwoTowers | None = None
    if config:
        try:
            load_dtype = wanted_dtype or (
                stored_dtype(index, config) if index is not None else config.dtype or torch.float32
            )
            towers = towers_without_memory(config.with_experts_dtype(experts_dtype), load_dtype)
        except ConfigError as error:
            problems.append(str(error))
    if index is not None:
        problems += compare_with_index(index, towers.checkpoint_tensors()) if towers else index.problems
    memory = _estimate(towers, num_requests, context_length) if towers else None
    return Inspection(directory, config, _summarise(index) if index is not None else {}, memory, problems)


@dataclass(frozen=True)
class VerifierMatch:
    """Whether a TwoTower checkpoint can draft for a verifier.

    Attributes:
        drafter_rows, verifier_rows: token ids that each embedding table holds.
        vocabulary: what those ids mean in both.
    """

    drafter_rows: int
    verifier_rows: int
    vocabulary: VocabularyComparison

    @property
    def shares_tokenizer(self) -> bool:
        """Whether ids were compared and none means two tokens."""
        return self.vocabulary.num_compared > 0 and not self.vocabulary.differences


def compare_with_verifier(drafter: str | Path, verifier: str | Path, *, revision: str | None = None) -> VerifierMatch:
    """Compares the tokenizers of a TwoTower checkpoint and a verifier.

    Only config.json and tokenizer files are read, and of hub ids nothing else is downloaded.

    Args:
        drafter: TwoTower checkpoint, a directory or a hub id.
        verifier: any language model, a directory or a hub id.
        revision: of the drafter's hub id.

    Raises:
        ConfigError: the drafter is no TwoTower checkpoint.
        CheckpointError: a model cannot be found, or the verifier's config.json does not say how many ids it has.
        ArgumentError: a tokenizer is missing or cannot be read.
    """
    drafter_rows = TwoTowerConfig.from_pretrained(drafter, revision).vocab_size
    verifier_rows = num_token_ids(verifier)
    vocabulary = compare_vocabularies(
        _tokenizer_of(verifier), _tokenizer_of(drafter, revision), verifier_rows, drafter_rows
    )
    return VerifierMatch(drafter_rows, verifier_rows, vocabulary)


def num_token_ids(verifier: str | Path) -> int:
    """Rows of the embedding table by config.json; models of several parts keep them in a part's own section.

    Raises:
        CheckpointError: the model cannot be found, or its config.json does not say it.
    """
    directory = resolve_checkpoint(verifier, files=["config.json"])
    try:
        raw = read_config(directory)
        sections = [raw, *(part for part in raw.values() if isinstance(part, dict))]
    except ConfigError:
        sections = []
    for section in sections:
        if isinstance(section.get("vocab_size"), int):
            return int(section["vocab_size"])
    raise CheckpointError(
        f"{verifier} has no config.json that names its vocab_size; give the directory or hub id of a language model"
    )


def _tokenizer_of(model: str | Path, revision: str | None = None) -> PreTrainedTokenizerBase:
    tokenizer = find_tokenizer(model, revision)
    if tokenizer is None:
        raise ArgumentError(
            f"{model} has no tokenizer, without which it cannot be seen what its ids mean; put its tokenizer.json there"
        )
    return tokenizer


def _summarise(index: CheckpointIndex) -> dict[str, PartSummary]:
    parts = {}
    for part in ("context", "denoiser", "other"):
        tensors = [(name, stored) for name, stored in index.items() if (part_of(name) or "other") == part]
        if tensors or part != "other":
            parts[part] = PartSummary(
                num_tensors=len(tensors),
                num_parameters=sum(_num_parameters(name, stored) for name, stored in tensors),
                num_bytes=sum(stored.nbytes for _, stored in tensors),
                dtypes=dict(Counter(str(stored.dtype).removeprefix("torch.") for _, stored in tensors)),
            )
    return parts


def _num_parameters(name: str, stored: StoredTensor) -> int:
    """Weights in a stored tensor: two in a byte of four bits each, and none in scales."""
    if weight_of_scale(name) is not None:
        return 0
    return torch.Size(stored.shape).numel() * (2 if stored.dtype == FOUR_BITS else 1)


def _estimate(towers: TwoTowers, num_requests: int, context_length: int) -> MemoryEstimate:
    config, dtype = towers.config, towers.dtype

    def weight_bytes(tower: torch.nn.Module) -> int:
        return sum(p.numel() * p.element_size() for p in tower.parameters())

    mamba, per_token = config.mamba_bytes_per_request(dtype), config.kv_bytes_per_token(dtype)
    return MemoryEstimate(
        dtype=str(dtype).removeprefix("torch."),
        experts_dtype=config.experts_dtype,
        num_requests=num_requests,
        context_length=context_length,
        context_weights=weight_bytes(towers.context),
        denoiser_weights=weight_bytes(towers.denoiser),
        state_per_request=mamba + context_length * per_token,
        block_context_per_request=mamba + (context_length + DiffusionConfig().block_size) * per_token,
    )
