"""The model that a user holds: towers that are loaded, saved, placed on devices, and generate."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from twotower_spec.checkpoint import CheckpointIndex, check_fit, load_tensors, resolve_checkpoint, save_checkpoint
from twotower_spec.checkpoint.index import part_of
from twotower_spec.checkpoint.loading import stored_dtypes
from twotower_spec.checkpoint.saving import DEFAULT_SHARD_BYTES
from twotower_spec.config import TORCH_DTYPES, TwoTowerConfig
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.published import GeneratingTowers
from twotower_spec.towers.initialisation import initialise_
from twotower_spec.towers.model import towers_without_memory


class TwoTowerModel(GeneratingTowers):
    """A TwoTower checkpoint in memory: its towers, and the ways they generate.

    It stands above the generation loops, so that the towers below need not know them.
    """

    _stored_dtypes: dict[str, torch.dtype] | None = None

    @classmethod
    def from_pretrained(
        cls,
        name_or_path: str | Path,
        *,
        revision: str | None = None,
        towers: Literal["both", "context", "denoiser"] = "both",
        dtype: torch.dtype | str | None = None,
        denoiser_dtype: torch.dtype | str | None = None,
        denoiser_experts_per_token: int | None = None,
        experts_dtype: str | None = None,
        context_device: torch.device | str = "cpu",
        denoiser_device: torch.device | str | None = None,
        progress: bool | None = None,
    ) -> TwoTowerModel:
        """Loads a checkpoint in the published layout.

        Weights are streamed into place: at no time are there two copies of them.

        Args:
            name_or_path: directory or hub id.
            revision: branch, tag or commit of a hub id.
            towers: "context" reads the context tower alone; autoregressive generation needs no more. "denoiser" reads
                the denoiser alone, for contexts that somebody else computes.
            dtype: of the weights (float32, bfloat16, float16, float64); None for the one they are stored in.
            denoiser_dtype: of the denoiser's weights; None for the same as the context tower's.
            denoiser_experts_per_token: experts that a token of a block visits, weighed as if there were no others; None
                for as many as config.json says, of which fewer read fewer weights and draft worse.
            experts_dtype: of the routed experts of both towers: float8_e4m3fn or int8, with a scale per output channel,
                or int4, with one per 64 inputs; made while they are read. None for as they are stored.
            context_device: where the context tower goes.
            denoiser_device: where the denoiser goes; None for the same place.
            progress: show a bar; None for on a terminal.

        Raises:
            ConfigError: config.json is refused.
            CheckpointError: the weights cannot be read or do not fit config.json.
            ArgumentError: an argument is not allowed.
        """
        if towers not in ("both", "context", "denoiser"):
            raise ArgumentError(f"towers {towers!r} is not allowed; give 'both', 'context' or 'denoiser'")
        with_denoiser, with_context = towers != "context", towers != "denoiser"
        directory = resolve_checkpoint(name_or_path, revision)
        config = TwoTowerConfig.from_pretrained(directory).with_experts_dtype(experts_dtype)
        index = CheckpointIndex(directory)
        left_out = {"context": "denoiser", "denoiser": "context"}.get(towers)
        ignored = [name for name in index if left_out and part_of(name) == left_out]
        # Before memory is taken for them: what config.json makes may be larger than what is stored, by far.
        expected = towers_without_memory(config, with_denoiser=with_denoiser, with_context=with_context)
        check_fit(index, expected.checkpoint_tensors(), ignored)
        model = cls(
            config,
            dtype=as_dtype(dtype) or stored_dtype(index, config),
            context_device=context_device,
            denoiser_device=denoiser_device,
            denoiser_dtype=as_dtype(denoiser_dtype),
            with_denoiser=with_denoiser,
            with_context=with_context,
            denoiser_experts_per_token=denoiser_experts_per_token,
        )
        destinations = dict(model.checkpoint_tensors())
        show = sys.stderr.isatty() if progress is None else progress
        with torch.no_grad():
            load_tensors(index, destinations, ignored, progress=show)
        model._stored_dtypes = stored_dtypes(index, destinations)
        return model

    @classmethod
    def from_config(
        cls,
        config: TwoTowerConfig,
        *,
        seed: int = 0,
        dtype: torch.dtype | str = "float32",
        context_device: torch.device | str = "cpu",
        denoiser_device: torch.device | str | None = None,
    ) -> TwoTowerModel:
        """A model with random weights drawn from a private generator."""
        model = cls(config, as_dtype(dtype) or torch.float32, context_device, denoiser_device)
        initialise_(model, seed)
        return model

    def save_pretrained(self, directory: str | Path, *, max_shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        """Writes the published layout; tensors that came from a checkpoint keep the dtype they had there.

        Raises:
            ArgumentError: only one tower is loaded.
            CheckpointError: it cannot be written; nothing half-written is left under the final names.
        """
        tensors = {**dict(self.context.checkpoint_tensors()), **dict(self.denoiser.checkpoint_tensors())}
        dtypes = self._stored_dtypes or {}
        config = self.config
        if self._stored_dtypes is None:
            config = config.replace(torch_dtype=str(self.dtype).removeprefix("torch."))
        save_checkpoint(directory, tensors, dtypes, config.to_json(), max_shard_bytes)


def as_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype from its name; None stays None.

    Raises:
        ArgumentError: the name is unknown.
    """
    name = str(dtype).removeprefix("torch.") if dtype is not None else None
    if name is None:
        return None
    if name not in TORCH_DTYPES:
        raise ArgumentError(f"dtype {name!r} is not allowed; give one of {', '.join(TORCH_DTYPES)}")
    return TORCH_DTYPES[name]


def stored_dtype(index: CheckpointIndex, config: TwoTowerConfig) -> torch.dtype:
    """The dtype the embeddings are stored in, which is that of most weights; else what config.json says."""
    embeddings = index.get("context_tower.embeddings.weight")
    return embeddings.dtype if embeddings else config.dtype or torch.float32
