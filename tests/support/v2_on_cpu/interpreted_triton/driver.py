"""Driver of one CPU."""

from __future__ import annotations

from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase


class InterpretedDriver(DriverBase):  # type: ignore[misc]
    """Driver that launches nothing."""

    @classmethod
    def is_active(cls) -> bool:
        """There is always a CPU."""
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        """Type of a compiled launcher, of which there is none."""
        raise NotImplementedError("set TRITON_INTERPRET=1")

    def get_current_target(self) -> Any:
        """Target of compilations."""
        return GPUTarget("cpu", 0, 1)

    def get_active_torch_device(self) -> torch.device:
        """Device of all tensors."""
        return torch.device("cpu")

    def get_current_device(self) -> int:
        """The only one."""
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        """The only one."""
        return 0

    def get_benchmarker(self) -> Any:
        """Timer of kernels."""
        from triton.testing import do_bench

        return do_bench
