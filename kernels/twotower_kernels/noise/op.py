"""Noise over a vocabulary, without any random state.

Gumbel noise is -log of an exponential arrival time: the token whose arrival, divided by its weight, comes first is the
sample. Tokens stand in groups of 32, and of the first arrival in a group we draw when it happens and whose it is; by
memorylessness the others follow after exponential times of their own. So one number bounds a group, and a sample looks
at the tokens of a few groups only. All arithmetic is integer or separately rounded float32 products and sums: it gives
the same bits on every device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.noise.constants import CHUNK, GROUP, LANES, LOG_2_HIGH, LOG_2_LOW, LOG_POLYNOMIAL, SLACK


def gumbel_argmax(scores: Tensor, seeds: Tensor, positions: Tensor, draw: int = 0) -> Tensor:
    """Samples from the softmax of every row: `(scores + gumbel_noise(...)).argmax(-1)`, ties and NaN as there.

    The noise is computed only where a token can win. The sum is formed in the dtype of the scores, float32 at least.

    Args:
        scores: float [num_rows, vocab], any row stride; -inf excludes a token. Not modified.
        seeds, positions, draw: as `gumbel_noise`.

    Returns:
        Token ids int64 [num_rows].
    """
    if use_triton(scores) and scores.dtype != torch.float64:
        from twotower_kernels.noise.kernel import launch_gumbel_argmax

        return launch_gumbel_argmax(scores, seeds, positions, draw)
    num_rows, vocab_size = scores.shape
    device, wide = scores.device, torch.promote_types(scores.dtype, torch.float32)
    key, other = _keys(seeds, positions, draw)
    groups = torch.arange(vocab_size // CHUNK * LANES + min(vocab_size % CHUNK, LANES), device=device)
    bits = _hash(groups.to(torch.int32), other, key)
    member = bits & (GROUP - 1)
    tokens = _first_token(groups) + member * LANES
    # Finds the groups that may win; any logarithm will do for that. The best of the first arrivals is a bar: a group
    # can only win if its best score, together with its first arrival, reaches it.
    noise = (_uniform(bits).log_() * (-1 / GROUP)).log_().neg_()
    values = scores.gather(1, tokens.clamp(max=vocab_size - 1)).to(wide) + (noise - SLACK)
    bar = _rank(values).masked_fill(tokens >= vocab_size, -torch.inf).amax(1, keepdim=True)
    bounds = _rank(_best_of_groups(scores)[:, : len(groups)] + (noise + SLACK))
    row, group = ((bounds >= bar) & (bounds > -torch.inf)).nonzero(as_tuple=True)

    members = torch.arange(min(GROUP, -(-vocab_size // LANES)), device=device)
    tokens = _first_token(group)[:, None] + members * LANES
    all_bits = torch.cat([bits[row, group][:, None], _hash(tokens.to(torch.int32), key[row], other[row])], dim=1)
    first, after = (-reproducible_log(_uniform(all_bits))).split([1, len(members)], dim=1)
    first = first * (1 / GROUP)
    arrival = torch.where(member[row, group][:, None] == members, first, first + after)
    values = scores[row[:, None], tokens.clamp(max=vocab_size - 1)].to(wide) - reproducible_log(arrival)
    values = _rank(values).masked_fill(tokens >= vocab_size, -torch.inf)

    best = values.new_full((num_rows,), -torch.inf).scatter_reduce_(0, row, values.amax(1), "amax")
    winners = tokens.masked_fill(values < best[row][:, None], vocab_size).amin(1)
    picks = torch.full((num_rows,), vocab_size, device=device).scatter_reduce_(0, row, winners, "amin")
    return picks.masked_fill(picks == vocab_size, 0)  # a row without any token gives 0, as argmax does


def gumbel_noise(seeds: Tensor, positions: Tensor, draw: int, vocab_size: int) -> Tensor:
    """Standard Gumbel noise for every token of the vocabulary; argmax of `logits + noise` samples from softmax.

    The same arguments give the same numbers whatever else is in the batch, and whatever the size of the vocabulary.

    Args:
        seeds: int64 [num_rows].
        positions: int64 [num_rows], index of the token in its sequence.
        draw: distinguishes repeated draws at the same position (the denoising step).
        vocab_size: token ids 0 to vocab_size - 1.

    Returns:
        float32 [num_rows, vocab_size].

    Source: Gumbel-max trick; the order of arrivals of a Poisson process.
    """
    key, other = _keys(seeds, positions, draw)
    return _noise_of(key, other, torch.arange(vocab_size, device=seeds.device).expand(len(seeds), -1))


def uniform_noise(seeds: Tensor, positions: Tensor, draw: int, size: int) -> Tensor:
    """Numbers strictly between 0 and 1, multiples of 2^-23 apart.

    Args:
        seeds, positions, draw: as `gumbel_noise`.
        size: numbers per row.

    Returns:
        float32 [num_rows, size].

    Source: the finaliser of MurmurHash3 (public domain) over a counter.
    """
    key, other = _keys(seeds, positions, draw)
    return _uniform(_hash(torch.arange(size, device=seeds.device, dtype=torch.int32), key, other))


def _noise_of(key: Tensor, other: Tensor, tokens: Tensor) -> Tensor:
    """Gumbel noise of token ids [num_rows, n]."""
    chunk, lane = tokens // CHUNK, tokens % LANES
    first, member = _first_arrivals(key, other, (chunk * LANES + lane).to(torch.int32))
    after = -reproducible_log(_uniform(_hash(tokens.to(torch.int32), key, other)))
    return -reproducible_log(torch.where(tokens // LANES % GROUP == member, first, first + after))


def _first_arrivals(key: Tensor, other: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Time of the first arrival in every group, float32 [num_rows, n], and the member that arrives."""
    bits = _hash(groups, other, key)  # keys swapped, for other numbers than those of the tokens
    return -reproducible_log(_uniform(bits)) * (1 / GROUP), bits & (GROUP - 1)


def _best_of_groups(scores: Tensor) -> Tensor:
    """Largest score of every group, [num_rows, groups]; NaN where there is one."""
    num_rows, vocab_size = scores.shape
    best = scores.new_full((num_rows, -(-vocab_size // CHUNK), LANES), -torch.inf)
    for chunk, part in enumerate(scores.split(CHUNK, dim=1)):
        whole = part.shape[1] // LANES * LANES
        if whole:
            best[:, chunk] = part[:, :whole].unflatten(1, (-1, LANES)).amax(1)
        if whole < part.shape[1]:
            rest = best[:, chunk, : part.shape[1] - whole]
            rest.copy_(torch.maximum(rest, part[:, whole:]))
    return best.flatten(1)


def _first_token(groups: Tensor) -> Tensor:
    """Smallest token id of groups; the others follow LANES apart."""
    return groups // LANES * CHUNK + groups % LANES


def _rank(values: Tensor) -> Tensor:
    """Maps values to floats that compare as argmax does: NaN becomes inf, and inf the largest finite number."""
    return torch.where(values.isnan(), torch.inf, values.clamp(max=torch.finfo(values.dtype).max))


def _keys(seeds: Tensor, positions: Tensor, draw: int) -> tuple[Tensor, Tensor]:
    """Two int32 [num_rows, 1] that stand for seed, position and draw."""
    key = _finalise(_int32(seeds) ^ _constant(0x9E3779B9))
    key = _finalise(key ^ _int32(seeds >> 32))
    key = _finalise(key ^ _int32(positions))
    key = _finalise(key ^ draw)[:, None]
    return key, _finalise(key ^ _constant(0x7F4A7C15))


def _hash(counters: Tensor, key: Tensor, other: Tensor) -> Tensor:
    """int32 bits of counters [num_rows or 1, n]."""
    return _finalise(_finalise((counters * _constant(0x9E3779B1)) ^ key) + other)


def _uniform(bits: Tensor) -> Tensor:
    # 23 bits and a half: with one bit more, float32 would round the largest to 1.
    return (((bits >> 9) & 0x7FFFFF).float() + 0.5) * 2.0**-23


def reproducible_log(x: Tensor) -> Tensor:
    """Natural logarithm of normal positive float32 numbers, within 2 units in the last place.

    Source: the polynomial of Cephes' logf (public domain), every product and sum rounded.
    """
    bits = x.contiguous().view(torch.int32)
    exponent = (bits - 0x3F3504F3) >> 23  # of x over the root of 1/2
    f = (bits - (exponent << 23)).view(torch.float32) - 1.0
    exponent = exponent.float()
    p = f * LOG_POLYNOMIAL[0] + LOG_POLYNOMIAL[1]
    for coefficient in LOG_POLYNOMIAL[2:]:
        p = p * f + coefficient
    square = f * f
    y = f * square * p
    y = y + exponent * LOG_2_LOW
    y = y - square * 0.5
    return (f + y) + exponent * LOG_2_HIGH


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
