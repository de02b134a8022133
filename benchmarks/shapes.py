"""Model-true shapes, shared by all benchmarks, and the bytes that a pass has to read."""

from __future__ import annotations

from twotower_spec import TwoTowerConfig
from twotower_spec.config import ATTENTION, MAMBA, MOE

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
REAL_SIZE = TwoTowerConfig(
    hidden_size=2688,
    num_hidden_layers=52,
    hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    vocab_size=131072,
    num_attention_heads=32,
    num_key_value_heads=2,
    head_dim=128,
    mamba_num_heads=64,
    mamba_head_dim=64,
    n_groups=8,
    ssm_state_size=128,
    conv_kernel=4,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_shared_expert_intermediate_size=3712,
    routed_scaling_factor=2.5,
    intermediate_size=1856,
    torch_dtype="bfloat16",
)

PROMPT_LENGTH = 64
NEW_TOKENS = 64


def weight_bytes_of_pass(config: TwoTowerConfig, num_tokens: int, with_head: bool, itemsize: int) -> float:
    """Bytes of weights that one pass over `num_tokens` tokens reads, with evenly used experts.

    The union of experts that n tokens visit is E (1 - (1 - k / E)^n).
    """
    hidden, experts = config.hidden_size, config.n_routed_experts
    mamba = hidden * (config.d_inner + config.d_conv_channels + config.mamba_num_heads) + config.d_inner * hidden
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * hidden * (q_width + kv_width)
    visited = experts * (1 - (1 - config.num_experts_per_tok / max(experts, 1)) ** num_tokens)
    moe = 2 * hidden * (visited * config.moe_intermediate_size + config.moe_shared_expert_intermediate_size)
    count = config.layer_kinds.count
    head = config.vocab_size * hidden if with_head else 0
    return itemsize * (count(MAMBA) * mamba + count(ATTENTION) * attention + count(MOE) * moe + head)
