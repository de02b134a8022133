"""Verification of drafts, one request and one row at a time."""

import torch
from torch import Tensor

from twotower_kernels.acceptance.types import ACCEPT_DRAW, NEXT_TOKEN_DRAW, SAMPLE_DRAW, AcceptanceRule, SamplingTensors
from twotower_kernels.noise import gumbel_noise, uniform_noise


def accept_reference(
    logits: Tensor,
    draft_token_ids: Tensor,
    cu_num_draft_tokens: Tensor,
    max_num_draft_tokens: int,
    sampling: SamplingTensors,
    acceptance_rule: AcceptanceRule = "one-hot",
) -> list[list[int]]:
    """Accepted drafts and the token after them, per request; arguments as `accept`."""
    results, row, start = [], 0, 0
    for request, end in enumerate(cu_num_draft_tokens.tolist()):
        drafts = draft_token_ids[start:end].tolist()
        assert len(drafts) <= max_num_draft_tokens
        tokens: list[int] = []
        for offset, draft in enumerate([*drafts, None]):
            position = int(sampling.positions[request]) + offset
            token, goes_on = _decide(logits[row + offset], draft, request, position, sampling, acceptance_rule)
            tokens.append(token)
            if not goes_on:
                break
        results.append(tokens)
        row, start = row + len(drafts) + 1, end
    return results


def _decide(
    logits: Tensor,
    draft: int | None,
    request: int,
    position: int,
    sampling: SamplingTensors,
    acceptance_rule: AcceptanceRule,
) -> tuple[int, bool]:
    """The token at one position, and whether it is an accepted draft."""
    temperature = 0.0 if sampling.temperature is None else float(sampling.temperature[request])
    if temperature == 0:
        token = int(logits.argmax())
        return token, token == draft
    scores = filtered_logits_reference(logits, request, sampling)
    seed, at = sampling.seeds[request : request + 1], torch.tensor([position])
    if acceptance_rule == "coupled":
        token = int((scores + gumbel_noise(seed, at, SAMPLE_DRAW, len(scores))[0]).argmax())
        return token, token == draft
    if draft is not None and 0 <= draft < len(scores):
        if float(uniform_noise(seed, at, ACCEPT_DRAW, 1)) < float(torch.softmax(scores, dim=0)[draft]):
            return draft, True
        scores[draft] = -torch.inf
    return int((scores + gumbel_noise(seed, at, NEXT_TOKEN_DRAW, len(scores))[0]).argmax()), False


def filtered_logits_reference(logits: Tensor, request: int, sampling: SamplingTensors) -> Tensor:
    """One row [vocab] of `filtered_logits`."""
    scores = (
        logits.float() * (1.0 / sampling.temperature[request]) if sampling.temperature is not None else logits.float()
    )
    if sampling.min_p is not None and sampling.min_p[request] > 0:
        scores = scores.masked_fill(scores < scores.max() + sampling.min_p[request].log(), -torch.inf)
    if sampling.top_k is not None and 0 < (k := int(sampling.top_k[request])) < len(scores):
        scores = scores.masked_fill(scores < scores.sort(descending=True).values[k - 1], -torch.inf)
    if sampling.top_p is not None and (p := float(sampling.top_p[request])) < 1:
        probs = torch.softmax(scores.double(), dim=0)
        more_probable = torch.stack([probs[scores > score].sum() for score in scores])
        scores = scores.masked_fill(more_probable >= p, -torch.inf)
    return scores
