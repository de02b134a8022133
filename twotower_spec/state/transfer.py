"""Transfers between host and device that wait for nothing, and moments on a device's clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(
    values: npt.NDArray[Any] | Sequence[Any], device: torch.device, dtype: torch.dtype | None = None
) -> Tensor:
    """Copies numbers to a device; on CUDA by way of pinned memory, without waiting for the stream.

    Args:
        values: an array, or a list, nested for more dimensions.
        device: where the tensor is wanted.
        dtype: of the tensor; None for that of the values.
    """
    return moved(torch.as_tensor(values, dtype=dtype), device)


def moved(x: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """Gives a tensor on another device, without waiting unless the host is going to read it there.

    PyTorch copies from CUDA into pinned memory, and returns before the values are there, where it is told not to wait.
    """
    if device.type == "cuda" and not x.is_cuda:
        x = x.pin_memory()
    return x.to(device, dtype, non_blocking=device.type == "cuda")


class HostCopy:
    """Copies of tensors, on their way to the host since they were asked for."""

    def __init__(self, *tensors: Tensor) -> None:
        """Begins to copy; what the tensors hold afterwards is not seen.

        Args:
            tensors: on one device.
        """
        self._copies = [_copied(tensor) for tensor in tensors]
        self._done = Moment(tensors[0].device)

    @property
    def landed(self) -> bool:
        """Whether reading waits for nothing."""
        return self._done.passed

    def read(self) -> list[Tensor]:
        """The copies, on the host; waits until they are there."""
        if not self.landed:
            self._done.wait()
        return self._copies


def _copied(tensor: Tensor) -> Tensor:
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Moment:
    """The moment when a device has done all that it was told so far; on a CPU now."""

    def __init__(self, device: torch.device) -> None:
        """Marks the device's current stream."""
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record(torch.cuda.current_stream(device))
        self._time = time.perf_counter()

    @property
    def passed(self) -> bool:
        """Whether it lies behind."""
        return self._event is None or self._event.query()

    def wait(self) -> None:
        """Returns when it lies behind."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_until(self, later: Moment) -> float:
        """Seconds from here to another moment of the same device, which lies behind."""
        if self._event is None or later._event is None:
            return later._time - self._time
        return float(self._event.elapsed_time(later._event)) / 1e3
