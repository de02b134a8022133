"""The case: the models and the server that are examined, each thing read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from twotower_spec.checkpoint import CheckpointIndex, find_tokenizer, resolve_checkpoint
from twotower_spec.config import (
    ARCHITECTURE,
    TwoTowerConfig,
    architectures_of,
    check_experts_dtype,
    check_integer,
    read_config,
)
from twotower_spec.diagnosis.sample import Sample, load_sample
from twotower_spec.drafting.session import MOST_DRAFT_TOKENS
from twotower_spec.errors import ArgumentError, ConfigError, TwoTowerError
from twotower_spec.serving_memory import CONFIGURATION, ServingMemory, serving_memory
from twotower_spec.towers.model import computing_device

# Of one device: a pebibyte.
MOST_GIB = 1 << 20


def default_device() -> str:
    """Where vLLM would run a verifier: on CUDA where there is any."""
    return "cuda:0" if torch.cuda.is_available() else "cpu"


def holds_two_towers(name_or_path: str) -> bool:
    """Whether a directory or hub id holds a TwoTower checkpoint, by its config.json; False where none can be read."""
    try:
        return ARCHITECTURE in architectures_of(read_config(name_or_path))
    except ConfigError:
        return False


class FoundTokenizer(NamedTuple):
    """Tokenizer of a model, or the reason why there is none."""

    tokenizer: PreTrainedTokenizerBase | None
    reason: str = ""

    @classmethod
    def of_model(cls, name_or_path: str | Path) -> FoundTokenizer:
        """Reads that of a directory or hub id; one that cannot be read is none."""
        try:
            found = find_tokenizer(name_or_path)
        except TwoTowerError as error:
            return cls(None, str(error).partition("; ")[0])
        return cls(found, "" if found else f"{name_or_path} has no tokenizer")


@dataclass(frozen=True)
class Case:
    """A drafter, a verifier and the server of both that somebody wants to start.

    Attributes:
        drafter, verifier: directories or hub ids; None where none is named.
        revision: of the drafter's hub id.
        num_speculative_tokens, max_num_seqs, tensor_parallel_size, context_length: of the server.
        verifier_device, context_device, denoiser_device: where the models are; None for the verifier's.
        experts_dtype: of the drafter's experts, quantised while they load; None for as they are stored.
        memory_gib: memory of each device, in place of what this machine has; None for that.
        run: whether the short run is made; None where both models are small.
        is_bundled: whether nobody named the models.

    Raises:
        ArgumentError: a number is out of range, a dtype is unknown, or a device is not there.
    """

    drafter: str | None
    verifier: str | None = None
    revision: str | None = None
    num_speculative_tokens: int = 7
    max_num_seqs: int = 16
    tensor_parallel_size: int = 1
    context_length: int = 4096
    verifier_device: str = field(default_factory=default_device)
    context_device: str | None = None
    denoiser_device: str | None = None
    experts_dtype: str | None = None
    memory_gib: float | None = None
    run: bool | None = None
    is_bundled: bool = False

    def __post_init__(self) -> None:
        """Refuses numbers out of range, unknown dtypes and devices that are not there."""
        check_integer("--num-speculative-tokens", self.num_speculative_tokens, minimum=1, maximum=MOST_DRAFT_TOKENS)
        for name in ("max_num_seqs", "tensor_parallel_size", "context_length"):
            check_integer("--" + name.replace("_", "-"), getattr(self, name), minimum=1)
        for name in ("drafter", "verifier"):
            if getattr(self, name) == "":
                raise ArgumentError(f"--{name} '' names no model; give a directory or a hub id")
        if self.memory_gib is not None and not 0 < self.memory_gib <= MOST_GIB:
            raise ArgumentError(
                f"--memory-gib {self.memory_gib} is not allowed; give the GiB of a device, above 0 and up to {MOST_GIB}"
            )
        check_experts_dtype(self.experts_dtype)
        for device in self.devices:
            computing_device(device)

    @property
    def devices(self) -> tuple[str, str, str]:
        """Devices of the verifier's first rank, the context tower and the denoiser; of CUDA ones with their number."""
        verifier, context, denoiser = (
            "cuda:0" if device == "cuda" else device
            for device in (self.verifier_device, self.context_device, self.denoiser_device)
        )
        return str(verifier), context or str(verifier), denoiser or context or str(verifier)

    @cached_property
    def directory(self) -> Path:
        """Directory of the drafter."""
        return resolve_checkpoint(str(self.drafter), self.revision)

    @cached_property
    def config(self) -> TwoTowerConfig:
        """Configuration of the drafter as it is served, its experts quantised if they shall be."""
        return TwoTowerConfig.from_pretrained(self.directory).with_experts_dtype(self.experts_dtype)

    @cached_property
    def index(self) -> CheckpointIndex:
        """Tensors of the drafter."""
        return CheckpointIndex(self.directory)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """Tokenizer of the drafter; None where there is none that can be read."""
        return self.drafter_tokenizer.tokenizer

    @cached_property
    def drafter_tokenizer(self) -> FoundTokenizer:
        """Tokenizer of the drafter, or why there is none."""
        return FoundTokenizer.of_model(self.directory)

    @cached_property
    def verifier_tokenizer(self) -> FoundTokenizer:
        """Tokenizer of the verifier, or why there is none."""
        return FoundTokenizer.of_model(str(self.verifier))

    @cached_property
    def sample(self) -> Sample:
        """Drafter in memory, all of it or a layer of each kind."""
        return load_sample(self.config, self.index, *self.devices[1:])

    @cached_property
    def verifier_config(self) -> Mapping[str, Any]:
        """Content of the verifier's config.json; of hub ids nothing else is downloaded."""
        return read_config(resolve_checkpoint(str(self.verifier), files=CONFIGURATION))

    @property
    def is_pair(self) -> bool:
        """Whether both models are named, so that a server of them is examined."""
        return self.drafter is not None and self.verifier is not None

    @property
    def drafts_for_itself(self) -> bool:
        """Whether the verifier is a TwoTower checkpoint."""
        return self.verifier is not None and holds_two_towers(self.verifier)

    @cached_property
    def memory(self) -> ServingMemory:
        """Memory of both models in vLLM."""
        return serving_memory(
            str(self.drafter),
            str(self.verifier),
            num_speculative_tokens=self.num_speculative_tokens,
            max_num_seqs=self.max_num_seqs,
            tensor_parallel_size=self.tensor_parallel_size,
            context_length=self.context_length,
            experts_dtype=self.experts_dtype,
            revision=self.revision,
        )
