"""The protocol of denoising loops, which differ in who decides between steps."""

from __future__ import annotations

from typing import Protocol

from twotower_spec.generation.denoising.request import DenoisedBlocks, DenoisingRequest


class DenoisingLoop(Protocol):
    """Fills blocks of one size by repeated denoiser passes.

    `HostLoop` looks at the blocks after each step, so that rows leave when they are done and any rule decides.
    `ScheduleLoop` follows what a `Schedule` says before each step, and never waits for the device: neither the request
    nor the result asks for a host read.
    """

    @property
    def block_size(self) -> int:
        """Positions of a block."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes held between calls, on the denoiser's device; the tower's weights are not counted."""
        ...

    def denoise(self, request: DenoisingRequest) -> DenoisedBlocks:
        """Denoises one block per row.

        Raises:
            ArgumentError: the loop cannot follow the request's commit rule.
        """
        ...
