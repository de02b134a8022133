"""Small models of odd geometry, and token ids."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from twotower_spec import TwoTowerConfig, TwoTowerModel


def tiny_config(**changes: Any) -> TwoTowerConfig:
    """Every kind of layer, odd sizes, two groups wherever there can be groups."""
    fields: dict[str, Any] = {
        "hidden_size": 36,
        "num_hidden_layers": 7,
        "hybrid_override_pattern": "MEM*-ME",
        "vocab_size": 61,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 10,
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "n_groups": 2,
        "ssm_state_size": 5,
        "conv_kernel": 4,
        "n_routed_experts": 6,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 22,
        "moe_shared_expert_intermediate_size": 26,
        "intermediate_size": 30,
        "routed_scaling_factor": 1.7,
    }
    if "hybrid_override_pattern" in changes:
        fields["num_hidden_layers"] = len(changes["hybrid_override_pattern"])
    return TwoTowerConfig(**{**fields, **changes})


@cache
def _cached_model(dtype: str, seed: int, changes: tuple[tuple[str, Any], ...]) -> TwoTowerModel:
    return TwoTowerModel.from_config(tiny_config(**dict(changes)), dtype=dtype, seed=seed)


def tiny_model(dtype: str = "float64", seed: int = 0, **changes: Any) -> TwoTowerModel:
    """Model with random weights, made once per geometry; float64, so that comparisons can be tight."""
    return _cached_model(dtype, seed, tuple(sorted(changes.items())))


def random_ids(length: int, seed: int = 0, vocab_size: int = 61) -> list[int]:
    """Token ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(4, vocab_size, (length,), generator=generator).tolist()
    return ids


def padding_mask(key_lens: Tensor, num_keys: int) -> Tensor:
    """Mask by which all queries of a row see its first keys: bool [num_reqs, 1, num_keys]."""
    return (torch.arange(num_keys) < key_lens[:, None])[:, None]
