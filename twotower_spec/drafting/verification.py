"""Which drafts are accepted, and what follows them: the rules that leave the target's text as it is.

Two kinds. *Comparing* rules choose the target's tokens first, without a look at the drafts, and accept drafts that
agree with them: exact whatever the drafts are. *Rejecting* rules decide by probabilities: accept a prefix of the
drafts, then draw the next token from what is left of the target; each says for which drafts it is exact, and refuses
all others.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.acceptance import ACCEPT_DRAW, NEXT_TOKEN_DRAW, AcceptanceRule, accept
from twotower_kernels.noise import gumbel_argmax, uniform_noise
from twotower_spec.drafting.draft_block import DraftBlock, Provenance
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state.transfer import to_device


@dataclass(frozen=True)
class VerificationOutcome:
    """Decision of one verification, per request.

    Attributes:
        num_accepted: drafts kept, from the left.
        next_tokens: the token after them: recovered at the first rejection, or the bonus when all are kept.
    """

    num_accepted: list[int]
    next_tokens: list[int]


class VerificationRule(Protocol):
    """Decides over drafts; the text is distributed as the target's, whatever was drafted."""

    name: str

    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """Refuses drafts for which the rule would change the text.

        Args:
            made: how drafts are made.
            sampler: of the target.

        Raises:
            ArgumentError: with the reason.
        """
        ...

    def verify(
        self, logits: Tensor, draft: DraftBlock, sampler: Sampler, seeds: Tensor, positions: Tensor
    ) -> VerificationOutcome:
        """Decides over one round.

        Args:
            logits: float [num_reqs, num_speculative_tokens + 1, vocab] of the target, before temperature and filters;
                row i's entries beyond its number of drafts are ignored.
            draft: the drafts.
            sampler: temperature and filters, applied to the target first of all.
            seeds: int64 [num_reqs], of the noise.
            positions: int64 [num_reqs], index of the first draft in its sequence.
        """
        ...


class _ComparingRule:
    """Accepts drafts while they are the tokens that the target takes anyway."""

    name: str

    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """See `VerificationRule.require_exact`; every draft will do."""

    def verify(
        self, logits: Tensor, draft: DraftBlock, sampler: Sampler, seeds: Tensor, positions: Tensor
    ) -> VerificationOutcome:
        """See `VerificationRule.verify`."""
        return _accept(logits, draft, sampler, seeds, positions, "coupled")


class GreedyRule(_ComparingRule):
    """Accepts while a draft is the target's most probable token. Temperature 0."""

    name = "greedy"

    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """See `VerificationRule.require_exact`."""
        if not sampler.greedy:
            raise ArgumentError(
                f"the greedy rule is for temperature 0, not {sampler.temperature:g}; take one-hot or coupled"
            )


class CoupledRule(_ComparingRule):
    """Accepts while a draft is the token that the target samples with its noise (seed, position, token).

    The text for a seed is the same whatever is drafted, and the same as without drafts.

    Source: the Gumbel-max trick with the target's noise fixed first.
    """

    name = "coupled"


def _accept(
    logits: Tensor, draft: DraftBlock, sampler: Sampler, seeds: Tensor, positions: Tensor, rule: AcceptanceRule
) -> VerificationOutcome:
    """`VerificationRule.verify` by the kernel. Rows bring equally many drafts; those that are -1 are not accepted."""
    num_reqs, width, vocab = logits.shape
    sampling = sampler.sampling(seeds, positions, logits.dtype)
    counts = torch.arange(1, num_reqs + 1, device=logits.device) * (width - 1)
    drafts = draft.token_ids.to(logits.device).flatten()
    done = accept(logits.reshape(-1, vocab), drafts, counts, width - 1, sampling, rule)
    num_accepted = done.num_accepted.long()
    next_tokens = done.token_ids.gather(1, num_accepted[:, None])[:, 0]
    return VerificationOutcome(num_accepted.tolist(), next_tokens.tolist())


class RejectingRule(ABC):
    """Accepts with probabilities, and draws the next token from what is left of the target."""

    name: str

    @abstractmethod
    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """See `VerificationRule.require_exact`."""

    @abstractmethod
    def length_probs(self, target: Tensor, draft: DraftBlock) -> Tensor:
        """How probable it is that exactly n drafts are accepted.

        Args:
            target: float [num_reqs, num_speculative_tokens + 1, vocab], probabilities after the drafts to the left.
            draft: the drafts.

        Returns:
            [num_reqs, num_speculative_tokens + 1], rows sum to 1.
        """

    @abstractmethod
    def next_token_probs(self, target: Tensor, draft: DraftBlock, num_accepted: Tensor) -> Tensor:
        """Distribution [num_reqs, vocab] of the token after `num_accepted` int64 [num_reqs] drafts."""

    def verify(
        self, logits: Tensor, draft: DraftBlock, sampler: Sampler, seeds: Tensor, positions: Tensor
    ) -> VerificationOutcome:
        """See `VerificationRule.verify`."""
        target = sampler.probs(logits)
        if not any(draft.num_draft_tokens):
            tokens = gumbel_argmax(target[:, 0].log(), seeds, positions, NEXT_TOKEN_DRAW)
            return VerificationOutcome(draft.num_draft_tokens, tokens.tolist())
        self.require_exact(draft.provenance, sampler)
        lengths = self.length_probs(target.double(), draft)
        uniform = uniform_noise(seeds, positions, ACCEPT_DRAW, 1).double()
        # Rounding may leave the sum short of 1; a length that cannot be is not reached by it.
        numbers = torch.arange(lengths.shape[1], device=lengths.device)
        longest = torch.where(lengths > 0, numbers, 0).amax(dim=1)
        num_accepted = torch.minimum((lengths.cumsum(dim=1) <= uniform).sum(dim=1), longest)
        following = self.next_token_probs(target, draft, num_accepted)
        tokens = gumbel_argmax(following.log(), seeds, positions + num_accepted, NEXT_TOKEN_DRAW)
        return VerificationOutcome(num_accepted.tolist(), tokens.tolist())


class OneHotRule(RejectingRule):
    """Accepts a draft with the target's probability of it; else takes another token, as the target would.

    It is the p/q rule for a draft distribution that has all on the draft itself, hence exact for every draft that was
    made without the rule's own noise, in any number of steps. The probabilities are its specification; outcomes are
    drawn by the kernel.
    """

    name = "one-hot"

    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """See `VerificationRule.require_exact`; every draft will do."""

    def verify(
        self, logits: Tensor, draft: DraftBlock, sampler: Sampler, seeds: Tensor, positions: Tensor
    ) -> VerificationOutcome:
        """See `VerificationRule.verify`."""
        return _accept(logits, draft, sampler, seeds, positions, "one-hot")

    def length_probs(self, target: Tensor, draft: DraftBlock) -> Tensor:
        """See `RejectingRule.length_probs`."""
        return _lengths_from_acceptance(_probability_of_drafts(target, draft))

    def next_token_probs(self, target: Tensor, draft: DraftBlock, num_accepted: Tensor) -> Tensor:
        """See `RejectingRule.next_token_probs`."""
        at, rejected, tokens = _after(target, draft, num_accepted)
        without = at.scatter(1, tokens[:, None], 0.0)
        return _normalised(torch.where(rejected[:, None], without, at), at)


class _RatioRule(RejectingRule):
    """A rule that compares the target's probabilities with those the drafts were drawn from."""

    def require_exact(self, made: Provenance, sampler: Sampler) -> None:
        """See `VerificationRule.require_exact`."""
        reason = None
        if made.num_steps > 1:
            reason = (
                f"these were made in {made.num_steps} denoising steps, where a token may depend on later ones and its "
                f"distribution given the earlier ones is not known"
            )
        elif made.noise == "shared":
            reason = "these were sampled with the target's own noise"
        elif made.noise == "none":
            reason = "these are the most probable tokens, of which no distribution was kept"
        elif not made.known_probs:
            reason = "a policy chose by their confidence which of these to verify"
        if reason:
            raise ArgumentError(
                f"the {self.name} rule is exact only for drafts drawn in one step from known distributions, but "
                f"{reason}; take the one-hot or the coupled rule"
            )


class ProbabilityRatioRule(_RatioRule):
    """The p/q rule: accepts a draft with min(1, p/q), else draws from max(p - q, 0).

    Source: Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", algorithm 1.
    """

    name = "p/q"

    def length_probs(self, target: Tensor, draft: DraftBlock) -> Tensor:
        """See `RejectingRule.length_probs`."""
        return _lengths_from_acceptance(_ratios(target, draft).clamp(max=1.0))

    def next_token_probs(self, target: Tensor, draft: DraftBlock, num_accepted: Tensor) -> Tensor:
        """See `RejectingRule.next_token_probs`."""
        at, rejected, _ = _after(target, draft, num_accepted)
        left = (at - _draft_probs_after(at, draft, num_accepted)).clamp(min=0.0)
        return _normalised(torch.where(rejected[:, None], left, at), at)


class BlockRule(_RatioRule):
    """Block verification: decides over the prefixes of a block together, and accepts more than token by token.

    Source: Sun et al. 2024, "Block Verification Accelerates Speculative Decoding", algorithm 2.
    """

    name = "block"

    def length_probs(self, target: Tensor, draft: DraftBlock) -> Tensor:
        """See `RejectingRule.length_probs`."""
        weights = self._prefix_weights(target, draft)
        num_reqs, width = weights.shape
        last = to_device(draft.num_draft_tokens, target.device)
        stop = torch.zeros_like(weights)  # probability of stopping at a length if no longer one was taken
        for length in range(width):
            weight = weights[:, length]
            if length < width - 1:
                numbers = torch.full((num_reqs,), length, device=target.device)
                left = self._left(target, draft, numbers, weight).sum(dim=1)
                # Of a prefix that is certain and leaves nothing, the next draft is always taken: any value will do.
                whole = left + 1 - weight
                inner = torch.where(whole > 0, left / whole, 1.0)
            else:
                inner = weight
            stop[:, length] = torch.where(last == length, weight, torch.where(last > length, inner, 0.0))
        none_longer = torch.cat([(1 - stop).flip(1).cumprod(1).flip(1)[:, 1:], torch.ones_like(stop[:, :1])], dim=1)
        return stop * none_longer

    def next_token_probs(self, target: Tensor, draft: DraftBlock, num_accepted: Tensor) -> Tensor:
        """See `RejectingRule.next_token_probs`."""
        at, rejected, _ = _after(target, draft, num_accepted)
        weight = self._prefix_weights(target, draft).gather(1, num_accepted[:, None])[:, 0]
        left = self._left(target, draft, num_accepted, weight)
        return _normalised(torch.where(rejected[:, None], left, at), at)

    @staticmethod
    def _prefix_weights(target: Tensor, draft: DraftBlock) -> Tensor:
        """The paper's p_i for every prefix, [num_reqs, num_speculative_tokens + 1]; the empty one has 1."""
        weights = [torch.ones_like(target[:, 0, 0])]
        for ratio in _ratios(target, draft).unbind(1):
            weights.append((weights[-1] * ratio).clamp(max=1.0))
        return torch.stack(weights, dim=1)

    @staticmethod
    def _left(target: Tensor, draft: DraftBlock, num_accepted: Tensor, weight: Tensor) -> Tensor:
        at = target[torch.arange(len(target), device=target.device), num_accepted]
        return (weight[:, None] * at - _draft_probs_after(at, draft, num_accepted)).clamp(min=0.0)


def _probability_of_drafts(probs: Tensor, draft: DraftBlock) -> Tensor:
    """Probabilities [num_reqs, num_speculative_tokens] of the drafts, 0 where there is none."""
    tokens = draft.token_ids.to(probs.device)
    taken = probs[:, : tokens.shape[1]].gather(2, tokens.clamp(min=0)[:, :, None])[:, :, 0]
    return taken.masked_fill(tokens < 0, 0.0)


def _ratios(target: Tensor, draft: DraftBlock) -> Tensor:
    """Target's over drafter's probability of every draft, 0 where there is none."""
    own = _probability_of_drafts(_draft_probs(draft, target), draft)
    return torch.where(own > 0, _probability_of_drafts(target, draft) / own, 0.0)


def _draft_probs(draft: DraftBlock, target: Tensor) -> Tensor:
    """The drafts' distributions over the target's vocabulary; what only one of both has is never drafted."""
    assert draft.probs is not None
    probs = draft.probs.to(target)
    return torch.nn.functional.pad(probs, (0, target.shape[-1] - probs.shape[-1]))


def _draft_probs_after(at: Tensor, draft: DraftBlock, num_accepted: Tensor) -> Tensor:
    """The distribution that the draft after `num_accepted` was drawn from, [num_reqs, vocab]; any where all are."""
    probs = _draft_probs(draft, at)
    return probs[torch.arange(len(at), device=at.device), num_accepted.clamp(max=probs.shape[1] - 1)]


def _lengths_from_acceptance(accept: Tensor) -> Tensor:
    """Probability of every length from the probability [num_reqs, n] of each draft to be accepted after the others."""
    one = accept.new_ones(len(accept), 1)
    return torch.cat([one, accept.cumprod(dim=1)], dim=1) * torch.cat([1 - accept, one], dim=1)


def _after(target: Tensor, draft: DraftBlock, num_accepted: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Target [num_reqs, vocab] after the accepted drafts, whether a draft was rejected there, and which."""
    rows = torch.arange(len(target), device=target.device)
    rejected = num_accepted < to_device(draft.num_draft_tokens, target.device)
    padded = torch.nn.functional.pad(draft.token_ids.to(target.device), (0, 1), value=-1)
    return target[rows, num_accepted], rejected, padded[rows, num_accepted].clamp(min=0)


def _normalised(probs: Tensor, otherwise: Tensor) -> Tensor:
    """Rows that sum to 1; a row without anything, which only rounding can reach, is replaced."""
    total = probs.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, probs / total, otherwise)


VERIFICATION_RULES: dict[str, VerificationRule] = {
    rule.name: rule for rule in (GreedyRule(), OneHotRule(), CoupledRule(), ProbabilityRatioRule(), BlockRule())
}


def find_verification_rule(name: str | None, sampler: Sampler) -> VerificationRule:
    """Finds a rule by name; None for greedy at temperature 0 and one-hot above.

    Raises:
        ArgumentError: the name is unknown.
    """
    name = name or ("greedy" if sampler.greedy else "one-hot")
    if name not in VERIFICATION_RULES:
        raise ArgumentError(f"verification rule {name!r} is not there; give one of {', '.join(VERIFICATION_RULES)}")
    return VERIFICATION_RULES[name]
