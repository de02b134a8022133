"""The commit rule of the published loop, row by row."""

import math

import torch
from torch import Tensor


def pick_tokens_reference(logits: Tensor, mask_token_id: int) -> tuple[Tensor, Tensor]:
    """What `pick_tokens` computes without noise. Same arguments and results."""
    logits = logits.clone()
    logits[:, mask_token_id] = -torch.inf
    return torch.softmax(logits, dim=-1).max(dim=-1)[::-1]


def choose_commits_reference(
    confidence: Tensor, masked: Tensor, confidence_threshold: float, remaining_steps: int
) -> Tensor:
    """What `choose_commits` computes. Same arguments and result."""
    commits = torch.zeros_like(masked)
    for row in range(masked.shape[0]):
        positions = masked[row].nonzero().flatten().tolist()
        above = sum(confidence[row, p].item() > confidence_threshold for p in positions)
        quota = min(len(positions), max(1, above, math.ceil(len(positions) / remaining_steps)))
        # Equal confidences: the later position is committed first, as the published sort does.
        ranked = sorted(positions, key=lambda p: (confidence[row, p].item(), p), reverse=True)
        commits[row, ranked[:quota]] = True
    return commits
