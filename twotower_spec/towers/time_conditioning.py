"""Timestep embedding and the shift, scale and gate it gives every layer of the denoiser."""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from twotower_kernels.linear import rounded_once
from twotower_spec.config import TwoTowerConfig, accumulation_dtype
from twotower_spec.towers.layers.weights import matrix, parameter

SINUSOID_WIDTH = 256
TIME_FACTOR = 1000  # "max_period" of the published module is only this factor
FREQUENCY_BASE = 10000


class TimeConditioning(nn.Module):
    """Adaptive layer norm (adaLN-single): one small MLP for all layers, one table per layer.

    Source: modeling_nemotron_twotower.py, TimestepEmbedder, t_block, scale_shift_tables; PixArt-alpha (Chen et al.
    2023), section 2.3.
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        hidden = config.hidden_size
        self.dtype = dtype
        self.w1 = matrix(hidden, SINUSOID_WIDTH, dtype=dtype, device=device)
        self.b1 = parameter(hidden, dtype=dtype, device=device)
        self.w2 = matrix(hidden, hidden, dtype=dtype, device=device)
        self.b2 = parameter(hidden, dtype=dtype, device=device)
        self.w3 = matrix(3 * hidden, hidden, dtype=dtype, device=device)
        self.b3 = parameter(3 * hidden, dtype=dtype, device=device)
        self.tables = parameter(config.num_hidden_layers, 3, hidden, dtype=dtype, device=device)

    def forward(self, t: Tensor) -> Tensor:
        """Modulation of every layer.

        Args:
            t: [num_reqs], masked fraction of each row's block, in [0, 1].

        Returns:
            [num_reqs, num_layers, 3, hidden], rows shift, 1 + scale, gate.
        """
        shift, scale, gate = self.shift_scale_gate(t).unbind(2)
        return torch.stack([shift, 1 + scale, gate], dim=2)

    def for_block_size(self, block_size: int) -> Tensor:
        """Modulation for every number of masked positions: [block_size + 1, num_layers, 3, hidden]."""
        masked = torch.arange(block_size + 1, device=self.b1.device, dtype=accumulation_dtype(self.dtype))
        modulation: Tensor = self(masked / block_size)
        return modulation

    def shift_scale_gate(self, t: Tensor) -> Tensor:
        """[num_reqs, num_layers, 3, hidden], rows shift, scale, gate as the published code has them."""
        with rounded_once(self.tables.device, self.dtype):
            embedded = self.embed(self.sinusoid(t))
            table: Tensor = self.project(embedded).unflatten(-1, (1, 3, -1)) + self.tables
        return table

    def sinusoid(self, t: Tensor) -> Tensor:
        """[num_reqs, 256]: cosines first. In bfloat16 both t and 1000 t are rounded, as published."""
        wide = accumulation_dtype(self.dtype)
        scaled = (t.to(self.dtype) * TIME_FACTOR).to(wide)
        half = SINUSOID_WIDTH // 2
        exponents = torch.arange(half, device=t.device, dtype=wide) / half
        angles = scaled[:, None] * torch.exp(-math.log(FREQUENCY_BASE) * exponents)
        return torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.dtype)

    def embed(self, sinusoid: Tensor) -> Tensor:
        """The two-layer MLP `t_embedder`: [num_reqs, 256] to [num_reqs, hidden]."""
        return F.linear(F.silu(F.linear(sinusoid, self.w1, self.b1)), self.w2, self.b2)

    def project(self, embedded: Tensor) -> Tensor:
        """`t_block`: [num_reqs, hidden] to [num_reqs, 3 * hidden]."""
        return F.linear(F.silu(embedded), self.w3, self.b3)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        yield "t_embedder.mlp.0.weight", self.w1
        yield "t_embedder.mlp.0.bias", self.b1
        yield "t_embedder.mlp.2.weight", self.w2
        yield "t_embedder.mlp.2.bias", self.b2
        yield "t_block.1.weight", self.w3
        yield "t_block.1.bias", self.b3
        for layer, table in enumerate(self.tables):
            yield f"scale_shift_tables.{layer}", table
