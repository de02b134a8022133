"""Verification of drafts, one request and one row at a time."""

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_kernels.acceptance.op import ACCEPT_DRAW, NEXT_TOKEN_DRAW, SAMPLE_DRAW, Rule, Sampling
from twotower_kernels.noise import gumbel_noise, uniform_noise


def accept_reference(
    logits: Tensor, draft_token_ids: Tensor, num_draft_tokens: Sequence[int], sampling: Sampling, rule: Rule = "one-hot"
) -> list[list[int]]:
    """Accepted drafts and the token after them, per request; arguments as `accept`."""
    results, row, start = [], 0, 0
    for request, count in enumerate(num_draft_tokens):
        drafts = draft_token_ids[start : start + count].tolist()
        tokens: list[int] = []
        for offset in range(count + 1):
            draft = drafts[offset] if offset < count else None
            position = int(sampling.positions[request]) + offset
            token, goes_on = _decide(logits[row + offset], draft, request, position, sampling, rule)
            tokens.append(token)
            if not goes_on:
                break
        results.append(tokens)
        row, start = row + count + 1, start + count
    return results


def _decide(
    logits: Tensor, draft: int | None, request: int, position: int, sampling: Sampling, rule: Rule
) -> tuple[int, bool]:
    """The token at one position, and whether it is an accepted draft."""
    temperature = 0.0 if sampling.temperature is None else float(sampling.temperature[request])
    if temperature == 0:
        token = int(logits.argmax())
        return token, token == draft
    scores = _filtered(logits.float() / temperature, request, sampling)
    seed, at = sampling.seeds[request : request + 1], torch.tensor([position])
    if rule == "coupled":
        token = int((scores + gumbel_noise(seed, at, SAMPLE_DRAW, len(scores))[0]).argmax())
        return token, token == draft
    if draft is not None:
        if float(uniform_noise(seed, at, ACCEPT_DRAW, 1)) < float(torch.softmax(scores, dim=0)[draft]):
            return draft, True
        scores[draft] = -torch.inf
    return int((scores + gumbel_noise(seed, at, NEXT_TOKEN_DRAW, len(scores))[0]).argmax()), False


def _filtered(scores: Tensor, request: int, sampling: Sampling) -> Tensor:
    """Excludes tokens by min-p, then top-k, then top-p."""
    if sampling.min_p is not None:
        scores[scores < scores.max() + sampling.min_p[request].log()] = -torch.inf
    if sampling.top_k is not None and 0 < (k := int(sampling.top_k[request])) < len(scores):
        scores[scores < scores.sort(descending=True).values[k - 1]] = -torch.inf
    if sampling.top_p is not None and (p := float(sampling.top_p[request])) < 1:
        order = scores.sort(descending=True, stable=True).indices.tolist()
        probs = torch.softmax(scores, dim=0)
        ordered = probs[order]
        before = ordered.cumsum(0) - ordered
        for rank, token in enumerate(order):
            if rank > 0 and float(before[rank]) >= p:
                scores[token] = -torch.inf
    return scores
