"""The context in which CUDA devices are there."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes

from tests.support.cuda.graphs import EmulatedEvent, EmulatedGraph, EmulatedStream, emulated_capture
from tests.support.cuda.specialisation import specialisation
from tests.support.cuda.tensors import Devices, EmulatedTensor
from tests.support.cuda.usage import Usage, our_line


@contextmanager
def emulated_devices(
    count: int = 2, *, most_values: float = float("inf"), runs_kernels: bool = True
) -> Iterator[Usage]:
    """Makes `cuda:0` to `cuda:count-1` available; tests that ask for it are skipped where no compiler is.

    Kernels run in Triton's interpreter. Operators run on the CPU. What mixes devices raises, as on CUDA.

    Args:
        count: devices.
        most_values: floating tensors of more elements have a shape, but no values.
        runs_kernels: False to count launches of kernels alone.

    Yields:
        What is noted of the devices.
    """
    from triton.runtime.interpreter import GridExecutor

    usage, guard = Usage(), _device_guard()
    guard.emulate_devices(count)
    devices = Devices.current = Devices(usage, most_values, runs_kernels)
    call = GridExecutor.__call__

    def launch(self: Any, *args: Any, **kwargs: Any) -> None:
        name = self.fn.__name__
        usage.kernels[name] += 1
        usage.specialisations.add(specialisation(self, args, kwargs))
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and x.device != torch.device("cuda", devices.device):
                raise RuntimeError(f"{name} was launched on cuda:{devices.device} with {x.device} at {our_line()}")
        given = [[x.inner if isinstance(x, EmulatedTensor) else x for x in args], kwargs]
        given[1] = {key: x.inner if isinstance(x, EmulatedTensor) else x for key, x in kwargs.items()}

        def run() -> None:
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                call(self, *given[0], **given[1])

        if runs_kernels:
            run()
        if devices.recorded is not None:
            devices.recorded.append(run if runs_kernels else lambda: None)

    def exchange(index: int) -> int:
        before = devices.device
        if index < 0:
            return -1
        devices.device = index
        return before

    def stream(device: Any = None) -> EmulatedStream:
        index = None if device is None else torch.device(device).index
        return EmulatedStream(torch.device("cuda", devices.device if index is None else index))

    emulated = {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: count,
        "current_device": lambda: devices.device,
        "_exchange_device": exchange,
        "_maybe_exchange_device": exchange,
        "set_device": lambda device: exchange(torch.device(device).index),
        "current_stream": stream,
        "synchronize": lambda device=None: devices.wait("synchronize"),
        "is_current_stream_capturing": lambda: devices.recorded is not None,
        "get_device_name": lambda device=None: "an emulated device",
        "get_device_capability": lambda device=None: (9, 0),
        "empty_cache": lambda: None,
        "mem_get_info": lambda device=None: (80 << 30, 80 << 30),
        "memory_reserved": lambda device=None: usage.held[torch.device(device or "cuda:0").index],
        "memory_allocated": lambda device=None: usage.held[torch.device(device or "cuda:0").index],
        "Event": EmulatedEvent,
        "Stream": EmulatedStream,
        "CUDAGraph": EmulatedGraph,
        "graph": emulated_capture,
        "stream": nullcontext,
        "device": _CurrentDevice,
        "graph_pool_handle": lambda: (0, 0),
    }
    grad = torch.no_grad
    with (
        patch.multiple(torch.cuda, **emulated),
        patch.object(GridExecutor, "__call__", launch),
        patch.object(torch, "Generator", _HostGenerator),
        # Inference tensors and wrappers do not mix.
        patch.object(torch.inference_mode, "__enter__", lambda self: grad.__enter__(_no_grad(self))),
        patch.object(torch.inference_mode, "__exit__", lambda self, *given: _no_grad(self).__exit__(*given)),
        patch.object(Tensor, "pin_memory", lambda self, device=None: devices.pin(self.clone())),
        _only_lift_on_the_host(),
        _Functions(devices),
        devices,
    ):
        try:
            yield usage
        finally:
            Devices.current = None
            guard.emulate_devices(0)


class _CurrentDevice(torch.cuda.device):
    """Makes a device current; the real one asks PyTorch for an index in a way that only CUDA answers."""

    def __init__(self, device: Any) -> None:
        self.idx, self.prev_idx = torch.device(device).index, -1


class _HostGenerator(torch.Generator):
    """A generator for any device, on the CPU: there operators draw."""

    def __new__(cls, device: Any = "cpu") -> _HostGenerator:
        return super().__new__(cls)


def _no_grad(mode: Any) -> Any:
    if not hasattr(mode, "_emulated"):
        mode._emulated = torch.no_grad()
    return mode._emulated


@contextmanager
def _only_lift_on_the_host() -> Iterator[None]:
    """Has `torch.tensor(..., device="cuda")` make its tensor on the host, and then copy it."""
    torch._C._set_only_lift_cpu_tensors(True)
    try:
        yield
    finally:
        torch._C._set_only_lift_cpu_tensors(False)


class _Functions(TorchFunctionMode):
    """Resolves "cuda" to the current device, and remembers what is allocated in pinned memory."""

    def __init__(self, devices: Devices) -> None:
        super().__init__()
        self._devices = devices

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.device:
            return func(*args, **kwargs)
        if isinstance(device := kwargs.get("device"), (str, torch.device)):
            kwargs["device"] = self._resolved(device)
        pins = kwargs.pop("pin_memory", False)
        args = tuple(self._resolved(x) if isinstance(x, (str, torch.device)) and str(x) == "cuda" else x for x in args)
        made = func(*args, **kwargs)
        return self._devices.pin(made) if pins else made

    def _resolved(self, device: str | torch.device) -> torch.device:
        found = torch.device(device)
        return torch.device("cuda", self._devices.device) if str(found) == "cuda" else found


@cache
def _device_guard() -> Any:
    """The compiled guard, loaded into this process for good; without emulated devices it says that there are none."""
    source = Path(__file__).with_name("device_guard.cpp")
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        pytest.skip("needs a C++ compiler")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "device_guard" + sysconfig.get_config_var("SHLIB_SUFFIX"))
        there = Path(torch.__file__).parent
        command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++20", f"-I{there / 'include'}", str(source)]
        command += ["-o", str(library), f"-L{there / 'lib'}", "-lc10"]
        subprocess.run(command, check=True, capture_output=True)
        return ctypes.CDLL(str(library))
