"""Verification on a GPU: one launch looks at the rows, in splits of the vocabulary, and one settles the requests."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.acceptance import types
from twotower_kernels.acceptance.types import AcceptanceRule, Accepted, SamplingTensors
from twotower_kernels.backend import on_its_device
from twotower_kernels.noise.kernel import (
    GROUP,
    LAUNCH,
    hash_bits,
    race,
    reproducible_log,
    row_keys,
    token_offsets,
    uniform,
)
from twotower_kernels.tuning import next_power_of_2, settings

_SAMPLE_DRAW = tl.constexpr(types.SAMPLE_DRAW)
_ACCEPT_DRAW = tl.constexpr(types.ACCEPT_DRAW)
_NEXT_TOKEN_DRAW = tl.constexpr(types.NEXT_TOKEN_DRAW)
_PLACEHOLDER = tl.constexpr(types.PLACEHOLDER)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
_INT_MAX = tl.constexpr(2**31 - 1)
_INT_MIN = tl.constexpr(-(2**31))

# Fewest rows that one program of the second launch is compiled for; a smaller tile would be no faster.
LEAST_ROWS = 32

# Lowest bit in which the sort keys of two logits of a dtype can differ, once widened to float32; a power of 4.
LOWEST_STEP_OF = {torch.bfloat16: 1 << 16, torch.float16: 1 << 12, torch.float32: 1}


# Arguments that change from step to step. Triton would compile a kernel of its own, while serving, when one of them is
# 1 or a multiple of 16, or when a pointer happens to be aligned.
_RUNTIME = ("num_splits", "has_top_k", "has_top_p", "has_min_p")
_SETTLE_RUNTIME = ("num_splits", "width")
_REQUESTS = ("draft_token_ids", "cu_num_draft_tokens", "temperature", "seeds", "positions")
_PARTS = ("best_scores", "picks", "maxima", "sums", "draft_scores")
_ANY_ALIGNMENT = (*_REQUESTS, "top_k", "top_p", "min_p", *_PARTS)
_SETTLE_ANY_ALIGNMENT = (*_REQUESTS, *_PARTS, "token_ids", "num_accepted")


@triton.jit(do_not_specialize=_RUNTIME, do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def judge_rows_kernel(
    logits,  # float [num_rows, vocab]
    row_stride,
    vocab_size,
    draft_token_ids,  # int [num_draft_tokens]
    cu_num_draft_tokens,  # int [num_reqs]
    temperature,  # float32 [num_reqs] or None
    top_k,  # int [num_reqs], read if has_top_k
    top_p,  # float32 [num_reqs], read if has_top_p
    min_p,  # float32 [num_reqs], read if has_min_p
    has_top_k,
    has_top_p,
    has_min_p,
    seeds,  # int64 [num_reqs]
    positions,  # int64 [num_reqs]
    best_scores,  # float32 [num_rows, num_splits]
    picks,  # int32 [num_rows, num_splits]
    maxima,  # float32 [num_rows, num_splits]
    sums,  # float32 [num_rows, num_splits], of exp(score - maximum)
    draft_scores,  # float32 [num_rows]
    num_splits,
    tokens_per_split,
    ONE_HOT: tl.constexpr,
    FILTERS: tl.constexpr,
    LOWEST_STEP: tl.constexpr,
    WIDTH: tl.constexpr,
    FILTER_BLOCK: tl.constexpr,
):
    """Finds the best token under noise in one split of one row, and the sums that the draft's probability needs."""
    split, offset, request = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    drafts_before, num_drafts = _drafts_of(cu_num_draft_tokens, request)
    if offset > num_drafts:
        return
    number = (drafts_before + request + offset).to(tl.int64)
    row = logits + number * row_stride
    place = number * num_splits + split

    scale, sampled = _scale_of(temperature, request)
    draw: tl.constexpr = _NEXT_TOKEN_DRAW if ONE_HOT else _SAMPLE_DRAW
    key, other = row_keys(tl.load(seeds + request), tl.load(positions + request) + offset, draw)
    draft = tl.load(draft_token_ids + drafts_before + offset, mask=offset < num_drafts, other=_PLACEHOLDER).to(tl.int32)
    excluded = tl.where(sampled, draft, _PLACEHOLDER) if ONE_HOT else _PLACEHOLDER

    first = split * tokens_per_split
    last = tl.minimum(first + tokens_per_split, vocab_size)
    least = tl.full((), float("-inf"), tl.float32)
    if FILTERS:
        k = tl.load(top_k + request, mask=has_top_k != 0, other=0).to(tl.int32)
        # Above 0: the most probable token stays in any case.
        p = tl.maximum(tl.load(top_p + request, mask=has_top_p != 0, other=1.0).to(tl.float32), _TINY)
        low = tl.load(min_p + request, mask=has_min_p != 0, other=0.0).to(tl.float32)
        filtered = sampled & (((k > 0) & (k < vocab_size)) | (p < 1) | (low > 0))
        # The bound needs the whole row, so its first program reads all of it and the others nothing.
        first = tl.where(filtered, 0, first)
        last = tl.where(filtered, tl.where(split == 0, vocab_size, 0), last)
        if filtered & (split == 0):
            least = _least_score(row, vocab_size, scale, k, p, low, LOWEST_STEP, FILTER_BLOCK)

    best = tl.full((), float("-inf"), tl.float32)
    pick = split * tokens_per_split
    maximum = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    offsets = token_offsets(WIDTH)
    start = first
    coming = _logits(row, start, last, vocab_size, offsets)
    while start < last:
        x = coming.to(tl.float32)
        # The next part is loaded while this one is looked at.
        coming = _logits(row, start + WIDTH * GROUP, last, vocab_size, offsets)
        if FILTERS:
            x = tl.where(x * scale < least, float("-inf"), x)
        if ONE_HOT:
            scores = x * scale
            higher = tl.maximum(maximum, tl.max(tl.max(scores, axis=0), axis=0))
            anchor = tl.where(higher == float("-inf"), 0.0, higher)
            total = total * tl.exp(maximum - anchor) + tl.sum(tl.sum(tl.exp(scores - anchor), axis=0), axis=0)
            maximum = higher
        best, pick = race(best, pick, x, row, start, vocab_size, scale, key, other, sampled, excluded, least, WIDTH)
        start += WIDTH * GROUP
    tl.store(best_scores + place, best)
    tl.store(picks + place, pick)
    if ONE_HOT:
        tl.store(maxima + place, maximum)
        tl.store(sums + place, total)
        is_token = (draft >= 0) & (draft < vocab_size)
        score = tl.load(row + draft, mask=is_token, other=float("-inf")).to(tl.float32) * scale
        score = tl.where(score < least, float("-inf"), score)
        mine = ((draft >= first) & (draft < last)) | (~is_token & (split == 0))
        tl.store(draft_scores + number, score, mask=mine)


@triton.jit
def _logits(row, start, last, vocab_size, offsets):
    """Logits of the part that begins at `start`, if that is before `last`; -inf beyond the vocabulary."""
    end = tl.where(start < last, vocab_size, 0)
    return tl.load(row + start + offsets, mask=start + offsets < end, other=float("-inf"))


@triton.jit
def _drafts_of(cu_num_draft_tokens, request):
    """Number of drafts before a request, and of its own."""
    before = tl.load(cu_num_draft_tokens + request - 1, mask=request > 0, other=0).to(tl.int32)
    return before, tl.load(cu_num_draft_tokens + request).to(tl.int32) - before


@triton.jit
def _scale_of(temperature, request):
    """Factor on the logits of a request, and whether it samples."""
    if temperature is None:
        return tl.full((), 1.0, tl.float32), tl.full((), False, tl.int1)
    else:
        given = tl.load(temperature + request).to(tl.float32)
        one = tl.full((), 1.0, tl.float32)
        return tl.div_rn(one, tl.where(given > 0, given, 1.0)), given > 0


@triton.jit
def _least_score(row, vocab_size, scale, k, p, low, LOWEST_STEP: tl.constexpr, BLOCK: tl.constexpr):
    """Scaled logit that tokens must reach to stay: by min-p, then top-k, then top-p."""
    highest = tl.full((BLOCK,), float("-inf"), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=3):
        tokens = tl.arange(0, BLOCK) + start
        x = tl.load(row + tokens, mask=tokens < vocab_size, other=float("-inf")).to(tl.float32)
        highest = tl.where((x > highest) | (x != x), x, highest)  # keeps NaN
    top = tl.max(highest, axis=0) * scale
    has_nan = tl.max((highest != highest).to(tl.int32), axis=0) > 0
    least = tl.where((low > 0) & ~has_nan, top + reproducible_log(tl.maximum(low, _TINY)), float("-inf"))
    if (k > 0) & (k < vocab_size):
        kth = _threshold(row, vocab_size, scale, top, least, k.to(tl.float32), False, LOWEST_STEP, BLOCK)
        least = tl.where(kth > least, kth, least)
    if p < 1:
        total = _weight_from(row, vocab_size, scale, top, least, _INT_MIN, 0, True, BLOCK)[0]
        last = _threshold(row, vocab_size, scale, top, least, p * total, True, LOWEST_STEP, BLOCK)
        least = tl.where(last > least, last, least)
    return least


@triton.jit
def _threshold(
    row, vocab_size, scale, top, least, limit, BY_MASS: tl.constexpr, LOWEST_STEP: tl.constexpr, BLOCK: tl.constexpr
):
    """Largest scaled logit such that tokens from it on weigh at least `limit` together."""
    # Search for the sort key from its highest bits down, two bits at a time.
    key = tl.full((), _INT_MIN, tl.int32)
    step = tl.full((), 1 << 30, tl.int32)
    while step >= LOWEST_STEP:
        one, two, three = _weight_from(row, vocab_size, scale, top, least, key, step, BY_MASS, BLOCK)
        digit = (one >= limit).to(tl.int32) + (two >= limit).to(tl.int32) + (three >= limit).to(tl.int32)
        key += digit * step
        step = step >> 2
    return _in_order(key).to(tl.float32, bitcast=True) * scale


@triton.jit
def _weight_from(row, vocab_size, scale, top, least, key, step, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Weights of tokens from `key + step`, `key + 2 step` and `key + 3 step` on: their number, or their mass."""
    one = tl.zeros((BLOCK,), tl.float32)
    two = tl.zeros((BLOCK,), tl.float32)
    three = tl.zeros((BLOCK,), tl.float32)
    for start in tl.range(0, vocab_size, BLOCK, num_stages=3):
        tokens = tl.arange(0, BLOCK) + start
        inside = tokens < vocab_size
        x = tl.load(row + tokens, mask=inside, other=float("-inf")).to(tl.float32)
        if BY_MASS:
            weight = tl.where(inside & ~(x * scale < least), tl.exp(x * scale - top), 0.0)
        else:
            weight = inside.to(tl.float32)
        keys = _in_order((x + 0.0).to(tl.int32, bitcast=True))
        one += tl.where(keys >= key + step, weight, 0.0)
        two += tl.where(keys >= key + 2 * step, weight, 0.0)
        three += tl.where(keys >= key + 3 * step, weight, 0.0)
    return tl.sum(one, axis=0), tl.sum(two, axis=0), tl.sum(three, axis=0)


@triton.jit
def _in_order(bits):
    """Bits of a float32 as int32 in the order of the numbers, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit(do_not_specialize=_SETTLE_RUNTIME, do_not_specialize_on_alignment=_SETTLE_ANY_ALIGNMENT)
def settle_requests_kernel(
    draft_token_ids,  # int [num_draft_tokens]
    cu_num_draft_tokens,  # int [num_reqs]
    temperature,  # float32 [num_reqs] or None
    seeds,  # int64 [num_reqs]
    positions,  # int64 [num_reqs]
    best_scores,  # float32 [num_rows, num_splits]
    picks,  # int32 [num_rows, num_splits]
    maxima,  # float32 [num_rows, num_splits]
    sums,  # float32 [num_rows, num_splits]
    draft_scores,  # float32 [num_rows]
    token_ids,  # int32 [num_reqs, width]
    num_accepted,  # int32 [num_reqs]
    width,
    num_splits,
    ONE_HOT: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Puts the splits of a request's rows together, accepts from the left, and writes its tokens."""
    request = tl.program_id(0)
    drafts_before, num_drafts = _drafts_of(cu_num_draft_tokens, request)
    offset = tl.arange(0, ROWS)
    present = offset <= num_drafts
    number = (offset + drafts_before + request).to(tl.int64)
    split = tl.arange(0, SPLITS)[None, :]
    place = number[:, None] * num_splits + split
    inside = present[:, None] & (split < num_splits)

    score = tl.load(best_scores + place, mask=inside, other=float("-inf"))
    token = tl.load(picks + place, mask=inside, other=_INT_MAX)
    best = tl.max(score, axis=1)
    pick = tl.min(tl.where(score == best[:, None], token, _INT_MAX), axis=1)
    draft = tl.load(draft_token_ids + drafts_before + offset, mask=offset < num_drafts, other=_PLACEHOLDER).to(tl.int32)
    accepted = pick == draft
    if ONE_HOT:
        _, sampled = _scale_of(temperature, request)
        maximum = tl.load(maxima + place, mask=inside, other=float("-inf"))
        highest = tl.max(maximum, axis=1)
        # Where every token is excluded the difference is NaN, and so is the probability: nothing is accepted.
        share = tl.where(maximum == float("-inf"), 0.0, tl.exp(maximum - highest[:, None]))
        total = tl.sum(tl.load(sums + place, mask=inside, other=0.0) * share, axis=1)
        probability = tl.exp(tl.load(draft_scores + number, mask=present, other=float("-inf")) - highest) / total
        key, other = row_keys(tl.load(seeds + request), tl.load(positions + request) + offset, _ACCEPT_DRAW)
        chance = uniform(hash_bits(tl.zeros((ROWS,), tl.int32), key, other))
        accepted = tl.where(sampled, chance < probability, accepted)
    accepted = accepted & (offset < num_drafts)
    count = tl.min(tl.where(accepted, ROWS, offset), axis=0)
    tokens = tl.where(offset < count, draft, tl.where(offset == count, pick, _PLACEHOLDER))
    tl.store(token_ids + request.to(tl.int64) * width + offset, tokens, mask=offset < width)
    tl.store(num_accepted + request, count)


@on_its_device
def launch_accept(
    logits: Tensor,
    draft_token_ids: Tensor,
    cu_num_draft_tokens: Tensor,
    max_num_draft_tokens: int,
    sampling: SamplingTensors,
    acceptance_rule: AcceptanceRule,
) -> Accepted:
    """`op.accept` in two launches; everything is decided on the device."""
    if logits.stride(-1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}; the vocabulary must be contiguous")
    device, num_reqs, width = logits.device, len(cu_num_draft_tokens), max_num_draft_tokens + 1
    result = Accepted(
        torch.empty(num_reqs, width, dtype=torch.int32, device=device),
        torch.empty(num_reqs, dtype=torch.int32, device=device),
    )
    if num_reqs == 0:
        return result
    num_rows, vocab_size = logits.shape
    one_hot = acceptance_rule == "one-hot" and sampling.temperature is not None
    chosen = settings("acceptance", judge_settings(one_hot))
    chunk = chosen["WIDTH"] * GROUP.value
    num_splits, tokens_per_split = _splits(num_reqs * width, vocab_size, chunk, chosen["TARGET_PROGRAMS"])
    parts = torch.empty(4, num_rows, num_splits, dtype=torch.float32, device=device)
    best_scores, picks, maxima, sums = parts[0], parts[1].view(torch.int32), parts[2], parts[3]
    draft_scores = torch.empty(num_rows, dtype=torch.float32, device=device)
    temperature, *given = (
        None if value is None else value.contiguous()
        for value in (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
    )
    seeds, positions = sampling.seeds.contiguous(), sampling.positions.contiguous()
    draft_token_ids, cu_num_draft_tokens = draft_token_ids.contiguous(), cu_num_draft_tokens.contiguous()
    # A filter that is not given is not read; a pointer of its type stands in, so that one kernel serves all
    # combinations.
    stand_ins = (cu_num_draft_tokens, temperature, temperature)
    filters = [stand_in if value is None else value for value, stand_in in zip(given, stand_ins, strict=True)]
    judge_rows_kernel[(num_splits, width, num_reqs)](
        logits,
        logits.stride(0),
        vocab_size,
        draft_token_ids,
        cu_num_draft_tokens,
        temperature,
        *filters,
        *(int(value is not None) for value in given),
        seeds,
        positions,
        best_scores,
        picks,
        maxima,
        sums,
        draft_scores,
        num_splits,
        tokens_per_split,
        ONE_HOT=one_hot,
        FILTERS=sampling.filters and temperature is not None,
        LOWEST_STEP=LOWEST_STEP_OF[logits.dtype],
        WIDTH=chosen["WIDTH"],
        FILTER_BLOCK=chosen["FILTER_BLOCK"],
        num_warps=chosen["num_warps"],
        **LAUNCH,
    )
    settle_requests_kernel[(num_reqs,)](
        draft_token_ids,
        cu_num_draft_tokens,
        temperature,
        seeds,
        positions,
        best_scores,
        picks,
        maxima,
        sums,
        draft_scores,
        result.token_ids,
        result.num_accepted,
        width,
        num_splits,
        ONE_HOT=one_hot,
        ROWS=max(LEAST_ROWS, next_power_of_2(width)),
        SPLITS=next_power_of_2(-(-vocab_size // chunk)),
        **settings("acceptance", "settle_requests"),
        **LAUNCH,
    )
    return result


def judge_settings(one_hot: bool) -> str:
    """Names the settings of the first launch; the one-hot rule needs more registers, so its tiles are narrower."""
    return "judge_one_hot" if one_hot else "judge_rows"


def _splits(most_rows: int, vocab_size: int, chunk: int, target_programs: int) -> tuple[int, int]:
    """Number of parts of a row, so that about `target_programs` programs run, and tokens per part."""
    chunks = -(-vocab_size // chunk)
    wanted = min(chunks, -(-target_programs // most_rows))
    tokens = -(-chunks // wanted) * chunk
    return -(-vocab_size // tokens), tokens
