"""Mamba-2: the projections and the gated norm around the scan."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from twotower_kernels.block_scan import ScanWeights
from twotower_kernels.linear import linear
from twotower_kernels.time_modulation import gated_group_norm
from twotower_spec.config import TwoTowerConfig, accumulation_dtype
from twotower_spec.towers.layers.weights import matrix, parameter, taps_first


class Mamba2(nn.Module):
    """Mamba-2 layer without the recurrence, whose state the caller holds.

    Source: modeling_nemotron_h.py, NemotronHMamba2Mixer and MambaRMSNormGated (gate before norm, norm per group).
    """

    def __init__(self, config: TwoTowerConfig, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        heads, wide = config.mamba_num_heads, accumulation_dtype(dtype)
        self.widths = (config.d_inner, config.d_conv_channels, heads)
        self.num_groups, self.eps = config.n_groups, config.norm_eps
        self.in_proj = matrix(sum(self.widths), config.hidden_size, dtype=dtype, device=device)
        self.conv_weight = taps_first(config.d_conv_channels, config.conv_kernel, dtype, device)
        self.conv_bias = parameter(config.d_conv_channels, dtype=dtype, device=device) if config.use_conv_bias else None
        self.a_log = parameter(heads, dtype=wide, device=device)
        self.d = parameter(heads, dtype=wide, device=device)
        self.dt_bias = parameter(heads, dtype=wide, device=device)
        self.norm = parameter(config.d_inner, dtype=dtype, device=device)
        self.out_proj = matrix(config.hidden_size, config.d_inner, dtype=dtype, device=device)

    @property
    def scan_weights(self) -> ScanWeights:
        """Parameters that the scan reads."""
        return ScanWeights(
            conv_weight=self.conv_weight[:, 0],
            conv_bias=self.conv_bias,
            a_log=self.a_log,
            d=self.d,
            dt_bias=self.dt_bias,
            num_groups=self.num_groups,
        )

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., hidden] to gate [..., d_inner], convolution inputs [..., d_conv_channels], time steps [..., heads]."""
        gate, u, delta = linear(x, self.in_proj).split(self.widths, dim=-1)
        return gate, u, delta

    def output(self, scanned: Tensor, gate: Tensor) -> Tensor:
        """Gated norm and output projection: [..., d_inner] twice to [..., hidden]."""
        return linear(gated_group_norm(scanned, gate, self.norm, self.num_groups, self.eps), self.out_proj)

    def checkpoint_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Views under the published names."""
        yield "in_proj.weight", self.in_proj
        yield "conv1d.weight", self.conv_weight
        if self.conv_bias is not None:
            yield "conv1d.bias", self.conv_bias
        yield "A_log", self.a_log
        yield "D", self.d
        yield "dt_bias", self.dt_bias
        yield "norm.weight", self.norm
        yield "out_proj.weight", self.out_proj
