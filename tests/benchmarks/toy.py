"""Made-up op with cases that succeed or fail, and a clock without a device."""

import os
from collections.abc import Callable

import torch

from benchmarks.clock import Timing
from benchmarks.harness import OURS, Case, Systems
from twotower_kernels.tuning import settings

COMPOSITION = "torch composition"


class FakeClock:
    """Clock that takes the number a call returns for its time in milliseconds; negative ones cannot be captured."""

    def time(self, call: Callable[[], object]) -> Timing:
        result = call()
        ms = abs(result) if isinstance(result, float) else 1.0
        return Timing(ms, 0.9 * ms, 1.1 * ms)

    def capture(self, call: Callable[[], object]) -> Callable[[], object]:
        result = call()
        if not isinstance(result, float):
            return call
        if result < 0:
            raise RuntimeError("operation not permitted when stream is capturing\nand more lines")
        return lambda: result / 2

    def extra_bytes(self, call: Callable[[], object]) -> int:
        return 1 << 20


def cases(device: torch.device) -> list[Case]:
    def disagree() -> Systems:
        raise AssertionError("Tensor-likes are not close!\n\nMismatched elements: 1 / 3")

    def end_process() -> Systems:
        os._exit(3)

    def tuned() -> Systems:
        chosen = settings("toy", "toy_kernel")
        assert chosen["BLOCK"] != 4, "a block of 4 computes nonsense"
        return {OURS: lambda: float(settings("toy", "toy_kernel")["BLOCK"])}

    return [
        Case("toy", "", "good", 3_000_000, lambda: {OURS: lambda: 0.5, COMPOSITION: lambda: 1.5}),
        Case("toy", "", "systems disagree", 1000, disagree),
        Case("toy", "", "ends its process", 1000, end_process),
        Case("toy", "", "no graph", 1000, lambda: {OURS: lambda: -2.0, COMPOSITION: lambda: 4.0}),
        Case("toy", "", "rival fails", 1000, lambda: {OURS: lambda: 1.0, COMPOSITION: lambda: 1 / 0}),
        Case("toy", "toy_kernel", "tuned", 1000, tuned),
    ]
