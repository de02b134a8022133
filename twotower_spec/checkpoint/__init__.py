"""Checkpoints in the published layout: finding, reading and writing safetensors, nothing else."""

from twotower_spec.checkpoint.end_tokens import end_token_ids
from twotower_spec.checkpoint.index import CheckpointIndex, StoredTensor, resolve_checkpoint
from twotower_spec.checkpoint.loading import check_fit, compare_with_index, load_tensors
from twotower_spec.checkpoint.saving import save_checkpoint
from twotower_spec.checkpoint.tokenizer import encode_texts, find_tokenizer, load_tokenizer

__all__ = [
    "CheckpointIndex",
    "StoredTensor",
    "check_fit",
    "compare_with_index",
    "encode_texts",
    "end_token_ids",
    "find_tokenizer",
    "load_tensors",
    "load_tokenizer",
    "resolve_checkpoint",
    "save_checkpoint",
]
