"""Attention of a few queries over cached context and their own block, with grouped key/value heads."""

from twotower_kernels.block_attention.op import attention, causal_mask, ragged_attention

__all__ = ["attention", "causal_mask", "ragged_attention"]
