"""The denoising loop that the host drives: it reads counts between steps, rows leave, and any rule decides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from twotower_spec.config import accumulation_dtype
from twotower_spec.generation.denoising.commit_rules import DenoisingStep, unmask_by
from twotower_spec.generation.denoising.loop import DenoisingLoop
from twotower_spec.generation.denoising.observers import ObservedStep, StepObserver
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest, fresh_blocks
from twotower_spec.state.transfer import to_device


class HostLoop(DenoisingLoop):
    """Fills masked blocks step by step; rows have their own time and leave when they are done."""

    @torch.inference_mode()
    def denoise(self, request: DenoisingRequest, observers: Sequence[StepObserver] = ()) -> DenoisedBlocks:
        """Denoises one block per row.

        Args:
            request: the rows, and the rule that decides what each step commits.
            observers: are shown the fresh blocks and every step.
        """
        blocks = fresh_blocks(self.denoiser, request, self.block_size, self.picker.mask_token_id)
        rows = _ActiveRows(request, *blocks)
        for observer in observers:
            observer.begin(rows.token_ids)
        whole = any(observer.wants_all_logits for observer in observers)
        for index in range(self.block_size):
            masked = rows.find_masked(self.picker.mask_token_id, is_first=not index)
            if not any(masked.num_open):
                break
            if not all(masked.num_open) and not whole:
                masked = rows.keep_open(masked)
            step = self._step(index, rows, masked, whole)
            rows.take(step)
            for observer in observers:
                observer.observe(step)
            if request.commit_rule.finishes(index, self.block_size):
                break
        return rows.results()

    def _step(self, index: int, rows: _ActiveRows, masked: _Masked, whole: bool) -> ObservedStep:
        """One denoiser pass over the rows, and what the rule commits of it; the rows are left as they are."""
        request, all_logits = rows.request, None
        positions = torch.nonzero_static(masked.open.flatten(), size=sum(masked.num_open))[:, 0]
        if whole:
            all_logits = self.passes(rows.token_ids, rows.context, masked.num_masked, None)
            all_logits = all_logits.to(accumulation_dtype(self.denoiser.dtype))
            logits = all_logits[positions]
        else:
            logits = self.passes(rows.token_ids, rows.context, masked.num_masked, positions)
        draw = 0 if request.same_noise else index
        noise = self.picker.noise(logits, rows.seeds, rows.first_positions, draw)
        step = DenoisingStep(index, rows.indices, masked.open, rows.confidence)
        done = unmask_by(request.commit_rule, step, rows.token_ids, logits, positions, self.picker, noise)
        return ObservedStep(
            index=index,
            rows=rows.indices,
            num_masked=masked.num_masked,
            num_open=masked.num_open,
            before=rows.token_ids,
            token_ids=done.token_ids,
            commits=done.commits,
            confidence=done.confidence,
            positions=positions,
            logits=logits,
            all_logits=all_logits,
        )


@dataclass(frozen=True)
class _Masked:
    """Masked positions of the active rows.

    Attributes:
        open: bool [num_active, block_size], those that are to be filled.
        num_open: how many these are, per row.
        num_masked: masked positions per row, those that nobody wants included.
    """

    open: Tensor
    num_open: list[int]
    num_masked: list[int]


class _ActiveRows:
    """The blocks that are still in the loop, and the results of all.

    Attributes:
        request: what the loop was asked for.
        indices: rows of the request that are in the loop.
        token_ids, confidence: their blocks.
        context, seeds, first_positions: their part of the request.
    """

    def __init__(self, request: DenoisingRequest, token_ids: Tensor, confidence: Tensor) -> None:
        """Begins with fresh blocks of all rows."""
        self.request = request
        self.indices = list(range(len(request.seeds)))
        self.token_ids, self.confidence = token_ids, confidence
        self.context, self.seeds, self.first_positions = request.context, request.seeds, request.first_positions
        self._all_token_ids, self._all_confidence = token_ids, confidence
        self._num_passes = [0] * len(request.seeds)

    def find_masked(self, mask_token_id: int, is_first: bool) -> _Masked:
        """Finds where blocks are masked; the host reads how often, but for the first time, when it knows."""
        request, masked = self.request, self.token_ids == mask_token_id
        first = 0 if request.first_tokens is None else 1
        masked[:, :first] = False  # a first token that is the mask token itself
        num_masked = masked.sum(-1)
        if request.num_wanted is not None:
            masked[:, request.num_wanted :] = False
        if is_first:
            num_rows, size = masked.shape
            wanted = size if request.num_wanted is None else request.num_wanted
            return _Masked(masked, [max(0, wanted - first)] * num_rows, [size - first] * num_rows)
        counts: list[list[int]] = torch.stack([masked.sum(-1), num_masked]).tolist()
        return _Masked(masked, *counts)

    def keep_open(self, masked: _Masked) -> _Masked:
        """Lets rows without open positions leave; gives the masked positions of those that stay."""
        kept = [i for i, count in enumerate(masked.num_open) if count]
        self.indices = [self.indices[i] for i in kept]
        self.context, index = self.context.select(kept), to_device(kept, self.token_ids.device)
        self.token_ids, self.confidence = self.token_ids[index], self.confidence[index]
        self.seeds, self.first_positions = self.seeds[index], self.first_positions[index]
        num_open, num_masked = ([counts[i] for i in kept] for counts in (masked.num_open, masked.num_masked))
        return _Masked(masked.open[index], num_open, num_masked)

    def take(self, step: ObservedStep) -> None:
        """Takes the blocks of a step over, and counts its pass for the rows that it could change."""
        self.token_ids, self.confidence = step.token_ids, step.confidence
        for row, count in zip(self.indices, step.num_open, strict=True):
            self._num_passes[row] += count > 0
        if len(self.indices) == len(self._num_passes):
            self._all_token_ids, self._all_confidence = step.token_ids, step.confidence
        else:
            index = to_device(self.indices, step.token_ids.device)
            self._all_token_ids[index], self._all_confidence[index] = step.token_ids, step.confidence

    def results(self) -> DenoisedBlocks:
        """Blocks of all rows."""
        return DenoisedBlocks(self._all_token_ids, self._all_confidence, torch.tensor(self._num_passes))
