"""The denoising loop of fixed shapes: a schedule says before each step what it commits, and the host reads nothing."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from twotower_kernels.unmasking import Unmasked
from twotower_spec.errors import ArgumentError
from twotower_spec.generation.denoising.commit_rules import DenoisingStep, Schedule, unmask_by
from twotower_spec.generation.denoising.loop import DenoisingLoop
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest, fresh_blocks
from twotower_spec.state.transfer import HostCopy


class ScheduleLoop(DenoisingLoop):
    """Fills masked blocks with as many steps as the schedule has; all rows stay until the last one.

    Blocks are those of `HostLoop`. A row that is done early takes part without effect. The loop ends when word has come
    from the device that all rows are done, which is a step or two later than it could.
    """

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
        rows = list(range(len(token_ids)))
        first = 0 if request.first_tokens is None else 1
        wanted = self.block_size if request.num_wanted is None else request.num_wanted
        words: list[HostCopy] = []
        for index in range(self.block_size if first < wanted else 0):
            masked = token_ids == self.picker.mask_token_id
            masked[:, :first] = False  # a first token that is the mask token itself
            num_masked = masked.sum(-1) if index else self.block_size - first  # at first the host knows
            if wanted < self.block_size:
                masked[:, wanted:] = False
            is_open = masked.any(-1)
            step = DenoisingStep(index, rows, masked, confidence)
            if index:
                words.append(HostCopy(is_open.any()))
                if _all_done(words):
                    break
            positions = None if index else self._first_positions(len(token_ids), first, wanted)
            done = self._step(request, step, token_ids, num_masked, positions)
            num_passes += is_open
            token_ids, confidence = done.token_ids, done.confidence
            if rule.finishes(index, self.block_size):
                break
        return DenoisedBlocks(token_ids, confidence, num_passes)

    def _step(
        self,
        request: DenoisingRequest,
        step: DenoisingStep,
        token_ids: Tensor,
        num_masked: int | Tensor,
        positions: Tensor | None,
    ) -> Unmasked:
        """Blocks after one denoiser pass; its logits are gone before the next one."""
        logits = self.passes(token_ids, request.context, num_masked, positions)
        draw = 0 if request.same_noise else step.index
        noise = self.picker.noise(logits, request.seeds, request.first_positions, draw)
        return unmask_by(request.commit_rule, step, token_ids, logits, positions, self.picker, noise)

    def _first_positions(self, num_reqs: int, first: int, wanted: int) -> Tensor:
        """Flat indices of the masked positions of fresh blocks."""
        flat = torch.arange(num_reqs * self.block_size, device=self.denoiser.device)
        return flat.view(num_reqs, self.block_size)[:, first:wanted].flatten()


def _all_done(words: Sequence[HostCopy]) -> bool:
    """Whether one of those that have come says that no row was open."""
    return any(word.landed and not word.read()[0] for word in words)
