"""The two passes of training: a whole sequence through the context tower, then all its blocks through the denoiser.

Both are prefixes (see `towers.prefix`), so that training runs the towers' own code on state of its own.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.block_scan import ScanWeights, block_scan, sequence_scan
from twotower_spec.config import TwoTowerConfig, accumulation_dtype


@dataclass
class SequencePass:
    """Causal pass over whole sequences from an empty context: the context tower's prefix in its training.

    Attributes:
        config: geometry of the tower.
    """

    config: TwoTowerConfig

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the sequences; see `Prefix.scan`."""
        conv, ssm = empty_state(self.config, u)
        return block_scan(u, delta, conv, ssm, weights, return_state=False)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends causally; see `Prefix.attend`."""
        return causal_attention(query, key, value)


@dataclass
class RecordingPass:
    """Sequence pass that keeps the states which the blocks of the sequences start from.

    Attributes:
        config: geometry of the tower.
        block_size: tokens per block; the sequences are whole blocks.
        conv, ssm: per Mamba layer, states at the start of every block but the first,
            [num_rows * (num_blocks - 1), ...].
        keys, values: per attention layer, [num_rows, num_tokens, kv_heads, head_dim].
    """

    config: TwoTowerConfig
    block_size: int
    conv: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over the sequences; see `Prefix.scan`."""
        conv, ssm = empty_state(self.config, u)
        y, histories, states = sequence_scan(u, delta, conv, ssm, weights, self.block_size)
        self.conv[layer], self.ssm[layer] = histories[:, 1:].flatten(0, 1), states[:, 1:].flatten(0, 1)
        return y

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends causally; see `Prefix.attend`."""
        self.keys[layer], self.values[layer] = key, value
        return causal_attention(query, key, value)


class AllBlocksPass:
    """Prefix of the denoiser in training: every block but the first of every sequence, each on its own context.

    A pass has one row per block, [num_rows * (num_blocks - 1), block_size].

    Args:
        recorded: what the context tower left, whole sequences.
    """

    def __init__(self, recorded: RecordingPass) -> None:
        self.recorded = recorded
        size = recorded.block_size
        keys = next(iter(recorded.keys.values()), None)
        if keys is None:
            return
        num_tokens = keys.shape[1]
        block = torch.arange(num_tokens, device=keys.device) // size
        own = block[size:]
        before = block[None, :] < own[:, None]
        same = own[None, :] == own[:, None]
        # [queries, context keys | keys of the blocks themselves]
        self.mask = torch.cat([before, same], dim=1)

    def scan(self, layer: int, u: Tensor, delta: Tensor, weights: ScanWeights) -> Tensor:
        """Runs a Mamba layer over every block from the state before it; see `Prefix.scan`."""
        conv, ssm = self.recorded.conv[layer], self.recorded.ssm[layer]
        return block_scan(u, delta, conv.to(u.dtype), ssm, weights, return_state=False)[0]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attends to the context before the block and to all of the block; see `Prefix.attend`."""
        context_keys, context_values = self.recorded.keys[layer], self.recorded.values[layer]
        rows = context_keys.shape[0]
        key = torch.cat([context_keys, self._sequences(key, rows)], dim=1)
        value = torch.cat([context_values, self._sequences(value, rows)], dim=1)
        out = _attention(self._sequences(query, rows), key, value, mask=self.mask)
        return out.reshape(query.shape)

    @staticmethod
    def _sequences(x: Tensor, rows: int) -> Tensor:
        """Reshapes [num_rows * blocks, block_size, ...] to [num_rows, blocks * block_size, ...]."""
        return x.reshape(rows, -1, *x.shape[2:])


def empty_state(config: TwoTowerConfig, u: Tensor) -> tuple[Tensor, Tensor]:
    """Convolution and SSM state of an empty context for rows like those of `u`."""
    wide = accumulation_dtype(u.dtype)
    conv = u.new_zeros(u.shape[0], config.conv_kernel - 1, u.shape[2])
    shape = (u.shape[0], config.mamba_num_heads, config.mamba_head_dim, config.ssm_state_size)
    return conv, torch.zeros(shape, dtype=wide, device=u.device)


def causal_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Causal attention among the tokens themselves; shapes as `Prefix.attend`."""
    return _attention(query, key, value, causal=True)


def _attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
    out = F.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=mask,
        is_causal=causal,
        enable_gqa=query.shape[2] != key.shape[2],
    )
    return out.transpose(1, 2)
