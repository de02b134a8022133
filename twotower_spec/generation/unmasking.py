"""A denoising step after the logits: which masked positions are committed, and to what."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.unmasking import PickNoise, Unmasked, choose_commits, unmask
from twotower_spec.generation.sampling import Sampler


@dataclass(frozen=True)
class DenoisingStep:
    """Blocks after a denoiser pass, before anything of it is committed.

    Attributes:
        index: counts from 0.
        rows: index of every block among those of the call; blocks that are done have left.
        masked: bool [num_active, block_size].
        confidence: float [num_active, block_size], of the pick at masked positions, of the committed token elsewhere
            (as it was when it was committed).
    """

    index: int
    rows: Sequence[int]
    masked: Tensor
    confidence: Tensor


class CommitRule(Protocol):
    """Decides what a step commits."""

    def commits(self, step: DenoisingStep) -> Tensor:
        """Positions to commit, bool [num_active, block_size], at least one masked one of every block that has any."""
        ...


class Schedule:
    """A rule that knows before the step how many denoising steps are left: `unmask` follows it in the same launch.

    Attributes:
        confidence_threshold: strict bound; picks above it are committed, and the best one in any case.
    """

    confidence_threshold: float

    def remaining_steps(self, index: int, block_size: int) -> int:
        """Steps left, the step of this index included; 1 commits everything."""
        raise NotImplementedError

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        remaining = self.remaining_steps(step.index, step.masked.shape[1])
        return choose_commits(step.confidence, step.masked, self.confidence_threshold, remaining)


@dataclass(frozen=True)
class PublishedSchedule(Schedule):
    """Every pick above a threshold, and at least as many as finish the block in time.

    Attributes:
        confidence_threshold: strict bound.
        steps_per_block: the last step commits everything.

    Source: modeling_nemotron_twotower.py, generate_mask_diffusion.
    """

    confidence_threshold: float
    steps_per_block: int

    def remaining_steps(self, index: int, block_size: int) -> int:
        """See `Schedule.remaining_steps`."""
        return self.steps_per_block - index


def pick_noise(
    sampler: Sampler, logits: Tensor, seeds: Tensor, first_positions: Tensor, draw: int = 0
) -> PickNoise | None:
    """What picks are sampled with; None for the most probable token.

    Args:
        sampler: temperature and filters.
        logits: [num_positions, vocab]; with filters, excluded ids have -inf already. Not modified.
        seeds: int64 [num_reqs].
        first_positions: int64 [num_reqs], index of each block's first token in its sequence.
        draw: tells repeated draws at one position apart.
    """
    if sampler.greedy:
        return None
    scores = sampler.filter(logits) if sampler.filters else None
    return PickNoise(sampler.temperature, seeds, first_positions, draw, scores)


def unmask_by(
    rule: CommitRule,
    step: DenoisingStep,
    token_ids: Tensor,
    logits: Tensor,
    positions: Tensor,
    mask_token_id: int,
    num_token_ids: int | None,
    noise: PickNoise | None,
) -> Unmasked:
    """Blocks after a step: picks of all masked positions, of which the rule commits some.

    Args:
        rule: what is committed.
        step: the blocks before; their confidence is that of tokens committed earlier.
        token_ids: int64 [num_active, block_size], of these blocks.
        logits, positions, mask_token_id, num_token_ids, noise: as `unmask`.
    """
    # Any other rule than a schedule sees all picks before it decides.
    threshold, remaining_steps = 0.0, 1
    if isinstance(rule, Schedule):
        threshold = rule.confidence_threshold
        remaining_steps = rule.remaining_steps(step.index, token_ids.shape[1])
    done = unmask(
        logits,
        positions,
        token_ids,
        step.masked,
        step.confidence,
        mask_token_id,
        threshold,
        remaining_steps,
        num_token_ids,
        noise,
    )
    if isinstance(rule, Schedule):
        return done
    # A row of NaN commits like one without confidence, and what the rule decides for the others stays theirs.
    commits = rule.commits(replace(step, confidence=done.confidence.nan_to_num(nan=0.0)))
    return Unmasked(
        torch.where(commits, done.token_ids, token_ids), torch.where(commits, done.confidence, step.confidence), commits
    )
