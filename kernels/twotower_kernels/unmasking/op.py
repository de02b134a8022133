"""Picks and commits of one denoising step, all rows at once."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.backend import use_triton
from twotower_kernels.unmasking.types import PickNoise, Unmasked


def unmask(
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
    """Picks a token at every masked position and commits the confident ones; the others stay masked.

    Of the m masked positions of a row the n most confident are committed,
    `n = min(m, max(1, #{confidence > threshold}, ceil(m / remaining_steps)))`; of equal confidences the later position
    goes first. Confidence is the pick's softmax probability at temperature 1; one that is NaN ranks as 0.

    On CUDA this is one launch that reads each logit once, without a copy of them and without synchronisation, also for
    CUDA graphs (capture after a first call, or the graph clears a few counters itself); filtered scores need a launch
    more.

    Args:
        logits: bfloat16, float16 or float32 (on CPU also float64) [num_positions, vocab], any row stride. The same
            afterwards; on CPU the mask token's are put aside for a moment.
        positions: int64 [num_positions], flat indices `row * block_size + offset` of the logits: of all masked
            positions, each once, in any order. None where logits has a row for every position of the blocks, of which
            those that are not masked are skipped.
        token_ids: int64 [num_reqs, block_size]. Not modified.
        masked: bool [num_reqs, block_size]; rows without masked positions stay as they are.
        confidence: float32 (float64 for float64 logits) [num_reqs, block_size] of earlier steps' commits. Not modified.
        mask_token_id: never picked, and not part of the softmax.
        confidence_threshold: strict bound; or float32 [num_reqs].
        remaining_steps: denoising steps left, this one included, at least 1, which commits everything; or int32
            [num_reqs].
        num_token_ids: ids from this one on are treated as the mask token; None for the whole vocabulary.
        noise: of sampled picks; None for the most probable token, the first of equal ones.

    Raises:
        ValueError: shapes do not fit, or on CUDA the vocabulary is strided.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """
    num_positions = masked.numel() if positions is None else len(positions)
    if len(logits) != num_positions or not token_ids.shape == masked.shape == confidence.shape:
        raise ValueError(
            f"logits has {len(logits)} rows for {num_positions} positions, of blocks {tuple(token_ids.shape)}, masked "
            f"{tuple(masked.shape)}, confidence {tuple(confidence.shape)}; give a row per position, and the same shapes"
        )
    if use_triton(logits) and logits.dtype != torch.float64:
        from twotower_kernels.unmasking.kernel import launch_unmask

        return launch_unmask(
            logits,
            positions,
            token_ids,
            masked,
            confidence,
            mask_token_id,
            confidence_threshold,
            remaining_steps,
            num_token_ids,
            noise,
        )
    at = torch.arange(masked.numel(), device=masked.device) if positions is None else positions
    picks, probability = _picks(logits, at, masked.shape[1], mask_token_id, num_token_ids, noise)
    seen = confidence.flatten().index_copy(0, at, probability.to(confidence.dtype)).view_as(confidence)
    # A row without confidence still commits as many positions as the schedule says.
    commits = choose_commits(seen.nan_to_num(nan=0.0), masked, confidence_threshold, remaining_steps)
    picked = token_ids.flatten().index_copy(0, at, picks).view_as(token_ids)
    return Unmasked(torch.where(commits, picked, token_ids), torch.where(commits, seen, confidence), commits)


def pick_tokens(
    logits: Tensor, mask_token_id: int, num_token_ids: int | None = None, noise: PickNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Picks the token that each position would take, with its probability.

    Args:
        logits: float [num_positions, vocab], as `unmask`.
        mask_token_id, num_token_ids: as `unmask`.
        noise: as `unmask`, with one block per position.

    Returns:
        Picks int64 [num_positions] and confidences [num_positions], float32 at least: softmax of `logits` without the
        mask token.
    """
    if use_triton(logits) and logits.dtype != torch.float64:
        from twotower_kernels.unmasking.kernel import launch_pick_tokens

        return launch_pick_tokens(logits, mask_token_id, num_token_ids, noise)
    return _picks(logits, torch.arange(len(logits), device=logits.device), 1, mask_token_id, num_token_ids, noise)


def _picks(
    logits: Tensor,
    positions: Tensor,
    block_size: int,
    mask_token_id: int,
    num_token_ids: int | None,
    noise: PickNoise | None,
) -> tuple[Tensor, Tensor]:
    """Picks and their probabilities, vectorised."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    logits = (logits if num_token_ids is None else logits[:, :num_token_ids]).to(wide)
    column = logits[:, mask_token_id : mask_token_id + 1]
    # Only the mask token's column is saved and restored: a copy of all logits would cost more.
    put_aside = column.clone()
    column.fill_(-torch.inf)
    if noise is None:
        picks = logits.argmax(dim=-1)
    else:
        # Multiplied by the inverse, as the kernel does it: a quotient would be rounded differently.
        scale = 1.0 / torch.tensor(noise.temperature, dtype=wide)
        scores = logits * scale if noise.scores is None else noise.scores
        picks = noise.picks(scores, positions, block_size)
    probability = torch.softmax(logits, dim=-1).gather(-1, picks[:, None])[:, 0]
    column.copy_(put_aside)
    return picks, probability


def choose_commits(
    confidence: Tensor, masked: Tensor, confidence_threshold: float | Tensor, remaining_steps: int | Tensor
) -> Tensor:
    """Chooses the masked positions that are committed in this step; see `unmask` for how many.

    Args:
        confidence: float [num_reqs, block_size]; read at masked positions only.
        masked: bool [num_reqs, block_size].
        confidence_threshold: strict bound; or float [num_reqs].
        remaining_steps: denoising steps left, this one included; 1 commits everything; or int [num_reqs].

    Returns:
        bool [num_reqs, block_size], a subset of `masked`.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """
    if isinstance(confidence_threshold, Tensor):
        confidence_threshold = confidence_threshold[:, None]
    num_masked = masked.sum(-1)
    above = ((confidence > confidence_threshold) & masked).sum(-1)
    floor = (num_masked + (remaining_steps - 1)) // remaining_steps
    quota = torch.maximum(above, floor).clamp(min=1)
    rank = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, stable=True).argsort(dim=-1)
    return masked & (rank >= masked.shape[1] - quota[:, None])
