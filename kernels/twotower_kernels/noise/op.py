"""Noise over a vocabulary, without any random state."""

import torch
from torch import Tensor


def gumbel_noise(seeds: Tensor, positions: Tensor, draw: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary; argmax of `logits + noise` samples from softmax.

    The same arguments give the same numbers whatever else is in the batch.

    Args:
        seeds: int64 [num_rows].
        positions: int64 [num_rows], index of the token in its sequence.
        draw: distinguishes repeated draws at the same position (the denoising step).
        vocab_size: token ids 0 to vocab_size - 1.

    Returns:
        float32 [num_rows, vocab_size].

    Source: Gumbel-max trick.
    """
    return uniform_noise(seeds, positions, draw, vocab_size).log_().neg_().log_().neg_()


def uniform_noise(seeds: Tensor, positions: Tensor, draw: int, size: int) -> Tensor:
    """Numbers strictly between 0 and 1, multiples of 2^-23 apart.

    Args:
        seeds, positions, draw: as `gumbel_noise`.
        size: numbers per row.

    Returns:
        float32 [num_rows, size].

    Source: the finaliser of MurmurHash3 (public domain) over a counter.
    """
    key = _finalise(_int32(seeds) ^ _constant(0x9E3779B9))
    key = _finalise(key ^ _int32(seeds >> 32))
    key = _finalise(key ^ _int32(positions))
    key = _finalise(key ^ draw)[:, None]
    other = _finalise(key ^ _constant(0x7F4A7C15))
    tokens = torch.arange(size, device=seeds.device, dtype=torch.int32) * _constant(0x9E3779B1)
    bits = _finalise(_finalise(tokens ^ key) + other)
    # 23 bits and a half: with one bit more, float32 would round the largest to 1.
    return (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def _constant(value: int) -> int:
    """The signed 32-bit integer with the bits of an unsigned one."""
    return value - (1 << 32) if value >= 1 << 31 else value


def _int32(values: Tensor) -> Tensor:
    """The low 32 bits of int64 values, as int32."""
    low = values & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)


def _finalise(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finaliser; int32 products wrap, and the masks make the shifts logical."""
    h = h ^ ((h >> 16) & 0xFFFF)
    h = h * _constant(0x85EBCA6B)
    h = h ^ ((h >> 13) & 0x7FFFF)
    h = h * _constant(0xC2B2AE35)
    return h ^ ((h >> 16) & 0xFFFF)
