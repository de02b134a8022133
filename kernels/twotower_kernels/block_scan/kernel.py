"""The scan in Triton: one program per request, head and part of a head; convolution and recurrence in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.block_scan.types import ScanWeights
from twotower_kernels.tuning import cdiv, settings

OP = "block_scan"

# Three TF32 products make one float32 product on tensor cores; a single one would lose 13 bits of the state.
PRECISION = "tf32x3"

# Most tokens that one program takes, and so one launch. With 64, registers run out on sm_80.
MOST_TOKENS = 32


@triton.jit
def softplus(x):
    """Computes log(1 + exp(x)) to the last bits: log1p(e) is 2 artanh(e / (2 + e)), and e <= 1 needs 8 terms of it."""
    e = tl.exp(-tl.abs(x))
    s = e / (2.0 + e)
    square = s * s
    series = 1.0 / 15 * square + 1.0 / 13
    series = series * square + 1.0 / 11
    series = series * square + 1.0 / 9
    series = series * square + 1.0 / 7
    series = series * square + 1.0 / 5
    series = series * square + 1.0 / 3
    series = series * square + 1.0
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def raw_inputs(
    u, conv_state, token, channel, valid, u_stride, conv_stride, HISTORY: tl.constexpr, ALIGNED: tl.constexpr
):
    """Convolution inputs of one request at `token` (negative: before the block), zeros where not `valid`."""
    row = tl.where(token >= 0, u + token * u_stride, conv_state + (token + HISTORY) * conv_stride)
    if ALIGNED:
        # The compiler cannot see the alignment of a pointer that is one of two, and would load number by number.
        row = tl.multiple_of(row, (16, 16))
    return tl.load(row + channel, mask=valid, other=0.0)


@triton.jit
def convolved(
    u, conv_state, conv_weight, conv_bias, token, channel, valid, wanted,
    u_stride, conv_stride, weight_stride, tap_stride, TAPS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """Convolution and SiLU at [tokens, 1] x [1, channels], rounded to the dtype of `u`; zeros where not `valid`."""
    mixed = tl.zeros(valid.shape, tl.float32)
    if conv_bias is not None:
        mixed += tl.load(conv_bias + channel, mask=wanted, other=0.0).to(tl.float32)
    for k in tl.static_range(TAPS):
        tap = tl.load(conv_weight + channel * weight_stride + k * tap_stride, mask=wanted, other=0.0)
        source = token + k - TAPS + 1
        inputs = raw_inputs(u, conv_state, source, channel, valid, u_stride, conv_stride, TAPS - 1, ALIGNED)
        mixed += inputs.to(tl.float32) * tap.to(tl.float32)
    mixed = mixed / (1.0 + tl.exp(-mixed))
    return tl.where(valid, mixed, 0.0).to(u.dtype.element_ty).to(tl.float32)


@triton.jit
def keep_last_inputs(
    u, conv_state, new_conv, length, channel, wanted, u_stride, conv_stride, channels, HISTORY: tl.constexpr
):
    """Stores the last `HISTORY` inputs of one request, up to its `length`, for some of the channels."""
    for k in tl.static_range(HISTORY):
        token = tl.full((1, 1), k - HISTORY, tl.int64) + length
        kept = raw_inputs(u, conv_state, token, channel, wanted, u_stride, conv_stride, HISTORY, ALIGNED=False)
        tl.store(new_conv + k * channels + channel, kept, mask=wanted)


@triton.jit(do_not_specialize=["first_token", "num_tokens"], do_not_specialize_on_alignment=["query_lens", "slots"])
def scan_kernel(
    u,  # [num_reqs, num_tokens, channels], channels = x | B | C
    delta,  # [num_reqs, num_tokens, HEADS]
    conv_state,  # [num_reqs or num_slots, TAPS - 1, channels]
    ssm_state,  # float32 [num_reqs or num_slots, HEADS, HEAD_DIM, STATE]
    conv_weight,  # [channels, TAPS]
    conv_bias,  # [channels] or None
    a_log,  # float32 [HEADS]
    d,  # float32 [HEADS]
    dt_bias,  # float32 [HEADS]
    query_lens,  # int64 [num_reqs] or None
    slots,  # int64 [num_reqs], rows of the states; None where requests are rows
    y,  # float32 [num_reqs, num_tokens, HEADS, HEAD_DIM], zeros beyond query_lens; None if not wanted
    new_conv,  # [num_reqs, TAPS - 1, channels], contiguous; None if not wanted, as is the next
    new_ssm,  # float32 like ssm_state, which it may be: a program reads what it writes, and nobody else does
    first_token,  # index in the block of the first token of this launch
    num_tokens,  # at most BLOCK_T
    u_request_stride,
    u_stride,
    delta_request_stride,
    delta_stride,
    conv_request_stride,
    conv_stride,
    y_request_stride,
    ssm_request_stride,
    new_ssm_request_stride,
    weight_stride,
    tap_stride,
    TAPS: tl.constexpr,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    STATE: tl.constexpr,
    ALIGNED: tl.constexpr,  # rows of u and conv_state start at multiples of 16 bytes
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    PARTS: tl.constexpr = (HEAD_DIM + BLOCK_P - 1) // BLOCK_P
    CHANNELS: tl.constexpr = HEADS * HEAD_DIM + 2 * GROUPS * STATE
    head, part, request = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS, tl.program_id(1).to(tl.int64)
    group = head // (HEADS // GROUPS)
    length = num_tokens
    if query_lens is not None:
        length = tl.minimum(tl.maximum(tl.load(query_lens + request).to(tl.int32) - first_token, 0), num_tokens)
    u += request * u_request_stride
    row = request
    if slots is not None:
        row = tl.load(slots + request)
    conv_state += row * conv_request_stride

    t = tl.arange(0, BLOCK_T)
    token, valid = t.to(tl.int64)[:, None], (t < length)[:, None]
    delta += request * delta_request_stride + t.to(tl.int64) * delta_stride + head
    raw_step = tl.load(delta, mask=t < length, other=0.0)
    step = tl.where(t < length, softplus(raw_step.to(tl.float32) + tl.load(dt_bias + head)), 0.0)
    # In float64, because a sum of many decays would lose the small differences that matter.
    decays = (step * -tl.exp(tl.load(a_log + head))).to(tl.float64)
    log_decay, whole = tl.cumsum(decays, 0), tl.sum(decays, 0)

    place = part * BLOCK_P + tl.arange(0, BLOCK_P)  # in the head
    x_channel, x_wanted = (head * HEAD_DIM + place)[None, :], (place < HEAD_DIM)[None, :]
    x = convolved(
        u, conv_state, conv_weight, conv_bias, token, x_channel, valid & x_wanted, x_wanted,
        u_stride, conv_stride, weight_stride, tap_stride, TAPS, ALIGNED,
    )  # fmt: skip
    if new_ssm is not None:
        driving = tl.trans(x * (tl.exp((whole - log_decay).to(tl.float32)) * step)[:, None])

    # The state is read once, some of its columns at a time.
    from_state = tl.zeros((BLOCK_T, BLOCK_P), tl.float32)
    similarity = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for first in range(0, STATE, BLOCK_N):
        n = first + tl.arange(0, BLOCK_N)
        b_channel, b_wanted = (HEADS * HEAD_DIM + group * STATE + n)[None, :], (n < STATE)[None, :]
        c_channel = b_channel + GROUPS * STATE
        cell, stored = (head * HEAD_DIM + place[:, None]) * STATE + n[None, :], tl.trans(x_wanted) & b_wanted
        state = tl.load(ssm_state + row * ssm_request_stride + cell, mask=stored, other=0.0)
        b = convolved(
            u, conv_state, conv_weight, conv_bias, token, b_channel, valid & b_wanted, b_wanted,
            u_stride, conv_stride, weight_stride, tap_stride, TAPS, ALIGNED,
        )  # fmt: skip
        if y is not None:
            c = convolved(
                u, conv_state, conv_weight, conv_bias, token, c_channel, valid & b_wanted, b_wanted,
                u_stride, conv_stride, weight_stride, tap_stride, TAPS, ALIGNED,
            )  # fmt: skip
            similarity = tl.dot(c, tl.trans(b), similarity, input_precision=PRECISION)
            from_state = tl.dot(c, tl.trans(state), from_state, input_precision=PRECISION)
        if new_ssm is not None:
            state = tl.dot(driving, b, state * tl.exp(whole.to(tl.float32)), input_precision=PRECISION)
            tl.store(new_ssm + row * new_ssm_request_stride + cell, state, mask=stored)

    if y is not None:
        # Decay from token t' to token t, capped before exp, which would overflow above the diagonal.
        gap = tl.minimum(log_decay[:, None] - log_decay[None, :], 0.0).to(tl.float32)
        mixing = tl.where(t[:, None] >= t[None, :], tl.exp(gap) * step[None, :] * similarity, 0.0)
        out = from_state * tl.exp(log_decay.to(tl.float32))[:, None] + tl.load(d + head) * x
        out = tl.dot(mixing, x, out, input_precision=PRECISION)
        y += request * y_request_stride + token * HEADS * HEAD_DIM + x_channel
        tl.store(y, tl.where(valid, out, 0.0), mask=(t < num_tokens)[:, None] & x_wanted)
    if new_conv is not None:
        new_conv += request * (TAPS - 1) * CHANNELS
        keep_last_inputs(
            u, conv_state, new_conv, length, x_channel, x_wanted, u_stride, conv_stride, CHANNELS, TAPS - 1
        )
        # All heads of a group share B and C: the first part of the first head stores them.
        if (part == 0) & (head % (HEADS // GROUPS) == 0):
            for start in range(0, 2 * GROUPS * STATE, GROUPS * STATE):
                for first_kept in range(0, STATE, BLOCK_N):
                    kept = first_kept + tl.arange(0, BLOCK_N)
                    keep_last_inputs(
                        u, conv_state, new_conv, length,
                        (HEADS * HEAD_DIM + start + group * STATE + kept)[None, :], (kept < STATE)[None, :],
                        u_stride, conv_stride, CHANNELS, TAPS - 1,
                    )  # fmt: skip


def launch_scan(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None,
    want_output: bool,
    want_state: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Output, convolution state and SSM state of `block_scan`, each None if not wanted; a launch per `MOST_TOKENS`."""
    # The kernel reads from one or the other by one pointer, so they must have one dtype.
    conv_state = conv_state.to(u.dtype)
    u, delta, conv_state = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, delta, conv_state))
    ssm_state = ssm_state if ssm_state[:1].is_contiguous() else ssm_state.contiguous()
    y = _room_for_output(u, ssm_state) if want_output else None
    for first in range(0, u.shape[1], MOST_TOKENS):
        goes_on = want_state or first + MOST_TOKENS < u.shape[1]
        new_conv = torch.empty_like(conv_state, memory_format=torch.contiguous_format) if goes_on else None
        new_ssm = torch.empty_like(ssm_state, memory_format=torch.contiguous_format) if goes_on else None
        _launch(u, delta, conv_state, ssm_state, weights, query_lens, None, y, new_conv, new_ssm, first)
        if new_conv is not None and new_ssm is not None:
            conv_state, ssm_state = new_conv, new_ssm
    return (y, conv_state, ssm_state) if want_state else (y, None, None)


def launch_pool_scan(
    u: Tensor,
    delta: Tensor,
    conv_pool: Tensor,
    ssm_pool: Tensor,
    slots: Tensor | None,
    weights: ScanWeights,
    query_lens: Tensor | None,
    new_conv: Tensor | None,
) -> Tensor:
    """Output of `pool_scan`; SSM states are read, and written, where they lie. Without `slots` all rows are meant."""
    u, delta = (t if t.stride(-1) == 1 else t.contiguous() for t in (u, delta))
    y = _room_for_output(u, ssm_pool)
    for first in range(0, u.shape[1], MOST_TOKENS):
        if first and new_conv is not None:  # where the next launch reads them; all heads of a group did in the last
            conv_pool[slice(None) if slots is None else slots] = new_conv
        new_ssm = None if new_conv is None else ssm_pool
        _launch(u, delta, conv_pool, ssm_pool, weights, query_lens, slots, y, new_conv, new_ssm, first)
    return y


def _room_for_output(u: Tensor, ssm_state: Tensor) -> Tensor:
    return ssm_state.new_empty(*u.shape[:2], ssm_state.shape[1] * ssm_state.shape[2])


@on_its_device
def _launch(
    u: Tensor,
    delta: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    weights: ScanWeights,
    query_lens: Tensor | None,
    slots: Tensor | None,
    y: Tensor | None,
    new_conv: Tensor | None,
    new_ssm: Tensor | None,
    first_token: int,
) -> None:
    """Launches the kernel for up to `MOST_TOKENS` tokens from `first_token` on."""
    part = slice(first_token, first_token + MOST_TOKENS)
    u, delta, y = u[:, part], delta[:, part], None if y is None else y[:, part]
    num_reqs, num_tokens, _ = u.shape
    heads, head_dim, state_size = ssm_state.shape[1:]
    block_t = tile_of(num_tokens)
    chosen = settings(OP, f"scan_{block_t}")
    scan_kernel[heads * cdiv(head_dim, chosen["BLOCK_P"]), num_reqs](
        u, delta, conv_state, ssm_state,
        weights.conv_weight, weights.conv_bias, weights.a_log, weights.d, weights.dt_bias,
        query_lens, slots, y, new_conv, new_ssm, first_token, num_tokens,
        *u.stride()[:2], *delta.stride()[:2], *conv_state.stride()[:2],
        0 if y is None else y.stride(0), ssm_state.stride(0), 0 if new_ssm is None else new_ssm.stride(0),
        *weights.conv_weight.stride(),
        TAPS=weights.conv_weight.shape[1], HEADS=heads, GROUPS=weights.num_groups,
        HEAD_DIM=head_dim, STATE=state_size, ALIGNED=_rows_aligned(u) and _rows_aligned(conv_state),
        PRECISION=PRECISION, BLOCK_T=block_t, **chosen,
    )  # fmt: skip


def _rows_aligned(x: Tensor) -> bool:
    request_bytes, token_bytes = (stride * x.element_size() for stride in x.stride()[:2])
    return (x.data_ptr() | request_bytes | token_bytes) % 16 == 0


def tile_of(num_tokens: int) -> int:
    """Rows of a program's matrices; tensor cores take 16 at a time."""
    return 16 if num_tokens <= 16 else MOST_TOKENS
