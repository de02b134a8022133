"""Time of a call by kernel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile


@dataclass(frozen=True)
class KernelTime:
    """A kernel of a device, or an operator of a CPU, in one call."""

    name: str
    num_calls: int
    seconds: float


def profiled(call: Callable[[], object], device: torch.device) -> list[KernelTime]:
    """Lists what a call spends its time with, the most first."""
    call()
    on_cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        call()
        if on_cuda:
            torch.cuda.synchronize(device)
    times = [
        KernelTime(one.key, one.count, (one.self_device_time_total if on_cuda else one.self_cpu_time_total) / 1e6)
        for one in found.key_averages()
        if one.device_type.name == device.type.upper()
    ]
    return sorted(times, key=lambda one: one.seconds, reverse=True)
