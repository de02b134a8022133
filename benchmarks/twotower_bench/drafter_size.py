"""Bytes of weights that a pass of a TwoTower model reads, and the time which follows from a bandwidth."""

from __future__ import annotations

import math
from dataclasses import dataclass

from twotower_kernels.experts import quantised_shapes, scales_dtype
from twotower_spec.config import ATTENTION, EXPERT_DTYPES, MAMBA, MLP, MOE, TwoTowerConfig
from twotower_spec.errors import ArgumentError

# The released model's shape.
PUBLISHED_SIZE = TwoTowerConfig(
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


def weight_bytes_of_pass(config: TwoTowerConfig, num_tokens: float, with_head: bool, itemsize: int) -> float:
    """Bytes of weights that one pass over `num_tokens` tokens reads, with evenly used experts.

    The union of experts that n tokens visit is E (1 - (1 - k / E)^n).
    """
    hidden, experts = config.hidden_size, config.n_routed_experts
    mamba = hidden * (config.d_inner + config.d_conv_channels + config.mamba_num_heads) + config.d_inner * hidden
    q_width, kv_width = (heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads))
    attention = 2 * hidden * (q_width + kv_width)
    visited = experts * (1 - (1 - config.num_experts_per_tok / max(experts, 1)) ** num_tokens)
    expert = _expert_bytes(config, itemsize)
    shared = itemsize * 2 * hidden * config.moe_shared_expert_intermediate_size
    mlp = 2 * hidden * config.intermediate_size
    count = config.layer_kinds.count
    layers = count(MAMBA) * mamba + count(ATTENTION) * attention + count(MLP) * mlp
    head = config.vocab_size * hidden if with_head else 0
    num_bytes: float = itemsize * (layers + head) + count(MOE) * (visited * expert + shared)
    return num_bytes


def _expert_bytes(config: TwoTowerConfig, itemsize: int) -> int:
    """Bytes of one routed expert, with its scales if it is quantised."""
    shapes = (config.moe_intermediate_size, config.hidden_size), (config.hidden_size, config.moe_intermediate_size)
    if config.experts_dtype is None:
        return sum(itemsize * math.prod(shape) for shape in shapes)
    dtype = EXPERT_DTYPES[config.experts_dtype]
    return sum(
        dtype.itemsize * math.prod(weight) + scales_dtype(dtype).itemsize * math.prod(scales)
        for weight, scales in (quantised_shapes(shape, dtype) for shape in shapes)
    )


@dataclass(frozen=True)
class DrafterSize:
    """A drafter that was not measured: its weights over a bandwidth.

    Caches, states and arithmetic are left out, which makes it a lower bound of the time: right while passes wait for
    memory, and far too low where a large batch or a CPU computes all the time.

    Attributes:
        config: shape of both towers.
        bandwidth_gb_s: gigabytes (1e9) that the device reads per second.
        itemsize: bytes per weight, of those that are not quantised.
        launch_overhead_ms: added to every pass.
        times_floor: how many times the time of its bytes a pass takes; 1 is the bound itself.
        experts_per_token: that a token of a block visits in the denoiser; None for as many as `config` says.

    Raises:
        ArgumentError: a number is out of range.
    """

    config: TwoTowerConfig
    bandwidth_gb_s: float
    itemsize: int = 2
    launch_overhead_ms: float = 0.0
    times_floor: float = 1.0
    experts_per_token: int | None = None

    def __post_init__(self) -> None:
        given = (self.bandwidth_gb_s, self.launch_overhead_ms, self.times_floor)
        if not (given[0] > 0 and given[1] >= 0 and given[2] >= 1 and math.isfinite(sum(given))):
            raise ArgumentError(
                "bandwidth_gb_s {}, launch_overhead_ms {} and times_floor {} are not allowed; give a bandwidth above "
                "0, an overhead of 0 or more and a factor of 1 or more".format(*given)
            )
        self.config.with_experts_per_token(self.experts_per_token)

    def context_pass_ms(self, num_tokens: float) -> float:
        """One pass of the context tower, with its head, over so many tokens of all requests together."""
        return self._pass_ms(self.config, num_tokens)

    def denoiser_pass_ms(self, num_tokens: float) -> float:
        """One pass of the denoiser, likewise."""
        return self._pass_ms(self.config.with_experts_per_token(self.experts_per_token), num_tokens)

    def _pass_ms(self, config: TwoTowerConfig, num_tokens: float) -> float:
        num_bytes = weight_bytes_of_pass(config, num_tokens, with_head=True, itemsize=self.itemsize)
        return self.times_floor * num_bytes / self.bandwidth_gb_s / 1e6 + self.launch_overhead_ms
