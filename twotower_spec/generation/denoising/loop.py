"""The base of denoising loops, which differ in who decides between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

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
        modulation: of the denoiser's layers for every number of masked positions, [block_size + 1, num_layers, 3,
            hidden] on its device; all that is held between calls.
    """

    def __init__(
        self, denoiser: DenoiserTower, block_size: int, picker: TokenPicker, modulation: Tensor | None = None
    ) -> None:
        """Computes the time modulation once, unless another loop of this block size shares its own.

        Raises:
            ArgumentError: the block size is out of range.
        """
        check_integer("block_size", block_size, minimum=1)
        self.denoiser, self.block_size, self.picker = denoiser, block_size, picker
        with torch.inference_mode():
            self.modulation = (
                denoiser.time_conditioning.for_block_size(block_size) if modulation is None else modulation
            )

    @abstractmethod
    def denoise(self, request: DenoisingRequest) -> DenoisedBlocks:
        """Denoises one block per row.

        Raises:
            ArgumentError: the loop cannot follow the request's commit rule.
        """
