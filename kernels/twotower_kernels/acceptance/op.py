"""Verification of drafts for a ragged batch, every request with its own sampling parameters."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor

from twotower_kernels.acceptance.types import (
    ACCEPT_DRAW,
    NEXT_TOKEN_DRAW,
    PLACEHOLDER,
    SAMPLE_DRAW,
    AcceptanceRule,
    Accepted,
    SamplingTensors,
)
from twotower_kernels.backend import use_triton
from twotower_kernels.noise import gumbel_argmax, reproducible_log, uniform_noise

# Most logits that are sampled from at once without the kernel: about 1 GiB of working memory.
MOST_LOGITS = 1 << 25

# Most probable tokens that are searched first for the last one that top-k and top-p keep; the whole vocabulary is
# sorted only where these do not suffice.
MOST_KEPT = 1024


def accept(
    logits: Tensor,
    draft_token_ids: Tensor,
    cu_num_draft_tokens: Tensor,
    max_num_draft_tokens: int,
    sampling: SamplingTensors,
    acceptance_rule: AcceptanceRule = "one-hot",
) -> Accepted:
    """Accepts drafts from the left, and takes the token after them.

    Requests of temperature 0 accept while a draft is the target's most probable token. The others follow the acceptance
    rule. Their text has the target's distribution, whatever was drafted, as long as the drafter did not see the noise:

    * one-hot: a draft is accepted with the target's probability of it; after a rejection the token is drawn from the
      target's distribution without the draft.
    * coupled: the target's sample is fixed by (seed, position) before any draft is looked at; drafts are accepted while
      they agree with it. The text is the same for any drafts, and without drafts.

    On CUDA these are two launches without a copy of the logits and without synchronisation, also for CUDA graphs; each
    logit is read once, of requests with filters several times. Of equal logits the first is taken, NaN counts as the
    largest.

    Args:
        logits: bfloat16, float16 or float32 (on CPU also float64) [num_draft_tokens + num_reqs, vocab] of the target,
            any row stride; rows of a request together: one per draft and one after all of them. Not modified.
        draft_token_ids: integer [num_draft_tokens], of all requests one after the other; -1 is never accepted.
        cu_num_draft_tokens: integer [num_reqs], drafts of each request and all before it; without the leading 0.
        max_num_draft_tokens: at least the drafts of any request.
        sampling: parameters per request; a token is excluded by min-p, then top-k, then top-p. Tokens as probable as
            the last one that stays do stay.
        acceptance_rule: of requests above temperature 0.

    Raises:
        ValueError: shapes do not fit, or on CUDA the vocabulary is strided.
    """
    num_reqs = len(cu_num_draft_tokens)
    if len(logits) != len(draft_token_ids) + num_reqs:
        raise ValueError(
            f"logits has {len(logits)} rows; {len(draft_token_ids)} drafts of {num_reqs} requests need "
            f"{len(draft_token_ids) + num_reqs}"
        )
    if use_triton(logits) and logits.dtype != torch.float64:
        from twotower_kernels.acceptance.kernel import launch_accept

        return launch_accept(
            logits, draft_token_ids, cu_num_draft_tokens, max_num_draft_tokens, sampling, acceptance_rule
        )
    ends = cu_num_draft_tokens.tolist()
    counts = [end - before for before, end in zip([0, *ends], ends, strict=False)]
    parts, row, draft = [], 0, 0
    for requests in _parts(counts, logits.shape[-1], sampling):
        own = counts[requests]
        rows, drafts = slice(row, row + sum(own) + len(own)), slice(draft, draft + sum(own))
        part = sampling.of(requests)
        parts.append(_accept(logits[rows], draft_token_ids[drafts], own, max_num_draft_tokens, part, acceptance_rule))
        row, draft = rows.stop, drafts.stop
    if len(parts) == 1:
        return parts[0]
    return Accepted(torch.cat([part.token_ids for part in parts]), torch.cat([part.num_accepted for part in parts]))


def warm_up(vocab_size: int, dtype: torch.dtype, device: torch.device, acceptance_rule: AcceptanceRule) -> None:
    """Compiles what `accept` launches for logits of this kind, before a request waits for it; nothing without kernels.

    Args:
        vocab_size: columns of the logits.
        dtype, device: of the logits.
        acceptance_rule: of requests above temperature 0.
    """
    if not use_triton(torch.empty(0, device=device)):
        return
    one, nothing = torch.ones(1, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    no_drafts = torch.zeros(1, dtype=torch.int32, device=device)
    # Penalties and the like make float32 of the logits.
    for kind in {dtype, torch.float32}:
        logits = torch.zeros(1, vocab_size, dtype=kind, device=device)
        for temperature, top_p in ((None, None), (one, None), (one, one)):
            sampling = SamplingTensors(temperature, None, top_p, None, nothing, nothing)
            accept(logits, no_drafts[:0], no_drafts, 0, sampling, acceptance_rule)


def _parts(counts: list[int], vocab_size: int, sampling: SamplingTensors) -> list[slice]:
    """Divides the requests into parts that fit in memory: sorting and noise need many times that of the logits."""
    if sampling.temperature is None:
        return [slice(0, len(counts))]
    parts, start, num_rows = [], 0, 0
    for request, count in enumerate(counts):
        if num_rows and (num_rows + count + 1) * vocab_size > MOST_LOGITS:
            parts.append(slice(start, request))
            start, num_rows = request, 0
        num_rows += count + 1
    return [*parts, slice(start, len(counts))]


def _accept(
    logits: Tensor,
    draft_token_ids: Tensor,
    counts: list[int],
    max_num_draft_tokens: int,
    sampling: SamplingTensors,
    acceptance_rule: AcceptanceRule,
) -> Accepted:
    """`accept` for all requests at once, vectorised."""
    layout = _Layout.of(counts, max_num_draft_tokens + 1, logits.device)
    drafts = layout.beside_drafts(draft_token_ids)
    picks = logits.argmax(dim=-1)
    accepted = picks == drafts
    sampled = None if sampling.temperature is None else (sampling.temperature > 0)[layout.request]
    if sampled is not None and bool(sampled.any()):
        rows = sampled.nonzero()[:, 0]
        request, positions = layout.request[rows], layout.positions(sampling.positions)[rows]
        scores = filtered_logits(logits[rows], request, sampling)
        if acceptance_rule == "coupled":
            picks[rows] = gumbel_argmax(scores, sampling.seeds[request], positions, SAMPLE_DRAW)
            accepted[rows] = picks[rows] == drafts[rows]
        else:
            chance = uniform_noise(sampling.seeds[request], positions, ACCEPT_DRAW, 1)[:, 0]
            accepted[rows] = chance < _probability(scores, drafts[rows])
    num_accepted = layout.table(accepted.long(), 0).cumprod(dim=1).sum(dim=1)
    if sampled is not None and acceptance_rule == "one-hot":
        last = layout.starts + num_accepted
        at = last[sampled[last]]  # rows of the requests that sample their next token
        if len(at):
            request, positions = layout.request[at], layout.positions(sampling.positions)[at]
            scores = scores[(sampled.cumsum(0) - 1)[at]]  # a copy of those rows
            # A rejected draft cannot be drawn again; the row after all drafts has no draft to exclude.
            refused = torch.where(drafts[at] < scores.shape[-1], drafts[at], PLACEHOLDER)
            rejected = (refused >= 0).nonzero()[:, 0]
            scores[rejected, refused[rejected]] = -torch.inf
            picks[at] = gumbel_argmax(scores, sampling.seeds[request], positions, NEXT_TOKEN_DRAW)
    limit = num_accepted[layout.request]
    tokens = torch.where(layout.offset < limit, drafts, picks).masked_fill_(layout.offset > limit, PLACEHOLDER)
    return Accepted(layout.table(tokens, PLACEHOLDER).to(torch.int32), num_accepted.to(torch.int32))


@dataclass(frozen=True)
class _Layout:
    """Where the rows of every request are.

    Attributes:
        counts: drafts of every request.
        width: columns of a table with a row per request.
        starts: int64 [num_reqs], first row of every request.
        request: int64 [num_rows], whose row it is.
        offset: int64 [num_rows], which of its rows.
    """

    counts: list[int]
    width: int
    starts: Tensor
    request: Tensor
    offset: Tensor

    @classmethod
    def of(cls, counts: list[int], width: int, device: torch.device) -> _Layout:
        if min(counts, default=0) == width - 1:
            rows = torch.arange(len(counts) * width, device=device)
            request = rows // width
            return cls(counts, width, rows[::width], request, rows - request * width)
        starts = [0, *accumulate(count + 1 for count in counts)][: len(counts)]
        request = torch.tensor([r for r, count in enumerate(counts) for _ in range(count + 1)], dtype=torch.int64)
        offset = torch.tensor([i for count in counts for i in range(count + 1)], dtype=torch.int64)
        first = torch.tensor(starts, dtype=torch.int64)
        return cls(counts, width, first.to(device), request.to(device), offset.to(device))

    def beside_drafts(self, draft_token_ids: Tensor) -> Tensor:
        """Draft that each row judges, int64 [num_rows], -1 where it judges none."""
        if len(draft_token_ids) == len(self.counts) * (self.width - 1):
            return F.pad(
                draft_token_ids.long().view(len(self.counts), self.width - 1), (0, 1), value=PLACEHOLDER
            ).flatten()
        drafts = torch.full_like(self.request, PLACEHOLDER)
        counts = torch.tensor(self.counts, device=drafts.device)
        drafts[self.offset < counts[self.request]] = draft_token_ids.long()
        return drafts

    def positions(self, first: Tensor) -> Tensor:
        """Position in its sequence of the token that every row decides on."""
        return first[self.request] + self.offset

    def table(self, values: Tensor, fill: int) -> Tensor:
        """Lays values int64 [num_rows] out as a table int64 [num_reqs, width]."""
        if len(values) == len(self.counts) * self.width:
            return values.view(len(self.counts), self.width)
        table = torch.full((len(self.counts), self.width), fill, device=values.device)
        table[self.request, self.offset] = values
        return table


def filtered_logits(logits: Tensor, request: Tensor, sampling: SamplingTensors) -> Tensor:
    """Logits over the temperature, -inf for excluded tokens: what is sampled from. A copy, float32 at least.

    Args:
        logits: float [num_rows, vocab]. Not modified.
        request: int64 [num_rows], whose parameters hold for each row; at temperature 0 the logits are not divided.
        sampling: as `accept`.
    """
    wide = torch.promote_types(logits.dtype, torch.float32)
    scale = None
    if sampling.temperature is not None:
        temperature = sampling.temperature[request, None]
        # Multiplied by the inverse, as the kernel does it: a quotient would be rounded differently.
        scale = torch.where(temperature > 0, 1.0 / temperature, 1.0).to(wide)
    scores = logits.to(wide, copy=True) if scale is None else logits.to(wide) * scale
    if sampling.min_p is not None:
        min_p = sampling.min_p[request, None].float()
        bound = scores.amax(dim=-1, keepdim=True) + reproducible_log(min_p.clamp(min=torch.finfo(torch.float32).tiny))
        scores.masked_fill_((scores < bound) & (min_p > 0), -torch.inf)
    if sampling.top_k is None and sampling.top_p is None:
        return scores
    rows, vocab_size = len(scores), scores.shape[1]
    every = scores.new_ones(rows)
    k = every.long() * vocab_size if sampling.top_k is None else sampling.top_k[request].long()
    k = torch.where(k < 1, vocab_size, k)
    p = every if sampling.top_p is None else sampling.top_p[request]
    least, complete = _least_score(scores, scores.topk(min(MOST_KEPT, vocab_size)).values, k, p)
    if not bool(complete.all()):
        rest = (~complete).nonzero()[:, 0]
        ordered = scores[rest].sort(dim=-1, descending=True).values
        least[rest] = _least_score(scores[rest], ordered, k[rest], p[rest])[0]
    return scores.masked_fill_(scores < least[:, None], -torch.inf)


def _least_score(scores: Tensor, ordered: Tensor, k: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """Score [num_rows] that a token must reach by top-k, then top-p, and whether `ordered` sufficed to know it.

    Args:
        scores: [num_rows, vocab].
        ordered: the largest of them, descending.
        k: int64 [num_rows], the vocabulary for all.
        p: float [num_rows].
    """
    (count, vocab_size), all_there = (ordered.shape[1], scores.shape[1]), ordered.shape == scores.shape
    kth = ordered.gather(1, k.clamp(max=count)[:, None] - 1).masked_fill((k >= vocab_size)[:, None], -torch.inf)
    kept = ordered.masked_fill(ordered < kth, -torch.inf)
    total = torch.where(k < vocab_size, kept.logsumexp(1), scores.logsumexp(1))
    num_before = ((kept - total[:, None]).exp().cumsum(1) < p[:, None]).sum(1)
    last = ordered.gather(1, num_before.clamp(max=count - 1)[:, None])[:, 0].masked_fill(p >= 1, -torch.inf)
    kth = kth[:, 0]
    complete = ((k >= vocab_size) | (ordered[:, -1] < kth)) & ((p >= 1) | (num_before < count))
    return torch.maximum(last, kth), complete | all_there


def _probability(scores: Tensor, tokens: Tensor) -> Tensor:
    """Softmax of every row at one token, 0 for a token outside the vocabulary."""
    outside = (tokens < 0) | (tokens >= scores.shape[-1])
    taken = scores.gather(1, tokens.masked_fill(outside, 0)[:, None])[:, 0]
    return (taken - scores.logsumexp(dim=-1)).exp().masked_fill(outside, 0.0)
