"""The base of denoising loops, which differ in who decides between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch

from twotower_spec.config import check_integer
from twotower_spec.generation.denoising.picking import TokenPicker
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest
from twotower_spec.towers import DenoiserTower


class DenoisingLoop(ABC):
    """Fills blocks of one size by repeated denoiser passes.

    `HostLoop` looks at the blocks after each step, so that rows leave when they are done and any rule decides.
    `ScheduleLoop` follows what a `Schedule` says before each step, and never waits for the device: neither the request
    nor the result asks for a host read.

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
        """Bytes held between calls, on the denoiser's device; the tower's weights are not counted."""
        return self._modulation.nbytes

    @abstractmethod
    def denoise(self, request: DenoisingRequest) -> DenoisedBlocks:
        """Denoises one block per row.

        Raises:
            ArgumentError: the loop cannot follow the request's commit rule.
        """
