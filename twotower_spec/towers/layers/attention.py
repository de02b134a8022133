"""Projections around grouped-query attention without positional encoding."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower_kernels.linear import linear
from twotower_spec.config import TwoTowerConfig
from twotower_spec.towers.layers.weights import matrix


class Attention(nn.Module):
    """Projections of one attention layer; the caller decides which keys are seen.

    Source: modeling_nemotron_h.py, NemotronHAttention; scale 1 / sqrt(head_dim), no rotary embedding.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        q_width, kv_width = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.widths = (q_width, kv_width, kv_width)
        self.qkv = matrix(sum(self.widths), config.hidden_size, dtype=dtype, device=device)
        self.o = matrix(config.hidden_size, q_width, dtype=dtype, device=device)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., hidden] to queries [..., heads, head_dim] and keys, values [..., kv_heads, head_dim]."""
        q, k, v = (
            linear(x, self.qkv)
            .unflatten(-1, (-1, self.head_dim))
            .split([self.num_heads, self.num_kv_heads, self.num_kv_heads], dim=-2)
        )
        return q, k, v

    def output(self, attended: Tensor) -> Tensor:
        """[..., heads, head_dim] to [..., hidden]."""
        return linear(attended.flatten(-2), self.o)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        for name, weight in zip("qkv", self.qkv.split(self.widths), strict=True):
            yield f"{name}_proj.weight", weight
        yield "o_proj.weight", self.o
