"""Rules for what a denoising step commits, and the blocks after such a step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from twotower_kernels.unmasking import PickNoise, Unmasked, choose_commits, unmask
from twotower_spec.generation.denoising.picking import TokenPicker


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

    def finishes(self, index: int, block_size: int) -> bool:
        """Whether the step of this index commits everything, known before it; whoever asks need not look."""
        ...


class Schedule:
    """A commit rule of a threshold and a number of steps left, known before the step: `unmask` follows it itself.

    Attributes:
        confidence_threshold: strict bound; picks above it are committed, and the best one in any case.
    """

    confidence_threshold: float

    def remaining_steps(self, index: int, block_size: int) -> int:
        """Steps left, the step of this index included; 1 commits everything."""
        raise NotImplementedError

    def finishes(self, index: int, block_size: int) -> bool:
        """See `CommitRule.finishes`."""
        return self.remaining_steps(index, block_size) <= 1

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        remaining = self.remaining_steps(step.index, step.masked.shape[1])
        return choose_commits(step.confidence, step.masked, self.confidence_threshold, remaining)


@dataclass(frozen=True)
class PublishedSchedule(Schedule):
    """Commits every pick above a threshold, and at least as many as finish the block in time.

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


@dataclass(frozen=True)
class BehindFirst:
    """A commit rule for blocks whose first token was known before: it sees the positions behind it alone."""

    rule: CommitRule

    def commits(self, step: DenoisingStep) -> Tensor:
        """See `CommitRule.commits`."""
        rest = replace(step, masked=step.masked[:, 1:], confidence=step.confidence[:, 1:])
        return torch.cat([step.masked[:, :1], self.rule.commits(rest)], dim=1)

    def finishes(self, index: int, block_size: int) -> bool:
        """See `CommitRule.finishes`."""
        return self.rule.finishes(index, block_size - 1)


def behind_first(rule: CommitRule) -> CommitRule:
    """Makes a rule for blocks whose first token is known; a schedule looks at masked positions alone as it is."""
    return rule if isinstance(rule, Schedule) else BehindFirst(rule)


def unmask_by(
    commit_rule: CommitRule,
    step: DenoisingStep,
    token_ids: Tensor,
    logits: Tensor,
    positions: Tensor | None,
    picker: TokenPicker,
    noise: PickNoise | None,
) -> Unmasked:
    """Blocks after a step: tokens are picked at all masked positions, and the rule commits some of them.

    Args:
        commit_rule: decides which picks are committed.
        step: the blocks before; their confidence is that of tokens committed earlier.
        token_ids: int64 [num_active, block_size], of these blocks.
        logits, positions, noise: as `unmask`.
        picker: says which ids are never picked.
    """
    # A rule that is no schedule has to see all picks first: unmask then commits every one of them.
    threshold, remaining_steps = 0.0, 1
    if isinstance(commit_rule, Schedule):
        threshold = commit_rule.confidence_threshold
        remaining_steps = commit_rule.remaining_steps(step.index, token_ids.shape[1])
    done = unmask(
        logits,
        positions,
        token_ids,
        step.masked,
        step.confidence,
        picker.mask_token_id,
        threshold,
        remaining_steps,
        picker.num_token_ids,
        noise,
    )
    if isinstance(commit_rule, Schedule):
        return done
    # The rule sees 0 where a confidence is NaN, so that one damaged row does not change its decisions about the others.
    commits = commit_rule.commits(replace(step, confidence=done.confidence.nan_to_num(nan=0.0)))
    return Unmasked(
        torch.where(commits, done.token_ids, token_ids), torch.where(commits, done.confidence, step.confidence), commits
    )
