"""Picks and commits of one denoising step, all rows at once."""

import torch
from torch import Tensor


def pick_tokens(logits: Tensor, mask_token_id: int, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The token each position would take, and how probable it is.

    Args:
        logits: float [num_positions, vocab]; the entry of the mask token is overwritten with -inf.
        mask_token_id: never picked.
        scores: float [num_positions, vocab] whose argmax is the pick (noisy logits when sampling), or None for the
            logits themselves. The confidence always comes from `logits`.

    Returns:
        Picks int64 [num_positions] and confidences [num_positions]: softmax of `logits` without the mask token.
    """
    logits[:, mask_token_id] = -torch.inf
    if scores is None:
        best, picks = logits.max(dim=-1)
    else:
        scores[:, mask_token_id] = -torch.inf
        picks = scores.argmax(dim=-1)
        best = logits.gather(-1, picks[:, None])[:, 0]
    return picks, torch.exp(best - torch.logsumexp(logits, dim=-1))


def choose_commits(confidence: Tensor, masked: Tensor, confidence_threshold: float, remaining_steps: int) -> Tensor:
    """Which masked positions are fixed in this step.

    Of the m masked positions of a row the n most confident are committed,
    `n = min(m, max(1, #{confidence > threshold}, ceil(m / remaining_steps)))`.

    Args:
        confidence: float [num_reqs, block_size]; read at masked positions only.
        masked: bool [num_reqs, block_size].
        confidence_threshold: strict bound.
        remaining_steps: denoising steps left, this one included; 1 commits everything.

    Returns:
        bool [num_reqs, block_size], a subset of `masked`. Of equal confidences the later position goes first.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """
    num_masked = masked.sum(-1)
    above = ((confidence > confidence_threshold) & masked).sum(-1)
    floor = (num_masked + remaining_steps - 1) // remaining_steps
    quota = torch.minimum(num_masked, torch.maximum(above, floor).clamp(min=1))
    order = confidence.masked_fill(~masked, -torch.inf).argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(masked.shape[1], device=masked.device).expand_as(order)
    )
    return masked & (rank >= masked.shape[1] - quota[:, None])
