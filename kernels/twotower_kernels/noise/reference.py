"""The noise from its definition, in Python's integers and double precision."""

import math

GROUP, LANES = 32, 64

_MASK = 0xFFFFFFFF


def gumbel_noise_reference(seed: int, position: int, draw: int, token_id: int) -> float:
    """One value of `gumbel_noise`."""
    key, other = _keys(seed, position, draw)
    chunk, member, lane = token_id // (GROUP * LANES), token_id // LANES % GROUP, token_id % LANES
    of_group = _hash(chunk * LANES + lane, other, key)
    arrival = -math.log(_uniform(of_group)) / GROUP
    if of_group % GROUP != member:
        arrival -= math.log(_uniform(_hash(token_id, key, other)))
    return -math.log(arrival)


def uniform_noise_reference(seed: int, position: int, draw: int, index: int) -> float:
    """One value of `uniform_noise`."""
    return _uniform(_hash(index, *_keys(seed, position, draw)))


def _keys(seed: int, position: int, draw: int) -> tuple[int, int]:
    key = _finalise((seed & _MASK) ^ 0x9E3779B9)
    key = _finalise(key ^ (seed >> 32 & _MASK))
    key = _finalise(key ^ (position & _MASK))
    key = _finalise(key ^ (draw & _MASK))
    return key, _finalise(key ^ 0x7F4A7C15)


def _hash(counter: int, key: int, other: int) -> int:
    return _finalise((_finalise((counter * 0x9E3779B1 & _MASK) ^ key) + other) & _MASK)


def _uniform(bits: int) -> float:
    return ((bits >> 9) + 0.5) / (1 << 23)


def _finalise(h: int) -> int:
    h ^= h >> 16
    h = h * 0x85EBCA6B & _MASK
    h ^= h >> 13
    h = h * 0xC2B2AE35 & _MASK
    return h ^ h >> 16
