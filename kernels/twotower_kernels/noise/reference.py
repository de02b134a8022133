"""The hash behind the noise in plain Python integers."""

import math

_MASK = 0xFFFFFFFF


def _finalise(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & _MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _MASK
    return h ^ h >> 16


def gumbel_noise_reference(seed: int, position: int, draw: int, token_id: int) -> float:
    """One value of `gumbel_noise`, in double precision."""
    key = _finalise((seed & _MASK) ^ 0x9E3779B9)
    key = _finalise(key ^ (seed >> 32 & _MASK))
    key = _finalise(key ^ (position & _MASK))
    key = _finalise(key ^ (draw & _MASK))
    other = _finalise(key ^ 0x7F4A7C15)
    bits = _finalise((_finalise((token_id * 0x9E3779B1 & _MASK) ^ key) + other) & _MASK)
    return -math.log(-math.log(((bits >> 9) + 0.5) / (1 << 23)))
