"""One denoising step, position by position and row by row."""

import math

import torch
from torch import Tensor

from twotower_kernels.noise import gumbel_noise
from twotower_kernels.unmasking.types import PickNoise, Unmasked


def unmask_reference(
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
    """Computes what `unmask` does. Same arguments and results."""
    block_size = masked.shape[1]
    at = range(masked.numel()) if positions is None else positions.tolist()
    picked, seen = token_ids.clone(), confidence.clone()
    for number, position in enumerate(at):
        row, offset = divmod(position, block_size)
        if not masked[row, offset]:
            continue
        of_position = None
        if noise is not None:
            where = noise.first_positions[row : row + 1] + offset
            scores = None if noise.scores is None else noise.scores[number : number + 1]
            of_position = PickNoise(noise.temperature, noise.seeds[row : row + 1], where, noise.draw, scores)
        picks, probability = pick_tokens_reference(
            logits[number : number + 1], mask_token_id, num_token_ids, of_position
        )
        picked[row, offset], seen[row, offset] = picks[0], probability[0]
    commits = choose_commits_reference(seen.nan_to_num(nan=0.0), masked, confidence_threshold, remaining_steps)
    return Unmasked(torch.where(commits, picked, token_ids), torch.where(commits, seen, confidence), commits)


def pick_tokens_reference(
    logits: Tensor, mask_token_id: int, num_token_ids: int | None = None, noise: PickNoise | None = None
) -> tuple[Tensor, Tensor]:
    """Computes what `pick_tokens` does. Same arguments and results."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32), copy=True)
    logits[:, mask_token_id] = -torch.inf
    logits[:, num_token_ids or logits.shape[1] :] = -torch.inf
    if noise is None:
        picks = logits.argmax(dim=-1)
    else:
        scores = logits * (1.0 / torch.tensor(noise.temperature)) if noise.scores is None else noise.scores
        gumbel = gumbel_noise(noise.seeds, noise.first_positions, noise.draw, logits.shape[1])
        picks = (scores + gumbel).argmax(dim=-1)
    return picks, torch.softmax(logits, dim=-1).gather(-1, picks[:, None])[:, 0]


def choose_commits_reference(
    confidence: Tensor, masked: Tensor, confidence_threshold: float | Tensor, remaining_steps: int | Tensor
) -> Tensor:
    """Computes what `choose_commits` does. Same arguments and result."""
    num_reqs = len(masked)
    thresholds = torch.as_tensor(confidence_threshold).expand(num_reqs).tolist()
    steps = torch.as_tensor(remaining_steps).expand(num_reqs).tolist()
    commits = torch.zeros_like(masked)
    for row in range(num_reqs):
        positions = masked[row].nonzero().flatten().tolist()
        above = sum(confidence[row, p].item() > thresholds[row] for p in positions)
        quota = min(len(positions), max(1, above, math.ceil(len(positions) / steps[row])))
        # Equal confidences: the later position is committed first, as the published sort does.
        ranked = sorted(positions, key=lambda p: (confidence[row, p].item(), p), reverse=True)
        commits[row, ranked[:quota]] = True
    return commits
