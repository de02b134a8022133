"""Probability of given text under the context tower, which multiple-choice tasks and perplexity need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from twotower_spec.errors import ArgumentError
from twotower_spec.state import ContextState
from twotower_spec.state.context_state import DEFAULT_PAGE_SIZE, DEFAULT_TOKEN_BUDGET
from twotower_spec.state.transfer import to_device
from twotower_spec.towers.model import TwoTowers

# Logits of a whole vocabulary that exist at once: 128 MiB in float32 with the 131072 ids of the published model.
LOGITS_AT_ONCE = 256

Tokens = tuple[int, ...]


@dataclass(frozen=True)
class Likelihood:
    """Probability of one continuation.

    Attributes:
        log_probability: natural logarithm, of all its tokens together.
        greedy: whether each of its tokens is the most probable one.
    """

    log_probability: float
    greedy: bool


@dataclass
class _Pass:
    """Continuations of one context that differ at most in their last token, and so are read in one pass.

    Attributes:
        tokens: ids that the tower reads, which are the last of the context and all but the last of the continuation.
        last_tokens: per continuation its index among the pairs, and its last token.
    """

    tokens: Tokens
    last_tokens: list[tuple[int, int]] = field(default_factory=list)


@torch.inference_mode()
def log_likelihoods(
    towers: TwoTowers,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 1,
    progress: Callable[[int], object] | None = None,
) -> list[Likelihood]:
    """Likelihood of continuations under the context tower.

    Equal contexts are read once, whatever the number of their continuations.

    Args:
        towers: the model; its denoiser is not used.
        pairs: token ids of context and continuation; the context has one token at least.
        batch_size: contexts that are read together.
        progress: called with the number of continuations just done.

    Raises:
        ArgumentError: a context is empty.
    """
    found: list[Likelihood] = [Likelihood(0.0, True)] * len(pairs)
    groups: dict[Tokens, dict[Tokens, _Pass]] = {}
    for index, (context, continuation) in enumerate(pairs):
        if not context:
            raise ArgumentError(f"the context of pair {index} is empty; give a first token, the tokenizer's bos token")
        if continuation:  # an empty one has probability 1, as `found` says already
            tokens = (context[-1], *continuation[:-1])
            passes = groups.setdefault(tuple(context), {})
            passes.setdefault(tokens, _Pass(tokens)).last_tokens.append((index, continuation[-1]))
    contexts = sorted(groups, key=lambda context: (-len(context), context))
    for start in range(0, len(contexts), batch_size):
        batch = contexts[start : start + batch_size]
        done = _score_batch(towers, batch, [list(groups[context].values()) for context in batch])
        for index, likelihood in done.items():
            found[index] = likelihood
        if progress:
            progress(len(done))
    return found


def _score_batch(
    towers: TwoTowers, contexts: Sequence[Tokens], passes_of: Sequence[list[_Pass]]
) -> dict[int, Likelihood]:
    """All continuations of some contexts, by index."""
    lengths = [
        len(context) + max(len(one.tokens) for one in passes)
        for context, passes in zip(contexts, passes_of, strict=True)
    ]
    rows = range(len(contexts))
    pages = -(-max(lengths) // DEFAULT_PAGE_SIZE)
    state = ContextState(towers.config, len(contexts), pages * len(contexts), towers.dtype, towers.context.device)
    for row in rows:
        state.claim(row, max(lengths))
    before_last = {row: context[:-1] for row, context in enumerate(contexts)}
    state.extend_in_chunks(towers.context, before_last, DEFAULT_TOKEN_BUDGET, want_logits=False)
    at_context = state.snapshot(rows)
    done: dict[int, Likelihood] = {}
    for turn in range(max(map(len, passes_of))):
        state.roll_back(at_context)
        done.update(
            _score_passes(towers, state, {row: passes_of[row][turn] for row in rows if turn < len(passes_of[row])})
        )
    return done


def _score_passes(towers: TwoTowers, state: ContextState, passes: dict[int, _Pass]) -> dict[int, Likelihood]:
    """One pass per request, over a limited number of tokens at a time."""
    log_probability = dict.fromkeys(passes, 0.0)
    greedy = dict.fromkeys(passes, True)
    done: dict[int, Likelihood] = {}
    stride = max(1, LOGITS_AT_ONCE // len(passes))
    for start in range(0, max(len(one.tokens) for one in passes.values()), stride):
        chunks = {row: one.tokens[start : start + stride] for row, one in passes.items() if start < len(one.tokens)}
        logits = state.extend(towers.context, chunks, logits="all").logits
        assert logits is not None
        normaliser = logits.logsumexp(-1)
        best = logits.argmax(-1)
        at = 0
        for row, chunk in chunks.items():
            following = to_device(passes[row].tokens[start + 1 : start + len(chunk) + 1], logits.device).long()
            index = torch.arange(at, at + len(following), device=logits.device)
            log_probability[row] += float((logits[index, following] - normaliser[index]).double().sum())
            greedy[row] &= bool((best[index] == following).all())
            at += len(chunk)
            if start + len(chunk) == len(passes[row].tokens):
                for pair, token in passes[row].last_tokens:
                    last = float(logits[at - 1, token] - normaliser[at - 1])
                    done[pair] = Likelihood(log_probability[row] + last, greedy[row] and int(best[at - 1]) == token)
    return done
