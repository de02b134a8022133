"""Attention of a few queries over cached context and their own block, with grouped key/value heads."""

from twotower_kernels.block_attention.op import attention, causal_mask, paged_attention, ragged_attention, reads_pages

__all__ = ["attention", "causal_mask", "paged_attention", "ragged_attention", "reads_pages"]
