"""Simulated server: texts of several kinds, known costs, and how a policy or a fixed choice does on them."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from twotower_spec.drafting import AdaptivePolicy, RoundOutcome
from twotower_spec.drafting.policies import Candidate
from twotower_spec.generation.denoising import DenoisingStep


@dataclass(frozen=True)
class ServerCosts:
    """Seconds as on the trio: a verifier of 10 ms, a denoiser and a context tower of a few.

    Attributes:
        verify_s, verify_token_s: of the target's pass, and of each token of it.
        denoise_s, denoise_token_s: the same of the denoiser.
        extend_s, extend_token_s: the same of the context tower.
    """

    verify_s: float = 0.010
    verify_token_s: float = 0.0008
    denoise_s: float = 0.003
    denoise_token_s: float = 0.0002
    extend_s: float = 0.002
    extend_token_s: float = 0.0002

    def verify(self, num_tokens: float) -> float:
        return self.verify_s + num_tokens * self.verify_token_s

    def denoise(self, num_tokens: float) -> float:
        return self.denoise_s + num_tokens * self.denoise_token_s

    def extend(self, num_tokens: float) -> float:
        return self.extend_s + num_tokens * self.extend_token_s if num_tokens else 0.0


@dataclass
class Text:
    """One request.

    Attributes:
        chance: that a draft is accepted once all before it are.
        unread: tokens that the context tower has not read.
        left: tokens to come.
    """

    chance: float
    unread: int = 60
    left: int = 64


@dataclass(frozen=True)
class ServedRound:
    """One round: who was drafted for, tokens gained, seconds, and what they would have been without drafts."""

    drafted: list[int]
    chances: list[float]
    num_tokens: int
    seconds: float
    plain_s: float
    block_size: int


class SimulatedServer:
    """Serves texts one after the other, so many at once."""

    def __init__(self, costs: ServerCosts | None = None, seed: int = 0, whole_batch: bool = False) -> None:
        self.whole_batch = whole_batch
        self.costs, self.random = costs or ServerCosts(), np.random.default_rng(seed)
        self.texts: dict[int, Text] = {}
        self._ids = itertools.count()

    def fill(self, chances: list[float]) -> None:
        """Begins texts of these kinds until there are as many as kinds; those too many go on elsewhere."""
        for request_id in list(self.texts)[len(chances) :]:
            del self.texts[request_id]
        while len(self.texts) < len(chances):
            self.texts[next(self._ids)] = Text(chances[len(self.texts)])

    def warm_up(self, policy: AdaptivePolicy) -> None:
        for size, (rows, tokens) in itertools.product(policy.block_sizes, ((1, 1), (4, 32), (1, 64))):
            seconds = self.costs.extend(tokens), self.costs.denoise(rows * size)
            policy.learn_costs(tokens, rows, size, *seconds)

    def round(self, policy: AdaptivePolicy) -> ServedRound:
        """One round of all texts."""
        texts, costs = list(self.texts.items()), self.costs
        candidates = [Candidate(request_id, text.unread) for request_id, text in texts]
        plan = policy.plan(len(texts), candidates, whole_batch=self.whole_batch)
        counts, passes, num_read, denoise_s = [0] * len(texts), [0] * len(texts), 0, 0.0
        confidence = torch.zeros(len(texts), plan.block_size if plan else 0)
        # First drafts are more probable or less than others of their text, and known to be so.
        spread = [min(0.2, text.chance, 1 - text.chance) for _, text in texts]
        sure = [text.chance + by * self.random.choice((-1, 1)) for (_, text), by in zip(texts, spread, strict=True)]
        chosen = [row for row in range(len(texts)) if plan is not None and plan.chooses(row)]
        budget = plan.most_context_tokens if plan and plan.most_context_tokens is not None else 10**6
        ready, foreseen = [], {}
        for row in sorted(chosen, key=lambda row: texts[row][1].unread):
            read = min(budget - num_read, texts[row][1].unread)
            num_read, texts[row][1].unread = num_read + read, texts[row][1].unread - read
            if not texts[row][1].unread:
                ready.append(row)
                if read > (policy.num_speculative_tokens + 1 if plan and plan.num_tokens else 1):
                    foreseen[texts[row][0]] = (self.random.random(read - 1) < texts[row][1].chance).tolist()
        if plan is not None and plan.num_tokens and ready and not self.whole_batch:
            named = [texts[row][0] for row in ready]
            worth = policy.worth_denoising(plan, named, torch.tensor([sure[row] for row in ready]))
            ready = [row for row, is_worth in zip(ready, worth, strict=True) if is_worth]
        drafted = ready
        if plan is not None and not plan.num_tokens:
            drafted, ready = chosen, []
        if plan is not None and ready:
            confidence[ready] = torch.tensor([[texts[row][1].chance] for row in ready])
            confidence[ready, 0] = torch.tensor([sure[row] for row in ready]).float()
            masked, index = torch.ones(len(ready), plan.block_size, dtype=torch.bool), 0
            while masked.any():
                step = DenoisingStep(index, list(range(len(ready))), masked, confidence[ready])
                masked, index = masked & ~plan.commit_rule.commits(step), index + 1
            denoise_s = index * costs.denoise(len(ready) * plan.block_size)
            usable = policy.usable(plan, confidence[ready], [index] * len(ready))
            if self.whole_batch:
                usable = [plan.num_tokens] * len(ready)
            for row, count in zip(ready, usable, strict=True):
                counts[row], passes[row] = count, index
        accepted = [self._accepted(sure[row], text.chance, counts[row]) for row, (_, text) in enumerate(texts)]
        num_verified = len(texts) * plan.num_tokens if plan and ready and self.whole_batch else sum(counts)
        extend_s, verify_s = costs.extend(num_read), costs.verify(len(texts) + num_verified)
        policy.observe(
            RoundOutcome(
                plan, counts, accepted, confidence, passes, num_read, extend_s, denoise_s, verify_s,
                request_ids=[request_id for request_id, _ in texts], num_denoised=len(ready), foreseen=foreseen,
            )
        )  # fmt: skip
        num_tokens = 0
        for (request_id, text), count in zip(texts, accepted, strict=True):
            text.unread, text.left, num_tokens = text.unread + count + 1, text.left - count - 1, num_tokens + count + 1
            if text.left <= 0:
                self.texts[request_id] = text
                del self.texts[request_id]
                policy.forget(request_id)
                self.texts[next(self._ids)] = Text(text.chance)
        seconds = extend_s + denoise_s + verify_s
        chances = [text.chance for _, text in texts]
        return ServedRound(
            drafted, chances, num_tokens, seconds, costs.verify(len(texts)), plan.block_size if plan else 0
        )

    def _accepted(self, first: float, chance: float, count: int) -> int:
        right = self.random.random(count) < np.array([first, *[chance] * count])[:count]
        return int(np.cumprod(right).sum())

    def best_fixed_rate(self, chances: list[float], block_sizes: tuple[int, ...]) -> float:
        """Tokens per second of the best fixed block size and number of drafts, for all or for none of the texts."""
        costs, n = self.costs, len(chances)
        rates = [n / costs.verify(n)]
        for size in block_sizes:
            for drafts in range(1, size + 1):
                gained = sum(sum(chance**i for i in range(1, drafts + 1)) for chance in chances)
                prompts = 60 * (gained + n) / 64
                seconds = costs.extend(gained + n + prompts) + costs.denoise(n * size) + costs.verify(n + n * drafts)
                rates.append((n + gained) / seconds)
        return max(rates)


def serve(policy: AdaptivePolicy, server: SimulatedServer, chances: list[float], num_rounds: int) -> list[ServedRound]:
    """Rounds of texts of these kinds, which begin anew as they end."""
    rounds = []
    server.fill(chances)
    for _ in range(num_rounds):
        rounds.append(server.round(policy))
    return rounds


def rate(rounds: list[ServedRound]) -> float:
    """Tokens per second."""
    return sum(one.num_tokens for one in rounds) / sum(one.seconds for one in rounds)
