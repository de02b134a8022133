"""Routing and experts over all tokens at once; experts that nobody chose are not touched."""

import torch
from torch import Tensor

from twotower_kernels.linear import linear

# With more experts than this per choice of a token, computing all of them costs more than it saves.
MOST_EXPERTS_PER_CHOICE = 2
# Up to this many tokens a CPU reads weights for longer than it multiplies with them.
MOST_TOKENS_BY_ALL_EXPERTS = 8


def route(
    scores: Tensor, bias: Tensor, top_k: int, num_groups: int, top_groups: int, normalise: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Chooses experts by corrected scores and weighs them by uncorrected ones.

    Args:
        scores: [num_tokens, num_experts], sigmoid of the router logits, float64 (or float32).
        bias: [num_experts], score correction; it takes part in the choice only.
        top_k: experts per token.
        num_groups, top_groups: with more than one group, only the `top_groups` groups with the largest sum of their
            two best corrected scores stay eligible; the others' corrected scores become 0.
        normalise: divide the weights of a token by their sum.
        scale: factor on all weights.

    Returns:
        Expert ids int64 [num_tokens, top_k] and their weights in the dtype of `scores`.

    Source: DeepSeek-V3 (2024), section 2.1.2; modeling_nemotron_h.py, NemotronHTopkRouter.
    """
    choice = scores + bias
    if num_groups > 1:
        grouped = choice.unflatten(-1, (num_groups, -1))
        best = grouped.topk(2, dim=-1).values.sum(-1).topk(top_groups, dim=-1).indices
        kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter_(-1, best, True)
        choice = grouped.masked_fill(~kept[..., None], 0.0).flatten(-2)
    expert_ids = choice.topk(top_k, dim=-1, sorted=False).indices
    weights = scores.gather(-1, expert_ids)
    if normalise:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return expert_ids, weights * scale


def grouped_experts(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """Weighted sum of `down(relu(up(x))^2)` over the experts each token chose.

    Args:
        x: [num_tokens, hidden].
        up: [num_experts, width, hidden]; any strides.
        down: [num_experts, hidden, width]; any strides.
        expert_ids: int64 [num_tokens, top_k], distinct within a token.
        expert_weights: [num_tokens, top_k]; the sum over experts runs in this dtype (float64 as published).

    Returns:
        [num_tokens, hidden] in the dtype of `x`.
    """
    num_tokens, top_k = expert_ids.shape
    if torch.is_autocast_enabled(x.device.type) and up.shape[0] <= MOST_EXPERTS_PER_CHOICE * top_k:
        return _one_wide_mlp(x, up, down, expert_ids, expert_weights)
    if num_tokens == 1:
        outputs = _one_token(x, up, down, expert_ids[0].tolist())
        return torch.mm(expert_weights, outputs.to(expert_weights.dtype)).to(x.dtype)
    few = x.device.type == "cpu" and num_tokens <= MOST_TOKENS_BY_ALL_EXPERTS
    if few and up.shape[0] <= MOST_EXPERTS_PER_CHOICE * top_k:
        return _few_tokens(x, up, down, expert_ids, expert_weights)
    # Rows of one expert stand together.
    ordered_ids, order = expert_ids.flatten().sort()
    rows, counts = x[order // top_k], ordered_ids.bincount(minlength=up.shape[0])
    host_counts = counts.tolist()
    visited = sum(count > 0 for count in host_counts)
    if x.dtype == torch.bfloat16 and x.device.type == "cpu" and 4 * visited >= 3 * len(host_counts):
        outputs = _all_experts(rows, up, down, ordered_ids, counts, max(host_counts))
    else:
        outputs = _visited_experts(rows, up, down, host_counts)
    per_token = outputs[order.argsort()].view(num_tokens, top_k, -1).to(expert_weights.dtype)
    return torch.bmm(expert_weights[:, None, :], per_token)[:, 0].to(x.dtype)


def _one_wide_mlp(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """All experts for all tokens, those not chosen with weight 0: for training, where few experts are all visited.

    Its products have the same shapes at every step; for every new number of rows oneDNN generates code anew. A step
    of a small context tower (2048 tokens, 4 experts, top 2, one thread) is 1.25 times as fast so.
    """
    spread = x.new_zeros(x.shape[0], up.shape[0]).scatter(1, expert_ids, expert_weights.to(x.dtype))
    hidden = linear(x, up.flatten(0, 1)).relu().square()
    weighted = hidden.unflatten(1, up.shape[:2]) * spread[:, :, None]
    return linear(weighted.flatten(1), down.transpose(0, 1).flatten(1)).to(x.dtype)


def _few_tokens(x: Tensor, up: Tensor, down: Tensor, expert_ids: Tensor, expert_weights: Tensor) -> Tensor:
    """All experts for all tokens, those not chosen with weight 0: hardly an expert would stay unread."""
    spread = expert_weights.new_zeros(x.shape[0], up.shape[0]).scatter_(1, expert_ids, expert_weights)
    hidden = torch.matmul(x, up.transpose(1, 2)).relu().square()  # [experts, tokens, width]
    outputs = torch.bmm(hidden, down.transpose(1, 2)).to(spread.dtype)
    return torch.bmm(spread[:, None], outputs.transpose(0, 1))[:, 0].to(x.dtype)


def _one_token(x: Tensor, up: Tensor, down: Tensor, chosen: list[int]) -> Tensor:
    """Outputs [top_k, hidden] of the chosen experts for x [1, hidden]."""
    hidden = torch.cat([linear(x, up[expert]) for expert in chosen]).relu().square()
    return torch.cat([linear(hidden[i : i + 1], down[expert]) for i, expert in enumerate(chosen)])


def _visited_experts(rows: Tensor, up: Tensor, down: Tensor, counts: list[int]) -> Tensor:
    """Outputs of rows ordered by expert; a loop over the experts that were chosen."""
    visited = [expert for expert, count in enumerate(counts) if count]
    sizes = [counts[expert] for expert in visited]
    hidden = (
        torch.cat([linear(part, up[e]) for e, part in zip(visited, rows.split(sizes), strict=True)]).relu().square()
    )
    return torch.cat([linear(part, down[e]) for e, part in zip(visited, hidden.split(sizes), strict=True)])


def _all_experts(rows: Tensor, up: Tensor, down: Tensor, ordered_ids: Tensor, counts: Tensor, longest: int) -> Tensor:
    """The same as one batched product over all experts, rows padded to the longest.

    bfloat16 on a CPU spends more time on entering oneDNN than on the few rows of an expert: one call for 16 experts
    takes half the time of 16 calls.
    """
    place = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[ordered_ids]
    padded = rows.new_zeros(up.shape[0], longest, rows.shape[1])
    padded[ordered_ids, place] = rows
    hidden = torch.bmm(up, padded.transpose(1, 2)).relu().square()
    return torch.bmm(down, hidden).transpose(1, 2)[ordered_ids, place]
