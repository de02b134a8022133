"""The denoising loop of fixed shapes: a schedule says before each step what it commits, and the host reads nothing."""

from __future__ import annotations

import torch
from torch import Tensor

from twotower_kernels.unmasking import unmask
from twotower_spec.config import check_integer
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising.commit_rules import Schedule
from twotower_spec.generation.denoising.picking import TokenPicker
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest, fresh_blocks
from twotower_spec.towers import DenoiserTower


class ScheduleLoop:
    """Fills masked blocks with as many steps as the schedule has; all rows stay until the last one.

    Blocks are those of `HostLoop`. A row that is done early takes part without effect, so that a schedule that mostly
    ends early costs more here than there.

    Attributes:
        block_size: positions of a block.
        picker: how tokens are picked.
    """

    def __init__(self, denoiser: DenoiserTower, block_size: int, picker: TokenPicker) -> None:
        """Computes the time modulation for every number of masked positions once.

        Raises:
            ArgumentError: the block size is out of range.
        """
        check_integer("block_size", block_size, minimum=1)
        self.denoiser, self.block_size, self.picker = denoiser, block_size, picker
        with torch.inference_mode():
            self._modulation = denoiser.time_conditioning.for_block_size(block_size)

    @property
    def nbytes(self) -> int:
        """See `DenoisingLoop.nbytes`."""
        return self._modulation.nbytes

    @torch.inference_mode()
    def denoise(self, request: DenoisingRequest) -> DenoisedBlocks:
        """Denoises one block per row.

        Raises:
            ArgumentError: the commit rule is no schedule.
        """
        rule = request.commit_rule
        if not isinstance(rule, Schedule):
            raise ArgumentError(f"commit rule {type(rule).__name__} wants to see every step; give a schedule")
        token_ids, confidence = fresh_blocks(self.denoiser, request, self.block_size, self.picker.mask_token_id)
        num_passes = torch.zeros(len(token_ids), dtype=torch.int64, device=token_ids.device)
        first = 0 if request.first_tokens is None else 1
        wanted = self.block_size if request.num_wanted is None else request.num_wanted
        for index in range(self.block_size if first < wanted else 0):
            left = max(rule.remaining_steps(index, self.block_size), 1)
            masked = token_ids == self.picker.mask_token_id
            masked[:, :first] = False  # a first token that is the mask token itself
            num_masked = masked.sum(-1)
            masked[:, wanted:] = False
            num_passes += masked.any(-1)
            if index:
                positions, modulation = None, self._modulation[num_masked]
            else:  # every row is masked alike, which the host knows
                positions = self._first_positions(len(token_ids), first, wanted)
                modulation = self._modulation[self.block_size - first :][:1]
            logits = self.denoiser(token_ids, request.context, modulation, positions, wide_logits=False)
            draw = 0 if request.same_noise else index
            noise = self.picker.noise(logits, request.seeds, request.first_positions, draw)
            done = unmask(
                logits,
                positions,
                token_ids,
                masked,
                confidence,
                self.picker.mask_token_id,
                rule.confidence_threshold,
                left,
                self.picker.num_token_ids,
                noise,
            )
            token_ids, confidence = done.token_ids, done.confidence
            if left == 1:
                break
        return DenoisedBlocks(token_ids, confidence, num_passes)

    def _first_positions(self, num_reqs: int, first: int, wanted: int) -> Tensor:
        """Flat indices of the masked positions of fresh blocks."""
        device = self.denoiser.device
        starts = torch.arange(0, num_reqs * self.block_size, self.block_size, device=device)
        return (starts[:, None] + torch.arange(first, wanted, device=device)).flatten()
