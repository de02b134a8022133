"""Whether this machine measures what it is to measure: `python3 -m twotower_bench.gpu.sanity DEVICE FILE`.

The device is really a GPU, and our kernels really run on it. `cpu` is for a trial of the other parts without a GPU, and
is called that.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

# What the core and the tests import, and the kernels' tables.
PACKAGES = ("torch", "triton", "numpy", "safetensors", "huggingface_hub", "transformers", "rich", "typer", "pytest")
# Variables by which kernels would not run on the device, and the value that lets them.
SWITCHES = {"TRITON_INTERPRET": "0", "TWOTOWER_KERNELS": "auto"}


class NotSane(Exception):
    """Nothing that is measured here would be what it is called; the text says why."""


def check_packages(names: Sequence[str] = PACKAGES) -> None:
    """Looks for packages.

    Raises:
        NotSane: some are missing.
    """
    missing = [name for name in names if find_spec(name) is None]
    if missing:
        raise NotSane(f"{', '.join(missing)} cannot be imported by {sys.executable}; put it on PYTHONPATH")


def check_variables(environment: Mapping[str, str]) -> None:
    """Looks at the variables that keep kernels from the device.

    Raises:
        NotSane: one does.
    """
    for name, harmless in SWITCHES.items():
        value = environment.get(name) or harmless
        if value != harmless:
            raise NotSane(f"{name} is {value!r}, with which our kernels do not run on the device; unset it")


def check_device(name: str) -> None:
    """Looks at the device, and runs a kernel of ours there.

    Raises:
        NotSane: it is no GPU, or the kernel did not run on it, or gave something else than on a CPU.
    """
    import torch

    device = torch.device(name)
    if device.type != "cuda":
        raise NotSane(f"device {name} is no GPU; give cuda or cuda:N, or cpu for a trial")
    if not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        raise NotSane(
            f"{name} is not there: torch {torch.__version__}, built for CUDA {torch.version.cuda}, sees "
            f"{torch.cuda.device_count()} devices; look at nvidia-smi and LD_LIBRARY_PATH"
        )
    import triton

    from twotower_kernels.backend import use_triton
    from twotower_kernels.noise import gumbel_argmax
    from twotower_kernels.noise.kernel import gumbel_argmax_kernel

    if not isinstance(gumbel_argmax_kernel, triton.JITFunction):
        raise NotSane("Triton's functions are interpreted on the host, not compiled; unset TRITON_INTERPRET")
    scores = torch.randn(3, 5000, generator=torch.Generator().manual_seed(0))
    numbers = torch.arange(3)
    on_device = scores.to(device)
    if not use_triton(on_device):
        raise NotSane(f"our ops run PyTorch on {name} instead of their kernels; see TWOTOWER_KERNELS")
    found = gumbel_argmax(on_device, numbers.to(device), numbers.to(device)).cpu()
    expected = gumbel_argmax(scores, numbers, numbers)
    if not torch.equal(found, expected):
        raise NotSane(f"a kernel of ours drew {found.tolist()} on {name}, and {expected.tolist()} on the CPU")


def main(name: str, file: str) -> int:
    """Checks a device and describes it; the exit code is 1 where it is not sane."""
    from twotower_bench.gpu.rows import RowFile

    rows = RowFile(Path(file))
    try:
        check_packages()
        if name == "cpu":
            print("A trial on the CPU: no figure says anything about a GPU.", flush=True)
        else:
            check_variables(os.environ)
            check_device(name)
    except NotSane as error:
        rows.add(f"stopped: {error}", sane=False, reason=str(error))
        return 1
    import torch

    from twotower_bench.gpu.machine import driver_version
    from twotower_bench.towers.clock import DeviceClock
    from twotower_spec.machine import machine_info

    device = torch.device(name)
    info = machine_info() | {"driver": driver_version(), "triton": version("triton"), "cuda": torch.version.cuda}
    info["commit"] = info["commit"] or os.environ.get("COMMIT")
    speed = DeviceClock.of(device).bytes_per_s
    gpu = f"{info['gpu']}, driver {info['driver']}, CUDA {info['cuda']}" if device.type == "cuda" else "no GPU"
    rows.add(
        f"{gpu}; torch {info['torch']}, triton {info['triton']}, transformers {info['transformers']}; a copy moves "
        f"{speed / 1e9:.0f} GB/s, read and written; commit {info['commit']}",
        sane=True,
        device=name,
        copy_bytes_per_s=speed,
        **info,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
