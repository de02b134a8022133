"""Attention of a few queries over cached context and their own block, with grouped key/value heads."""

from twotower_kernels.block_attention.op import attention, causal_mask, paged_attention, ragged_attention, reads_pages
from twotower_kernels.block_attention.types import PagedBatch

__all__ = ["PagedBatch", "attention", "causal_mask", "paged_attention", "ragged_attention", "reads_pages"]
