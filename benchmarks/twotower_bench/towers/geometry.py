"""Towers without files: the published geometry, or a small one, with as many layers as are wanted."""

from __future__ import annotations

import os
from itertools import accumulate

import torch

from twotower_bench.drafter_size import PUBLISHED_SIZE
from twotower_spec.config import TwoTowerConfig, check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.model import TwoTowerModel
from twotower_spec.towers.model import towers_without_memory

# The published pattern in layers that a CPU passes through in milliseconds.
SMALL_SIZE = PUBLISHED_SIZE.replace(
    hidden_size=256,
    vocab_size=8192,
    num_attention_heads=4,
    head_dim=64,
    mamba_num_heads=8,
    n_groups=2,
    ssm_state_size=64,
    n_routed_experts=32,
    num_experts_per_tok=3,
    moe_intermediate_size=192,
    moe_shared_expert_intermediate_size=384,
    intermediate_size=192,
    torch_dtype=None,
)
# For the states of some dozens of requests, what passes need in between, and a tensor in float32 while it is drawn.
SPARE_BYTES = 10 * 10**9
GEOMETRIES = {"published": PUBLISHED_SIZE, "small": SMALL_SIZE}


def first_layers(config: TwoTowerConfig, num_layers: int) -> TwoTowerConfig:
    """Copies a geometry with the first layers of its pattern alone.

    Raises:
        ArgumentError: it has fewer.
    """
    check_integer("--layers", num_layers, minimum=1, maximum=config.num_hidden_layers)
    pattern = config.hybrid_override_pattern[:num_layers]
    return config.replace(num_hidden_layers=num_layers, hybrid_override_pattern=pattern)


def layers_that_fit(config: TwoTowerConfig, dtype: torch.dtype, free_bytes: int) -> int:
    """Counts the layers of a geometry with which both towers leave `SPARE_BYTES` of some free memory; one at least."""
    towers = towers_without_memory(config, dtype)
    of_layers = [
        sum(
            parameter.nbytes
            for tower in (towers.context, towers.denoiser)
            for parameter in tower.layers[i].parameters()
        )
        for i in range(config.num_hidden_layers)
    ]
    everything = sum(parameter.nbytes for parameter in towers.parameters())
    room = free_bytes - SPARE_BYTES - (everything - sum(of_layers))
    return max(1, sum(used <= room for used in accumulate(of_layers)))


def made_in_place(config: TwoTowerConfig, dtype: torch.dtype, device: torch.device, seed: int = 0) -> TwoTowerModel:
    """Makes both towers on a device, their random weights drawn there.

    Raises:
        ArgumentError: they do not fit into its memory.
    """
    num_bytes = sum(tensor.nbytes for tensor in towers_without_memory(config, dtype).parameters())
    refused = ArgumentError(
        f"{config.num_hidden_layers} layers of both towers take {num_bytes / 1e9:.1f} GB, more than the memory of "
        f"{device} has room for; give fewer with --layers, or a narrower --dtype"
    )
    # A system that promises more memory than it has would end the process later.
    if device.type == "cpu" and num_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise refused
    try:
        return TwoTowerModel.from_config(config, seed=seed, dtype=dtype, context_device=device)
    except torch.OutOfMemoryError as error:
        raise refused from error
