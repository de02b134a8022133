"""A denoising step on a GPU in one launch: programs read splits of rows, a request's last one settles its block."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from twotower_kernels.backend import on_its_device
from twotower_kernels.noise.kernel import GROUP, LAUNCH, race, row_keys, token_offsets
from twotower_kernels.tuning import Settings, cdiv, next_power_of_2, settings
from twotower_kernels.unmasking.types import PickNoise, Unmasked

_INT_MAX = tl.constexpr(2**31 - 1)
_LOG2_E = tl.constexpr(math.log2(math.e))

# Arguments that change from step to step. Triton would compile a kernel of its own, while serving, when one of them is
# 1 or a multiple of 16.
_RUNTIME = (
    "num_rows",
    "num_token_ids",
    "mask_token_id",
    "draw",
    "confidence_threshold",
    "remaining_steps",
    "num_reqs",
    "num_splits",
    "chunks_per_split",
)


@triton.jit(do_not_specialize=_RUNTIME)
def unmask_kernel(
    logits,  # float [num_rows, vocab]
    row_stride,
    num_rows,
    vocab_size,
    num_token_ids,
    mask_token_id,
    positions,  # int64 [num_rows], or None for a row per position of the blocks
    given_picks,  # int64 [num_rows] or None
    temperature,  # float32, or None for the most probable token
    seeds,  # int64 [num_reqs]
    first_positions,  # int64 [num_reqs]
    draw,
    token_ids,  # int64 [num_reqs, block_size] or None
    masked,  # bool [num_reqs, block_size], or None for all
    confidence,  # float32 [num_reqs, block_size] or None
    confidence_threshold,  # float32
    remaining_steps,
    threshold_of,  # float32 [num_reqs], or None for confidence_threshold
    steps_of,  # int [num_reqs], or None for remaining_steps
    parts,  # float32 [4, num_reqs * block_size, num_splits]: best score, logit of the pick, unit, sum
    picks,  # int32 [num_reqs * block_size, num_splits]
    counters,  # int32 [num_reqs], 0
    new_token_ids,  # int64 [num_reqs, block_size]
    new_confidence,  # float32 [num_reqs, block_size]
    commits,  # bool [num_reqs, block_size] or None
    num_reqs,
    block_size,
    num_splits,
    chunks_per_split,
    WIDTH: tl.constexpr,
    POSITIONS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Reads one split of one row; the first programs stand for requests, so that those without rows are settled too."""
    program = tl.program_id(0)
    has_row = program >= num_reqs
    number = tl.maximum(program - num_reqs, 0) // num_splits
    split = (program - num_reqs) % num_splits
    position = number if positions is None else tl.load(positions + number, mask=has_row, other=0).to(tl.int32)
    request = tl.where(has_row, position // block_size, program)
    if masked is not None:
        arrives = ~has_row | (tl.load(masked + position, mask=has_row, other=0) != 0)
    else:
        arrives = tl.full((), True, tl.int1)

    part_size = num_reqs.to(tl.int64) * block_size * num_splits
    if has_row & arrives:
        row = logits + number.to(tl.int64) * row_stride
        best, pick, unit, total = _of_split(
            row,
            vocab_size,
            num_token_ids,
            mask_token_id,
            given_picks,
            number,
            temperature,
            seeds,
            first_positions,
            draw,
            request,
            position % block_size,
            split * chunks_per_split,
            chunks_per_split,
            WIDTH,
        )
        may_be_picked = (pick != mask_token_id) & (pick < num_token_ids)
        logit = tl.load(row + pick, mask=may_be_picked, other=float("-inf")).to(tl.float32)
        place = position.to(tl.int64) * num_splits + split
        tl.store(parts + place, best)
        tl.store(parts + part_size + place, logit)
        tl.store(parts + 2 * part_size + place, unit)
        tl.store(parts + 3 * part_size + place, total)
        tl.store(picks + place, pick)
    if arrives:
        offset = tl.arange(0, POSITIONS)
        inside = offset < block_size
        at = request.to(tl.int64) * block_size + offset
        is_open = inside if masked is None else tl.load(masked + at, mask=inside, other=0) != 0
        num_others = tl.sum(is_open.to(tl.int32), axis=0) * num_splits
        # All threads must have stored their parts before one of them publishes what this program wrote.
        tl.debug_barrier()
        if tl.atomic_add(counters + request, 1, sem="acq_rel", scope="gpu") == num_others:
            seen, pick = _put_together(parts, picks, part_size, at, is_open, num_splits, SPLITS)
            # NaN ranks as 0.
            ranked = tl.where(seen == seen, seen, 0.0)
            threshold = confidence_threshold if threshold_of is None else tl.load(threshold_of + request)
            steps = remaining_steps if steps_of is None else tl.load(steps_of + request).to(tl.int32)
            count = _num_commits(ranked, is_open, threshold, steps)
            commit = is_open & (_num_ahead(ranked, is_open, offset) < count)
            old_token = tl.load(token_ids + at, mask=inside, other=0) if token_ids is not None else 0
            old_seen = tl.load(confidence + at, mask=inside, other=0.0) if confidence is not None else 0.0
            tl.store(new_token_ids + at, tl.where(commit, pick.to(tl.int64), old_token), mask=inside)
            tl.store(new_confidence + at, tl.where(commit, seen, old_seen), mask=inside)
            if commits is not None:
                tl.store(commits + at, commit, mask=inside)
            tl.store(counters + request, 0)


@triton.jit
def _of_split(
    row,
    vocab_size,
    num_token_ids,
    mask_token_id,
    given_picks,
    number,
    temperature,
    seeds,
    first_positions,
    draw,
    request,
    offset,
    first_chunk,
    num_chunks,
    WIDTH: tl.constexpr,
):
    """Best score of a split and its token, and the sum of exp(logits) in units of 2^unit.

    2^unit is at least the largest summand, and changing the unit is exact, since it is an integer. The unit is infinite
    where a logit is NaN or infinite; then the sum is NaN.
    """
    chunk_size: tl.constexpr = WIDTH * GROUP
    best = tl.full((), float("-inf"), tl.float32)
    pick = first_chunk * chunk_size
    unit = tl.full((), float("-inf"), tl.float32)
    total = tl.full((), 0.0, tl.float32)
    sampled: tl.constexpr = temperature is not None
    scale = tl.full((), 1.0, tl.float32)
    key, other = tl.full((), 0, tl.uint32), tl.full((), 0, tl.uint32)
    if sampled:
        scale = tl.div_rn(scale, temperature)
        key, other = row_keys(tl.load(seeds + request), tl.load(first_positions + request) + offset, draw)
    offsets = token_offsets(WIDTH)
    last = first_chunk + num_chunks
    coming = _logits(row, first_chunk, last, offsets, vocab_size, WIDTH)
    for chunk in range(first_chunk, last):
        x = coming.to(tl.float32)
        # The next chunk is loaded while this one is looked at.
        coming = _logits(row, chunk + 1, last, offsets, vocab_size, WIDTH)
        start = chunk * chunk_size
        has_mask_token = (mask_token_id >= start) & (mask_token_id < start + chunk_size)
        if has_mask_token | (start + chunk_size > num_token_ids):
            tokens = start + offsets
            x = tl.where((tokens == mask_token_id) | (tokens >= num_token_ids), float("-inf"), x)
        top = tl.max(tl.max(tl.where(x != x, float("inf"), x), axis=0), axis=0)
        higher = tl.maximum(unit, tl.ceil(top * _LOG2_E))
        anchor = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp2(unit - anchor) + tl.sum(tl.exp2(tl.fma(x, _LOG2_E, -anchor)))
        unit = higher
        if given_picks is None:
            best, pick = race(
                best,
                pick,
                x,
                row,
                start,
                num_token_ids,
                scale,
                key,
                other,
                sampled,
                mask_token_id,
                float("-inf"),
                WIDTH,
            )
    if given_picks is not None:
        pick = tl.load(given_picks + number).to(tl.int32)
    return best, pick, unit, total


@triton.jit
def _logits(row, chunk, last, offsets, vocab_size, WIDTH: tl.constexpr):
    """Logits of a chunk before `last`; -inf beyond the vocabulary."""
    tokens = chunk * (WIDTH * GROUP) + offsets
    end = tl.where(chunk < last, vocab_size, 0)
    return tl.load(row + tokens, mask=tokens < end, other=float("-inf"))


@triton.jit
def _put_together(parts, picks, part_size, at, is_open, num_splits, SPLITS: tl.constexpr):
    """Confidence and pick of every position of a block."""
    split = tl.arange(0, SPLITS)[None, :]
    place = at[:, None] * num_splits + split
    present = is_open[:, None] & (split < num_splits)
    # Other multiprocessors wrote these, and this one's own cache may hold older values.
    best = tl.load(parts + place, mask=present, other=float("-inf"), cache_modifier=".cg")
    logit = tl.load(parts + part_size + place, mask=present, other=float("-inf"), cache_modifier=".cg")
    unit = tl.load(parts + 2 * part_size + place, mask=present, other=float("-inf"), cache_modifier=".cg")
    total = tl.load(parts + 3 * part_size + place, mask=present, other=0.0, cache_modifier=".cg")
    token = tl.load(picks + place, mask=present, other=_INT_MAX, cache_modifier=".cg")
    is_best = best == tl.max(best, axis=1)[:, None]
    pick = tl.min(tl.where(is_best, token, _INT_MAX), axis=1)
    logit = tl.max(tl.where(token == pick[:, None], logit, float("-inf")), axis=1)
    highest = tl.max(unit, axis=1)
    share = tl.where(unit == float("-inf"), 0.0, tl.exp2(unit - highest[:, None]))
    # NaN where no token is left or a logit is NaN.
    return tl.exp2(tl.fma(logit, _LOG2_E, -highest)) / tl.sum(total * share, axis=1), pick


@triton.jit
def _num_commits(ranked, is_open, threshold, remaining_steps):
    """Number of positions that the schedule commits."""
    num_open = tl.sum(is_open.to(tl.int32), axis=0)
    above = tl.sum((is_open & (ranked > threshold)).to(tl.int32), axis=0)
    floor = (num_open + remaining_steps - 1) // remaining_steps
    return tl.maximum(tl.maximum(above, floor), 1)


@triton.jit
def _num_ahead(ranked, is_open, offset):
    """Number of open positions that rank before each: more confident ones, and later ones that are as confident."""
    own, others = ranked[:, None], ranked[None, :]
    later = offset[None, :] > offset[:, None]
    ahead = is_open[None, :] & ((others > own) | ((others == own) & later))
    return tl.sum(ahead.to(tl.int32), axis=1)


def launch_unmask(
    logits: Tensor,
    positions: Tensor | None,
    token_ids: Tensor,
    masked: Tensor,
    confidence: Tensor,
    mask_token_id: int,
    confidence_threshold: float | Tensor,
    remaining_steps: int | Tensor,
    num_token_ids: int | None = None,
    noise: PickNoise | None = None,
) -> Unmasked:
    """`op.unmask` in one launch; everything is decided on the device."""
    result = Unmasked(
        torch.empty_like(token_ids, memory_format=torch.contiguous_format),
        torch.empty_like(confidence, memory_format=torch.contiguous_format),
        torch.empty_like(masked, memory_format=torch.contiguous_format),
    )
    _launch(
        result.token_ids,
        result.confidence,
        result.commits,
        logits,
        None if positions is None else positions.contiguous(),
        token_ids.contiguous(),
        masked.contiguous(),
        confidence.contiguous(),
        mask_token_id,
        confidence_threshold,
        remaining_steps,
        num_token_ids,
        noise,
    )
    return result


def launch_pick_tokens(
    logits: Tensor, mask_token_id: int, num_token_ids: int | None = None, noise: PickNoise | None = None
) -> tuple[Tensor, Tensor]:
    """`op.pick_tokens` as blocks of one position that are committed at once."""
    picks = torch.empty(len(logits), 1, dtype=torch.int64, device=logits.device)
    confidence = torch.empty(picks.shape, dtype=torch.float32, device=logits.device)
    _launch(picks, confidence, None, logits, None, None, None, None, mask_token_id, 0.0, 1, num_token_ids, noise)
    return picks[:, 0], confidence[:, 0]


@on_its_device
def _launch(
    new_token_ids: Tensor,
    new_confidence: Tensor,
    commits: Tensor | None,
    logits: Tensor,
    positions: Tensor | None,
    token_ids: Tensor | None,
    masked: Tensor | None,
    confidence: Tensor | None,
    mask_token_id: int,
    confidence_threshold: float | Tensor,
    remaining_steps: int | Tensor,
    num_token_ids: int | None,
    noise: PickNoise | None,
) -> None:
    """Launches the kernel, which fills the first three arguments."""
    if logits.stride(-1) != 1:
        raise ValueError(f"logits have strides {logits.stride()}; the vocabulary must be contiguous")
    num_reqs, block_size = new_token_ids.shape
    if num_reqs == 0:
        return
    num_rows, device = len(logits), logits.device
    vocab_size = logits.shape[1]
    num_token_ids = vocab_size if num_token_ids is None else min(num_token_ids, vocab_size)
    chosen = settings("unmasking", "pick_tokens" if masked is None else "unmask")
    width = width_of(chosen, logits.element_size())
    num_chunks = cdiv(num_token_ids, width * GROUP.value)
    wanted = min(num_chunks, cdiv(chosen["TARGET_PROGRAMS"], max(num_rows, 1)))
    chunks_per_split = cdiv(num_chunks, wanted)
    num_splits = cdiv(num_chunks, chunks_per_split)
    given_picks = None
    if noise is not None and noise.scores is not None:
        at = torch.arange(num_rows, device=device) if positions is None else positions
        given_picks = noise.picks(noise.scores, at, block_size)
    unmask_kernel[(num_reqs + num_rows * num_splits,)](
        logits,
        logits.stride(0),
        num_rows,
        vocab_size,
        num_token_ids,
        mask_token_id,
        positions,
        given_picks,
        None if noise is None else noise.temperature,
        None if noise is None else noise.seeds.contiguous(),
        None if noise is None else noise.first_positions.contiguous(),
        0 if noise is None else noise.draw,
        token_ids,
        masked,
        confidence,
        0.0 if isinstance(confidence_threshold, Tensor) else confidence_threshold,
        1 if isinstance(remaining_steps, Tensor) else remaining_steps,
        confidence_threshold.contiguous() if isinstance(confidence_threshold, Tensor) else None,
        remaining_steps.contiguous() if isinstance(remaining_steps, Tensor) else None,
        torch.empty(4, num_reqs * block_size, num_splits, dtype=torch.float32, device=device),
        torch.empty(num_reqs * block_size, num_splits, dtype=torch.int32, device=device),
        _counters(device, num_reqs),
        new_token_ids,
        new_confidence,
        commits,
        num_reqs,
        block_size,
        num_splits,
        chunks_per_split,
        POSITIONS=next_power_of_2(block_size),
        # Room for the most splits there can be, so that one kernel serves any number of rows.
        SPLITS=next_power_of_2(num_chunks),
        WIDTH=width,
        num_warps=chosen["num_warps"],
        maxnreg=chosen["maxnreg"],
        **LAUNCH,
    )


def width_of(chosen: Settings, itemsize: int) -> int:
    """Number of groups that are read at once: the same number of bytes for every dtype."""
    return chosen["WIDTH_BYTES"] // itemsize


class _Counters:
    """Counters of programs that are done, 0 between launches: the last program of a request resets its own.

    Launches that may run at the same time must not share any counter. Every stream has its own, and so has every launch
    that a CUDA graph captured: a graph may be replayed beside eager launches of the stream that captured it.
    """

    ROOM = 1 << 16

    def __init__(self, device: torch.device) -> None:
        self._free = torch.zeros(self.ROOM, dtype=torch.int32, device=device)
        self._of_stream: dict[int, Tensor] = {}

    def of_stream(self, stream: int, num_reqs: int) -> Tensor:
        """Counters of a stream's eager launches."""
        if stream not in self._of_stream or len(self._of_stream[stream]) < num_reqs:
            # Cleared on the stream itself, before its first launch.
            self._of_stream[stream] = self._free.new_zeros(next_power_of_2(num_reqs))
        return self._of_stream[stream]

    def of_graph(self, num_reqs: int) -> Tensor:
        """Counters of a captured launch, which are its own for as long as the graph may live."""
        taken, self._free = self._free[:num_reqs], self._free[num_reqs:]
        return taken


_counters_of: dict[torch.device, _Counters] = {}


def _counters(device: torch.device, num_reqs: int) -> Tensor:
    """Counters for one launch on the current stream, int32 [num_reqs] at least, 0."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        held = _counters_of.get(device)
        if held is not None and len(taken := held.of_graph(num_reqs)) == num_reqs:
            return taken
        # Part of the graph, which clears them itself in every replay.
        return torch.zeros(num_reqs, dtype=torch.int32, device=device)
    if device not in _counters_of:
        _counters_of[device] = _Counters(device)
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _counters_of[device].of_stream(stream, num_reqs)
