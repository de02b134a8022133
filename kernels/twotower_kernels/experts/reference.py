"""Routing and experts, one token and one expert at a time."""

import torch
from torch import Tensor

from twotower_kernels.experts.quantisation import dequantise
from twotower_kernels.experts.types import ExpertChoice, ExpertScales, SharedExpert


def route_tokens_reference(x: Tensor, router: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Computes what `route_tokens` does. Same arguments and results."""
    scores = 1 / (1 + torch.exp(-(x.double() @ router.double().T)))
    return route_reference(scores, bias.double(), choice)


def route_reference(scores: Tensor, bias: Tensor, choice: ExpertChoice) -> tuple[Tensor, Tensor]:
    """Computes what `route` does, token by token. Same arguments and results.

    Of equal corrected scores the lower id goes first: a stable sort keeps their order.
    """
    ids, weights = [], []
    for token_scores in scores:
        corrected = token_scores + bias
        if choice.num_groups > 1:
            groups = corrected.view(choice.num_groups, -1)
            group_scores = groups.topk(2, dim=-1).values.sum(-1)
            kept = set(group_scores.sort(descending=True, stable=True).indices[: choice.top_groups].tolist())
            corrected = torch.stack([g if i in kept else torch.zeros_like(g) for i, g in enumerate(groups)]).flatten()
        chosen = corrected.sort(descending=True, stable=True).indices[: choice.top_k]
        weight = token_scores[chosen]
        if choice.normalise:
            weight = weight / (weight.sum() + 1e-20)
        ids.append(chosen)
        weights.append(weight * choice.scale)
    return torch.stack(ids), torch.stack(weights)


def grouped_experts_reference(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    expert_ids: Tensor,
    expert_weights: Tensor,
    shared: SharedExpert | None = None,
    scales: ExpertScales | None = None,
) -> Tensor:
    """Computes what `grouped_experts` does, token by token. Same arguments and result."""
    if scales is not None:
        up, down = dequantise(up, scales.up, x.dtype), dequantise(down, scales.down, x.dtype)
    output = expert_weights.new_zeros(x.shape)
    for token, (ids, weights) in enumerate(zip(expert_ids.tolist(), expert_weights, strict=True)):
        for expert, weight in zip(ids, weights, strict=True):
            hidden = torch.relu(up[expert] @ x[token]).square()
            output[token] += weight * (down[expert] @ hidden).to(weight.dtype)
    routed = output.to(x.dtype)
    return routed if shared is None else routed + torch.relu(x @ shared.up.T).square() @ shared.down.T
