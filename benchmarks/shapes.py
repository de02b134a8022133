"""Shapes of real models, shared by all benchmarks, and the bytes that a pass has to read."""

from __future__ import annotations

from twotower_bench.drafter_size import PUBLISHED_SIZE, weight_bytes_of_pass
from twotower_spec import TwoTowerConfig

__all__ = ["MID_SIZE", "NEW_TOKENS", "PROMPT_LENGTH", "REAL_SIZE", "weight_bytes_of_pass"]

# The mid-size model: the real pattern's mix in 14 layers, narrow enough for a CPU.
MID_SIZE = TwoTowerConfig(
    hidden_size=512,
    num_hidden_layers=14,
    hybrid_override_pattern="MEMEM*EMEMEM*E",
    vocab_size=32000,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=64,
    mamba_num_heads=16,
    mamba_head_dim=64,
    n_groups=4,
    ssm_state_size=64,
    conv_kernel=4,
    n_routed_experts=16,
    num_experts_per_tok=4,
    moe_intermediate_size=384,
    moe_shared_expert_intermediate_size=768,
    routed_scaling_factor=2.5,
)

# The released model, of which only single layers fit a benchmark.
REAL_SIZE = PUBLISHED_SIZE

PROMPT_LENGTH = 64
NEW_TOKENS = 64
