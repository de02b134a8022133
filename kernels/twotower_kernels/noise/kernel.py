"""Noise on a GPU: functions for kernels that sample, and a kernel that samples from every row.

Launches need `enable_fp_fusion=False` (LAUNCH): a fused product and sum rounds once, while other devices round twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.noise import constants
from twotower_kernels.tuning import settings

LAUNCH = {"enable_fp_fusion": False}

GROUP = tl.constexpr(constants.GROUP)
LANES = tl.constexpr(constants.LANES)
_CHUNK = tl.constexpr(constants.CHUNK)
_SLACK = tl.constexpr(constants.SLACK)
_LOG_2_HIGH, _LOG_2_LOW = tl.constexpr(constants.LOG_2_HIGH), tl.constexpr(constants.LOG_2_LOW)
_C0, _C1, _C2, _C3, _C4, _C5, _C6, _C7, _C8 = (tl.constexpr(c) for c in constants.LOG_POLYNOMIAL)
_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_INT_MAX = tl.constexpr(2**31 - 1)


@triton.jit
def finalise(h):
    """MurmurHash3's finaliser of uint32."""
    h = h ^ (h >> 16)
    h = h * tl.full((), 0x85EBCA6B, tl.uint32)
    h = h ^ (h >> 13)
    h = h * tl.full((), 0xC2B2AE35, tl.uint32)
    return h ^ (h >> 16)


@triton.jit
def row_keys(seed, position, draw):
    """The two uint32 that stand for int64 seed and position and int32 draw."""
    key = finalise(seed.to(tl.uint32) ^ tl.full((), 0x9E3779B9, tl.uint32))
    key = finalise(key ^ (seed >> 32).to(tl.uint32))
    key = finalise(key ^ position.to(tl.uint32))
    key = finalise(key ^ tl.full((), draw, tl.uint32))
    return key, finalise(key ^ tl.full((), 0x7F4A7C15, tl.uint32))


@triton.jit
def hash_bits(counters, key, other):
    """uint32 bits of int32 counters."""
    return finalise(finalise((counters.to(tl.uint32) * tl.full((), 0x9E3779B1, tl.uint32)) ^ key) + other)


@triton.jit
def uniform(bits):
    """Float32 strictly between 0 and 1."""
    return ((bits >> 9).to(tl.float32) + 0.5) * 1.1920928955078125e-07


@triton.jit
def reproducible_log(x):
    """Natural logarithm, bit for bit as `op.reproducible_log`."""
    bits = x.to(tl.int32, bitcast=True)
    exponent = (bits - 0x3F3504F3) >> 23
    f = (bits - (exponent << 23)).to(tl.float32, bitcast=True) - 1.0
    exponent = exponent.to(tl.float32)
    p = f * _C0 + _C1
    p = p * f + _C2
    p = p * f + _C3
    p = p * f + _C4
    p = p * f + _C5
    p = p * f + _C6
    p = p * f + _C7
    p = p * f + _C8
    square = f * f
    y = f * square * p
    y = y + exponent * _LOG_2_LOW
    y = y - square * 0.5
    return (f + y) + exponent * _LOG_2_HIGH


@triton.jit
def rank(x):
    """Maps values to floats that compare as argmax does: NaN becomes inf, and inf the largest finite number."""
    return tl.where(x != x, float("inf"), tl.minimum(x, _LARGEST))


@triton.jit
def token_offsets(WIDTH: tl.constexpr):
    """Token ids [GROUP, WIDTH] of WIDTH neighbouring groups, relative to the first token of their chunk."""
    group = tl.arange(0, WIDTH)[None, :]
    return group // LANES * _CHUNK + tl.arange(0, GROUP)[:, None] * LANES + group % LANES


@triton.jit
def race(best, pick, x, row, start, vocab_size, scale, key, other, noisy, excluded, least, WIDTH: tl.constexpr):
    """Best token of WIDTH groups under noise, or the one so far.

    Args:
        best, pick: float32 and int32, the best noisy score so far and its token; the smaller token wins a tie.
        x: float32 [GROUP, WIDTH], logits at `start + token_offsets(WIDTH)`; -inf beyond the row or excluded.
        row: pointer to the row's first logit, where logits of the few groups that matter are read again.
        start: int32, first token of x, a multiple of the chunk.
        vocab_size: int32.
        scale: float32 above 0, factor on the logits.
        key, other: of the row's noise.
        noisy: whether noise is added.
        excluded: int32, token that is not taken; -1 for none.
        least: float32, bound that a token's scaled logit has to reach; -inf for none.
    """
    groups = tl.arange(0, WIDTH) + start // GROUP
    bits = hash_bits(groups, other, key)
    first = -reproducible_log(uniform(bits)) * (1.0 / GROUP)
    headroom = tl.where(noisy, _SLACK - reproducible_log(first), 0.0)
    bounds = tl.max(tl.where(x != x, float("inf"), x), axis=0) * scale + headroom
    eight: tl.constexpr = 8
    bounds = tl.reshape(bounds, (eight, WIDTH // eight))
    place = tl.arange(0, WIDTH // eight)[None, :]
    member = tl.arange(0, GROUP)[None, :]
    highest = tl.max(tl.max(bounds, axis=1), axis=0)
    while (highest >= best) & (highest > float("-inf")):
        bound = tl.max(bounds, axis=1)
        at = tl.argmax(bounds, axis=1)
        look = bound >= best  # int1 [8]
        bounds = tl.where((place == at[:, None]) & look[:, None], float("-inf"), bounds)
        group = tl.arange(0, eight) * (WIDTH // eight) + at
        token = (group // LANES * _CHUNK + group % LANES)[:, None] + member * LANES + start  # [8, GROUP]
        valid = (token < vocab_size) & look[:, None] & (token != excluded)
        score = tl.load(row + token, mask=valid, other=float("-inf")).to(tl.float32) * scale
        of_group = hash_bits(group + start // GROUP, other, key)
        arrival = (-reproducible_log(uniform(of_group)) * (1.0 / GROUP))[:, None] + tl.zeros((eight, GROUP), tl.float32)
        after = -reproducible_log(uniform(hash_bits(token, key, other)))
        is_first = (of_group & (GROUP - 1)).to(tl.int32)[:, None] == member
        noise = tl.where(noisy, -reproducible_log(tl.where(is_first, arrival, arrival + after)), 0.0)
        # Negated, so that NaN is kept.
        value = tl.where(valid & ~(score < least), rank(score + noise), float("-inf"))
        top = tl.max(tl.max(value, axis=1), axis=0)
        winner = tl.min(tl.min(tl.where(value == top, token, _INT_MAX), axis=1), axis=0)
        better = (top > best) | ((top == best) & (winner < pick) & (top > float("-inf")))
        pick = tl.where(better, winner, pick)
        best = tl.maximum(best, top)
        highest = tl.max(tl.max(bounds, axis=1), axis=0)
    return best, pick


@triton.jit(do_not_specialize=["draw"])
def gumbel_argmax_kernel(
    scores,  # float [num_rows, vocab]
    row_stride,
    vocab_size,
    seeds,  # int64 [num_rows]
    positions,  # int64 [num_rows]
    draw,
    picks,  # int64 [num_rows]
    WIDTH: tl.constexpr,
):
    number = tl.program_id(0).to(tl.int64)
    row = scores + number * row_stride
    key, other = row_keys(tl.load(seeds + number), tl.load(positions + number), draw)
    best = tl.full((), float("-inf"), tl.float32)
    pick = tl.full((), 0, tl.int32)
    offsets = token_offsets(WIDTH)
    for start in range(0, vocab_size, WIDTH * GROUP):
        x = tl.load(row + start + offsets, mask=start + offsets < vocab_size, other=float("-inf")).to(tl.float32)
        best, pick = race(best, pick, x, row, start, vocab_size, 1.0, key, other, True, -1, float("-inf"), WIDTH)
    tl.store(picks + number, pick.to(tl.int64))


@on_its_device
def launch_gumbel_argmax(scores: Tensor, seeds: Tensor, positions: Tensor, draw: int) -> Tensor:
    """`op.gumbel_argmax` with one program per row; float32, float16 or bfloat16 scores."""
    num_rows, vocab_size = scores.shape
    picks = torch.empty(num_rows, dtype=torch.int64, device=scores.device)
    if scores.stride(1) != 1:
        scores = scores.contiguous()
    if num_rows == 0:
        return picks
    gumbel_argmax_kernel[(num_rows,)](
        scores,
        scores.stride(0),
        vocab_size,
        seeds.contiguous(),
        positions.contiguous(),
        draw,
        picks,
        **settings("noise", "gumbel_argmax"),
        **LAUNCH,
    )
    return picks
