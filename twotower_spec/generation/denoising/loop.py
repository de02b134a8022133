"""The base of denoising loops, which differ in who decides between steps."""

from __future__ import annotations

from abc import ABC, abstractmethod

from twotower_spec.generation.denoising.passes import DenoiserPasses
from twotower_spec.generation.denoising.picking import TokenPicker
from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest
from twotower_spec.towers import DenoiserTower


class DenoisingLoop(ABC):
    """Fills blocks of one size by repeated denoiser passes.

    `HostLoop` looks at the blocks after each step, so that rows leave when they are done and any rule decides.
    `ScheduleLoop` follows what a `Schedule` says before each step, and never waits for the device: neither the request
    nor the result asks for a host read.

    Attributes:
        passes: of the denoiser, over blocks of the loop's size.
        picker: how tokens are picked.
    """

    def __init__(self, passes: DenoiserPasses, picker: TokenPicker) -> None:
        """Looks after nothing of its own."""
        self.passes, self.picker = passes, picker

    @property
    def denoiser(self) -> DenoiserTower:
        """The tower."""
        return self.passes.denoiser

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        return self.passes.block_size

    @abstractmethod
    def denoise(self, request: DenoisingRequest) -> DenoisedBlocks:
        """Denoises one block per row.

        Raises:
            ArgumentError: the loop cannot follow the request's commit rule.
        """
