"""Memory that a verifier and its TwoTower drafter take in vLLM, by their configurations; no weights are read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from twotower_spec.cache_shape import CacheShape, cache_shape, dtype_of
from twotower_spec.checkpoint import resolve_checkpoint
from twotower_spec.checkpoint.index import INDEX_FILE
from twotower_spec.config import (
    ARCHITECTURE,
    DiffusionConfig,
    TwoTowerConfig,
    accumulation_dtype,
    architectures_of,
    check_integer,
    read_config,
)
from twotower_spec.drafting.session import DEFAULT_NUM_TOKENS, MOST_DEFAULT_SLOTS, MOST_DRAFT_TOKENS
from twotower_spec.errors import CheckpointError, TwoTowerError
from twotower_spec.model import as_dtype
from twotower_spec.reading import read_json
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE
from twotower_spec.towers.model import towers_without_memory

Holder = Literal["drafter", "verifier"]
Per = Literal["", "request", "token"]

# Files of a hub id that are downloaded.
CONFIGURATION = ("config.json", INDEX_FILE)
# In a verifier with Mamba layers every draft of a request holds a state of its own; else a block is the bound.
FEW_DRAFTS, MANY_DRAFTS = (3, 7), (7, DiffusionConfig().block_size - 1)


@dataclass(frozen=True)
class MemoryLine:
    """Bytes of one kind, and the formula that gives them.

    Attributes:
        holder: drafter or verifier.
        name: what takes them.
        formula: why so many; "" for weights.
        num_bytes: of one; None where no configuration says it.
        per: what there are `count` of: requests or tokens; "" for one alone.
        count: how many.
    """

    holder: Holder
    name: str
    formula: str
    num_bytes: int | None
    per: Per = ""
    count: int = 1

    @property
    def total(self) -> int | None:
        """Bytes of all."""
        return None if self.num_bytes is None else self.num_bytes * self.count


@dataclass(frozen=True)
class ServingMemory:
    """Memory of a verifier and its drafter in vLLM, and what to set.

    Attributes:
        num_speculative_tokens, max_num_seqs, tensor_parallel_size: what it is computed for.
        lines: of both; the verifier's are those of one tensor-parallel rank.
        has_one_context_tower: whether the drafter reads the verifier's own state, which is the same model's.
        num_drafts: fewest and most drafts that are a sensible choice.
        state_bytes: of one Mamba state of the verifier, which every draft of a request has; 0 without any.
        unknown: why lines of the verifier's cache are missing; "" where none is.
    """

    num_speculative_tokens: int
    max_num_seqs: int
    tensor_parallel_size: int
    lines: tuple[MemoryLine, ...]
    has_one_context_tower: bool
    num_drafts: tuple[int, int]
    state_bytes: int
    unknown: str

    @property
    def max_num_batched_tokens(self) -> int:
        """Fewest tokens of a step with which no running request is left out of it."""
        return self.max_num_seqs * (1 + self.num_speculative_tokens)

    def as_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        lines = [{**asdict(line), "total": line.total} for line in self.lines]
        return {**asdict(self), "lines": lines, "max_num_batched_tokens": self.max_num_batched_tokens}


def serving_memory(
    drafter: str | Path,
    verifier: str | Path,
    *,
    num_speculative_tokens: int = FEW_DRAFTS[1],
    max_num_seqs: int = 16,
    tensor_parallel_size: int = 1,
    context_length: int = 4096,
    dtype: torch.dtype | str | None = None,
    experts_dtype: str | None = None,
    revision: str | None = None,
) -> ServingMemory:
    """Adds up what a verifier and its drafter need in vLLM.

    Args:
        drafter: TwoTower checkpoint, a directory or a hub id.
        verifier: a language model, likewise; of hub ids config.json and the index of shards are downloaded.
        num_speculative_tokens: drafts per request and step.
        max_num_seqs: requests that vLLM runs at once.
        tensor_parallel_size: ranks that share the verifier; the first one has the drafter, too.
        context_length: tokens per request.
        dtype: of both; None for the verifier's.
        experts_dtype: of the drafter's experts, quantised while they load; None for as they are stored.
        revision: of the drafter's hub id.

    Raises:
        TwoTowerError: a number is out of range, or a config.json cannot be read.
    """
    check_integer("--num-speculative-tokens", num_speculative_tokens, minimum=1, maximum=MOST_DRAFT_TOKENS)
    check_integer("--max-num-seqs", max_num_seqs, minimum=1)
    check_integer("--tensor-parallel-size", tensor_parallel_size, minimum=1)
    check_integer("--context-length", context_length, minimum=0)
    config = TwoTowerConfig.from_pretrained(drafter, revision).with_experts_dtype(experts_dtype)
    directory = resolve_checkpoint(verifier, files=CONFIGURATION)
    raw = read_config(directory)
    verifier_dtype = as_dtype(dtype) or dtype_of(raw)
    cache = cache_shape(config.to_dict(), verifier_dtype if verifier_dtype == torch.float32 else torch.bfloat16)
    # vLLM's ranks each hold a part of the state, which a drafter on one of them cannot read.
    has_one = tensor_parallel_size == 1 and resolve_checkpoint(drafter, revision, CONFIGURATION).samefile(directory)
    lines = _drafter_lines(config, cache, min(max_num_seqs, MOST_DEFAULT_SLOTS), context_length, has_one)
    lines.append(MemoryLine("verifier", "weights", "", _weights(raw, directory, verifier_dtype, tensor_parallel_size)))
    num_drafts, state_bytes, unknown = FEW_DRAFTS, 0, ""
    try:
        shape = cache_shape(raw, verifier_dtype).on_rank(tensor_parallel_size)
        lines += _verifier_lines(shape, num_speculative_tokens, max_num_seqs, context_length)
        num_drafts = FEW_DRAFTS if shape.has_states else MANY_DRAFTS
        state_bytes, _ = shape.state(num_speculative_tokens)
    except CheckpointError as error:
        unknown = str(error)
    sizes = num_speculative_tokens, max_num_seqs, tensor_parallel_size
    return ServingMemory(*sizes, tuple(lines), has_one, num_drafts, state_bytes, unknown)


def _weights(raw: Mapping[str, Any], directory: Path, dtype: torch.dtype, num_ranks: int) -> int | None:
    """Bytes of the verifier's weights on one rank, as they are stored; None where only the shards would say it."""
    if ARCHITECTURE in architectures_of(raw):
        context = towers_without_memory(TwoTowerConfig.from_dict(raw), dtype, with_denoiser=False).context
        return _bytes_of(context) // num_ranks
    total: Any = None
    try:
        total = read_json(directory / INDEX_FILE)["metadata"]["total_size"]
    except (TwoTowerError, KeyError, TypeError):
        total = sum(file.stat().st_size for file in directory.glob("*.safetensors"))
    return int(total) // num_ranks if isinstance(total, int | float) and total > 0 else None


def _drafter_lines(
    config: TwoTowerConfig, cache: CacheShape, num_requests: int, context_length: int, has_one_context_tower: bool
) -> list[MemoryLine]:
    towers = towers_without_memory(config, cache.dtype)
    denoiser = MemoryLine("drafter", "denoiser tower", "", _bytes_of(towers.denoiser))
    if has_one_context_tower:
        return [denoiser]
    num_tokens = num_requests * min(context_length, DEFAULT_NUM_TOKENS)
    num_held = -(-num_tokens // DEFAULT_PAGE_SIZE) * DEFAULT_PAGE_SIZE
    state, state_formula = cache.state()
    keys, keys_formula = cache.keys_and_values()
    size = accumulation_dtype(cache.dtype).itemsize
    block_size = DiffusionConfig().block_size
    lines = [
        MemoryLine("drafter", "context tower", "", _bytes_of(towers.context)),
        denoiser,
        MemoryLine("drafter", "Mamba states", state_formula, state, "request", num_requests),
        MemoryLine("drafter", "keys and values", keys_formula, keys, "token", num_held),
        MemoryLine(
            "drafter",
            "last logits",
            f"{config.vocab_size} ids x {size} B",
            config.vocab_size * size,
            "request",
            num_requests,
        ),
        MemoryLine(
            "drafter",
            "copied keys",
            f"the same, with blocks of {block_size}, for a denoiser on a CPU",
            keys,
            "token",
            num_held + num_requests * block_size,
        ),
        MemoryLine(
            "drafter",
            "mirror",
            "states, keys and values once more, for a denoiser on a device of its own",
            state * num_requests + keys * (num_held + DEFAULT_PAGE_SIZE),
        ),
        MemoryLine(
            "drafter",
            "scratch",
            f"a state, and keys of {DEFAULT_PAGE_SIZE} tokens, for passes of fixed shape: on CUDA and on runner V2",
            state + keys * DEFAULT_PAGE_SIZE,
        ),
    ]
    return [line for line in lines if line.num_bytes]


def _verifier_lines(
    shape: CacheShape, num_speculative_tokens: int, max_num_seqs: int, context_length: int
) -> list[MemoryLine]:
    state, state_formula = shape.state(num_speculative_tokens)
    keys, keys_formula = shape.keys_and_values()
    # vLLM's `MambaSpec.max_memory_usage_bytes`: in mode align the state at the last block's end and one at the end of a
    # prompt are held beside.
    num_drafts = num_speculative_tokens
    lines = [
        MemoryLine(
            "verifier",
            f"Mamba states, {mode}",
            f"({others} + {num_drafts}) x {what}",
            (others + num_drafts) * state,
            "request",
            max_num_seqs,
        )
        for mode, others, what in (("none", 1, state_formula), ("align", 3, "the same"))
    ]
    lines.append(MemoryLine("verifier", "keys and values", keys_formula, keys, "token", max_num_seqs * context_length))
    return [line for line in lines if line.num_bytes]


def _bytes_of(tower: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in tower.parameters())
