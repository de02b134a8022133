"""The device part of drafting: contexts and tensors in, token ids and confidences out."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from twotower_spec.config import DiffusionConfig, TwoTowerConfig, accumulation_dtype, check_integer
from twotower_spec.drafting.draft_block import Noise
from twotower_spec.errors import ArgumentError, CheckpointError
from twotower_spec.generation.denoising import (
    CommitRule,
    DenoisedBlocks,
    DenoiserPasses,
    DenoisingLoop,
    DenoisingRequest,
    FirstStepProbs,
    HostLoop,
    Schedule,
    ScheduleLoop,
    TokenPicker,
    behind_first,
)
from twotower_spec.generation.sampling import Sampler
from twotower_spec.state import BlockContext
from twotower_spec.state.graphs import PassGraphs
from twotower_spec.state.transfer import moved
from twotower_spec.towers.model import TwoTowers

FirstToken = Literal["context", "denoiser"]

# Mixed into seeds, so that drafts never see the noise of the target; and more offsets than a block can have.
PRIVATE_SEED = 0x5DEECE66D
MOST_OFFSETS = 1 << 10


def block_size_of(name_or_path: str | Path, revision: str | None = None) -> int:
    """Block size that a checkpoint's config.json names, or the published one.

    Raises:
        TwoTowerError: config.json is refused, or the size is out of range.
    """
    config = TwoTowerConfig.from_pretrained(name_or_path, revision)
    block_size: int | None = config.unknown_fields.get("block_size")
    if block_size is None:
        return DiffusionConfig().block_size
    try:
        check_integer("block_size", block_size, minimum=1, maximum=MOST_OFFSETS)
    except ArgumentError as error:
        raise CheckpointError(f"config.json of {name_or_path}: {error}, or name one in the twotower knobs") from error
    return block_size


class BlockDrafter:
    """Drafts one block for every row of a batch.

    It knows no request ids, keeps no lists and reads nothing back from a device; results stay on the denoiser's. Only
    `HostLoop` looks at the device between its steps.

    Attributes:
        picker: how tokens are picked, and which ids never are.
        graphs: captured passes of the denoiser.
        last_logits: float [num_slots, vocab] on the context tower's device, after the last token of every slot, from
            which the first draft is picked; whoever runs the context tower stores them with `keep_logits`.
    """

    def __init__(
        self,
        towers: TwoTowers,
        num_slots: int = 0,
        *,
        first_token: FirstToken,
        sampler: Sampler,
        noise: Noise,
        num_token_ids: int,
        loop: type[DenoisingLoop] = HostLoop,
        cuda_graphs: bool = True,
    ) -> None:
        """Allocates room for the last logits.

        Args:
            towers: the model, each tower where it was placed.
            num_slots: slots of the pool, if a context tower gives logits for them.
            first_token: take the first draft from the context tower, or leave it to the denoiser.
            sampler: how tokens are picked.
            noise: of the sampler: "private", or "shared" with the target under the coupled rule.
            num_token_ids: ids from this one on are not drafted.
            loop: that fills the blocks.
            cuda_graphs: whether passes may be captured.
        """
        self.towers = towers
        self.first_token, self.noise = first_token, noise
        self.picker = TokenPicker(sampler, towers.config.mask_token_id, num_token_ids)
        self.last_logits = torch.empty(
            (num_slots, towers.config.vocab_size),
            dtype=accumulation_dtype(towers.dtype),
            device=towers.context.device if num_slots else towers.denoiser.device,
        )
        self._make_loop = loop
        self.graphs = PassGraphs.of_tower(towers.denoiser, cuda_graphs)
        self._passes: dict[int, DenoiserPasses] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of time modulation, on the denoiser's device."""
        return sum(passes.nbytes for passes in self._passes.values())

    def keep_logits(self, slots: Tensor, logits: Tensor, are_new: Tensor | None = None) -> None:
        """Stores the context tower's logits [num_reqs, vocab] after the last token of these slots.

        Args:
            slots: int64 [num_reqs].
            logits: float [num_reqs, vocab].
            are_new: bool [num_reqs] on the context tower's device, whose logits count; None for all.
        """
        slots = moved(slots, self.last_logits.device)
        if are_new is not None:
            logits = torch.where(are_new[:, None], logits, self.last_logits[slots])
        self.last_logits[slots] = logits

    @torch.inference_mode()
    def first_confidence(self, slots: Tensor, starts: Tensor, seeds: Tensor) -> Tensor:
        """How probable the context tower finds the first drafts [num_reqs] that it makes.

        Args:
            slots, starts, seeds: as of `draft`.
        """
        return self._first_tokens(slots, *self._noise_of(seeds, starts))[1]

    @torch.inference_mode()
    def draft(
        self,
        context: BlockContext,
        slots: Tensor,
        starts: Tensor,
        seeds: Tensor,
        block_size: int,
        commit_rule: CommitRule,
        num_wanted: int | None = None,
        first_tokens: Tensor | None = None,
    ) -> tuple[DenoisedBlocks, Tensor | None]:
        """Drafts what may follow every row.

        Args:
            context: of the rows, viewed for blocks of this size.
            slots: int64 [num_reqs], of their last logits.
            starts: int64 [num_reqs], index of each block's first token in its sequence.
            seeds: int64 [num_reqs], of sampling noise.
            block_size: positions that are denoised.
            commit_rule: what each denoising step commits.
            num_wanted: positions that are filled, from the left, if the rule commits all in one step; None for all.
            first_tokens: int64 [num_reqs], tokens behind the contexts that are no drafts: blocks begin with them, and
                the rule does not see them. None for blocks of drafts alone.

        Returns:
            Blocks on the denoiser's device, and float [num_reqs, block_size, vocab], the distributions that the first
            step's picks were drawn from; None for the most probable tokens, and from `ScheduleLoop`.
        """
        seeds, starts = self._noise_of(seeds, starts)
        first, device = None, self.towers.denoiser.device
        if first_tokens is not None:
            first_tokens, commit_rule = moved(first_tokens, device), behind_first(commit_rule)
        elif self.first_token == "context":
            first = self._first_tokens(slots, seeds, starts)
            first_tokens = first[0]
        request = DenoisingRequest(
            context,
            seeds,
            starts,
            commit_rule,
            first_tokens=first_tokens,
            first_confidence=first[1] if first else None,
            num_wanted=num_wanted,
            same_noise=self.noise == "shared",
        )
        loop = self._loop(block_size, commit_rule)
        if self.picker.sampler.greedy or not isinstance(loop, HostLoop):
            return loop.denoise(request), None
        first_step = FirstStepProbs(self.picker)
        done, probs = loop.denoise(request, [first_step]), first_step.probs
        if first is not None:
            if probs is None:  # a block of one token, which the denoiser was not asked for
                return done, self.picker.probs(first[2])[:, None]
            probs[:, 0] = self.picker.probs(first[2])
        return done, probs

    def _noise_of(self, seeds: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds and positions of noise, on the denoiser's device."""
        device = self.towers.denoiser.device
        starts, seeds = moved(starts, device), moved(seeds, device)
        if self.noise == "private" and not self.picker.sampler.greedy:  # no two rounds of a request draw the same
            starts, seeds = starts * MOST_OFFSETS, seeds ^ PRIVATE_SEED
        return seeds, starts

    def _first_tokens(self, slots: Tensor, seeds: Tensor, starts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The context tower's next tokens, how probable they are, and the logits [num_reqs, vocab] behind them."""
        logits = self.last_logits[moved(slots, self.last_logits.device)]
        logits = moved(logits, seeds.device)
        return *self.picker.pick(logits, seeds, starts), logits

    def _loop(self, block_size: int, commit_rule: CommitRule) -> DenoisingLoop:
        """The loop that fills blocks by a rule: on CUDA nothing waits between steps that are known before."""
        passes, make = self.passes(block_size), self._make_loop
        on_cuda = passes.denoiser.device.type == "cuda"
        if on_cuda and isinstance(commit_rule, Schedule) and self.picker.sampler.greedy:
            make = ScheduleLoop
        return make(passes, self.picker)

    def passes(self, block_size: int) -> DenoiserPasses:
        """Passes of the denoiser over blocks of this size."""
        if block_size not in self._passes:
            self._passes[block_size] = DenoiserPasses(self.towers.denoiser, block_size, self.graphs)
        return self._passes[block_size]
