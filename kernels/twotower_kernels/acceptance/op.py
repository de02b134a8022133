"""Verification of drafts for a ragged batch, every request with its own sampling parameters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from twotower_kernels.noise import gumbel_noise, uniform_noise

Rule = Literal["one-hot", "coupled"]

# Draws of the noise: a target's own sample (coupled rule); under the one-hot rule whether a draft is accepted, and the
# token after the accepted ones.
SAMPLE_DRAW = 0
ACCEPT_DRAW = 1 << 16
NEXT_TOKEN_DRAW = ACCEPT_DRAW + 1

PLACEHOLDER = -1

# Logits that are sampled from at once: about 1 GiB of working memory.
MOST_LOGITS = 1 << 25


@dataclass(frozen=True)
class Sampling:
    """How every request samples.

    Attributes:
        temperature: float32 [num_reqs], 0 for the most probable token; None if that holds for all of them.
        top_k: int32 [num_reqs], below 1 or at least the vocabulary for all tokens; None if that holds for all requests.
        top_p: float32 [num_reqs], 1 for all tokens; None likewise.
        min_p: float32 [num_reqs], 0 for all tokens; None likewise.
        seeds: int64 [num_reqs], of the noise.
        positions: int64 [num_reqs], index of the first draft in its sequence.
    """

    temperature: Tensor | None
    top_k: Tensor | None
    top_p: Tensor | None
    min_p: Tensor | None
    seeds: Tensor
    positions: Tensor

    def of(self, requests: slice) -> Sampling:
        """The same for some of the requests."""

        def some(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[requests]

        filters = some(self.temperature), some(self.top_k), some(self.top_p), some(self.min_p)
        return Sampling(*filters, self.seeds[requests], self.positions[requests])


@dataclass(frozen=True)
class Accepted:
    """Outcome of a verification.

    Attributes:
        token_ids: int32 [num_reqs, most drafts + 1]: accepted drafts, the token after them, then -1.
        num_accepted: int32 [num_reqs].
    """

    token_ids: Tensor
    num_accepted: Tensor


def accept(
    logits: Tensor, draft_token_ids: Tensor, num_draft_tokens: Sequence[int], sampling: Sampling, rule: Rule = "one-hot"
) -> Accepted:
    """Accepts drafts from the left, and takes the token after them.

    Requests of temperature 0 accept while a draft is the target's most probable token. The others follow the rule, and
    their text is distributed as the target's whatever was drafted without a look at the noise:

    * one-hot: a draft is accepted with the target's probability of it; after a rejection another token is drawn, as the
      target would.
    * coupled: the target's sample is fixed by (seed, position) before any draft is looked at; drafts are accepted while
      they agree with it. The text is the same for any drafts, and without.

    Args:
        logits: float [num_draft_tokens + num_reqs, vocab] of the target, rows of a request together: one per draft and
            one after all of them. Not modified.
        draft_token_ids: integer [num_draft_tokens], of all requests one after the other.
        num_draft_tokens: per request, 0 allowed.
        sampling: parameters per request; a token is excluded by min-p, then top-k, then top-p.
        rule: for requests above temperature 0.
    """
    most_drafts = max(num_draft_tokens, default=0)
    parts, row, draft = [], 0, 0
    for requests in _parts(num_draft_tokens, logits.shape[-1], sampling):
        counts = num_draft_tokens[requests]
        rows, drafts = slice(row, row + sum(counts) + len(counts)), slice(draft, draft + sum(counts))
        part = sampling.of(requests)
        parts.append(_accept(logits[rows], draft_token_ids[drafts], counts, most_drafts, part, rule))
        row, draft = rows.stop, drafts.stop
    if len(parts) == 1:
        return parts[0]
    return Accepted(torch.cat([part.token_ids for part in parts]), torch.cat([part.num_accepted for part in parts]))


def _parts(num_draft_tokens: Sequence[int], vocab_size: int, sampling: Sampling) -> list[slice]:
    """Requests that are taken together: sorting and noise need many times the memory of the logits."""
    if sampling.temperature is None:
        return [slice(0, len(num_draft_tokens))]
    parts, start, num_rows = [], 0, 0
    for request, count in enumerate(num_draft_tokens):
        if num_rows and (num_rows + count + 1) * vocab_size > MOST_LOGITS:
            parts.append(slice(start, request))
            start, num_rows = request, 0
        num_rows += count + 1
    return [*parts, slice(start, len(num_draft_tokens))]


def _accept(
    logits: Tensor,
    draft_token_ids: Tensor,
    num_draft_tokens: Sequence[int],
    most_drafts: int,
    sampling: Sampling,
    rule: Rule,
) -> Accepted:
    """`accept` for all requests at once, into rows for `most_drafts` drafts."""
    device = logits.device
    counts = torch.tensor(num_draft_tokens, dtype=torch.int64, device=device)
    layout = _Layout.of(counts, most_drafts)
    drafts = torch.full((len(logits),), PLACEHOLDER, dtype=torch.int64, device=device)
    drafts[layout.is_draft_row] = draft_token_ids.to(torch.int64)
    picks = logits.argmax(dim=-1)
    accepted = picks == drafts
    sampled = None if sampling.temperature is None else (sampling.temperature > 0)[layout.request]
    if sampled is not None and bool(sampled.any()):
        rows = sampled.nonzero()[:, 0]
        scores = _scores(logits[rows], layout.request[rows], sampling)
        seeds, positions = sampling.seeds[layout.request[rows]], layout.positions(sampling.positions)[rows]
        if rule == "coupled":
            picks[rows] = (scores + gumbel_noise(seeds, positions, SAMPLE_DRAW, scores.shape[-1])).argmax(dim=-1)
            accepted[rows] = picks[rows] == drafts[rows]
        else:
            chance = uniform_noise(seeds, positions, ACCEPT_DRAW, 1)[:, 0]
            accepted[rows] = chance < _probability(scores, drafts[rows])
    num_accepted = layout.leading(accepted & layout.is_draft_row)
    if sampled is not None and rule == "one-hot":
        last = layout.starts + num_accepted
        at = last[sampled[last]]  # rows of the requests that sample their next token
        if len(at):
            request = layout.request[at]
            scores = _scores(logits[at], request, sampling)
            # Where the draft of this row was rejected, another token is taken; the row after all drafts has none.
            refused = drafts[at]
            hit = (torch.arange(scores.shape[-1], device=device) == refused[:, None]) & (refused >= 0)[:, None]
            noise = gumbel_noise(
                sampling.seeds[request], layout.positions(sampling.positions)[at], NEXT_TOKEN_DRAW, scores.shape[-1]
            )
            picks[at] = (scores.masked_fill(hit, -torch.inf) + noise).argmax(dim=-1)
    return layout.output(drafts, picks, num_accepted)


@dataclass(frozen=True)
class _Layout:
    """Where the rows of every request are.

    Attributes:
        starts: int64 [num_reqs], first row of every request.
        request: int64 [num_rows], whose row it is.
        offset: int64 [num_rows], which of its rows.
        is_draft_row: bool [num_rows], whether the row judges a draft.
        most_drafts: of any request.
    """

    starts: Tensor
    request: Tensor
    offset: Tensor
    is_draft_row: Tensor
    most_drafts: int

    @classmethod
    def of(cls, counts: Tensor, most_drafts: int) -> _Layout:
        widths = counts + 1
        starts = widths.cumsum(0) - widths
        request = torch.arange(len(counts), device=counts.device).repeat_interleave(widths)
        offset = torch.arange(len(request), device=counts.device) - starts[request]
        return cls(starts, request, offset, offset < counts[request], most_drafts)

    def positions(self, first: Tensor) -> Tensor:
        """Index in its sequence of the token that every row decides on."""
        return first[self.request] + self.offset

    def leading(self, accepted: Tensor) -> Tensor:
        """Accepted rows from the left, int64 [num_reqs]."""
        table = torch.zeros(len(self.starts), self.most_drafts + 1, dtype=torch.int64, device=accepted.device)
        table[self.request, self.offset] = accepted.to(torch.int64)
        return table.cumprod(dim=1).sum(dim=1)

    def output(self, drafts: Tensor, picks: Tensor, num_accepted: Tensor) -> Accepted:
        shape = (len(self.starts), self.most_drafts + 1)
        token_ids = torch.full(shape, PLACEHOLDER, dtype=torch.int32, device=drafts.device)
        limit = num_accepted[self.request]
        tokens = torch.where(self.offset < limit, drafts, picks)
        token_ids[self.request, self.offset] = torch.where(self.offset <= limit, tokens, PLACEHOLDER).to(torch.int32)
        return Accepted(token_ids, num_accepted.to(torch.int32))


def filtered_logits(logits: Tensor, num_draft_tokens: Sequence[int], sampling: Sampling) -> Tensor:
    """What `accept` samples from: logits over the temperature, excluded tokens -inf, float32, as a copy.

    Args:
        logits, num_draft_tokens, sampling: as `accept`; of requests of temperature 0 the temperature is left alone.
    """
    counts = torch.tensor(num_draft_tokens, dtype=torch.int64, device=logits.device)
    return _scores(logits, _Layout.of(counts, 0).request, sampling)


def _scores(logits: Tensor, request: Tensor, sampling: Sampling) -> Tensor:
    """Rows of the given requests over their temperature, float32, excluded tokens -inf; a copy."""
    scores = logits.float()
    if sampling.temperature is not None:
        temperature = sampling.temperature[request, None]
        scores = scores / torch.where(temperature > 0, temperature, 1.0)
    if sampling.min_p is not None:
        bound = scores.amax(dim=-1, keepdim=True) + sampling.min_p[request, None].log()
        scores = scores.masked_fill(scores < bound, -torch.inf)
    if sampling.top_k is None and sampling.top_p is None:
        return scores
    ordered, order = scores.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    out = torch.zeros_like(ordered, dtype=torch.bool)
    if sampling.top_k is not None:
        k = sampling.top_k[request, None].long()
        k = torch.where(k < 1, scores.shape[-1], k).clamp(max=scores.shape[-1])
        kth = ordered.gather(1, k - 1)
        out = ordered < kth  # tokens as probable as the k-th stay
        ordered = ordered.masked_fill(out, -torch.inf)
    if sampling.top_p is not None:
        probs = torch.softmax(ordered, dim=-1)
        before = probs.cumsum(dim=-1) - probs
        p = sampling.top_p[request, None]
        out = out | ((before >= p) & (rank > 0) & (p < 1))
    return scores.masked_fill(torch.zeros_like(out).scatter_(1, order, out), -torch.inf)


def _probability(scores: Tensor, tokens: Tensor) -> Tensor:
    """Softmax of every row at one token, 0 for a token outside the vocabulary."""
    outside = (tokens < 0) | (tokens >= scores.shape[-1])
    taken = scores.gather(1, tokens.masked_fill(outside, 0)[:, None])[:, 0]
    return (taken - scores.logsumexp(dim=-1)).exp().masked_fill(outside, 0.0)
