"""Environment: versions, builds that do not go together, threads, and which kernels run."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Iterator
from functools import partial
from importlib.metadata import PackageNotFoundError, distributions, requires, version
from importlib.util import find_spec
from pathlib import Path

import torch
from packaging.requirements import Requirement

from twotower_kernels.backend import SWITCH, check_switch, use_triton
from twotower_spec.diagnosis.case import Case
from twotower_spec.diagnosis.finding import Finding

DISTRIBUTION = "twotower-spec"
# Packages that need not be installed, and the extra whose bounds count where they are; vLLM is its plugin's affair.
OPTIONAL = {"triton": "gpu"}
# What an NVIDIA driver leaves on Linux.
DRIVER = Path("/proc/driver/nvidia/version")

note = partial(Finding, "environment")


def examine(case: Case) -> Iterator[Finding]:
    """Looks at what is installed and set."""
    yield from _versions()
    yield from _builds()
    devices = {torch.device(device).type for device in case.devices}
    if "cpu" in devices:
        yield _threads()
    for device in sorted(set(case.devices)):
        yield _kernels(torch.device(device))


def _versions() -> Iterator[Finding]:
    try:
        requirements = [Requirement(text) for text in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:
        yield note("versions", "skipped", f"{DISTRIBUTION} is not installed, so nothing says which versions it needs")
        return
    found = [f"Python {platform.python_version()}"]
    for one in requirements:
        extra = OPTIONAL.get(one.name, "")
        if one.marker is not None and not one.marker.evaluate({"extra": extra}):
            continue
        try:
            installed = version(one.name)
        except PackageNotFoundError:
            if one.name not in OPTIONAL:
                yield note(one.name, "fault", f"{one.name} is not installed", f"pip install '{_bare(one)}'")
            continue
        if one.name in ("torch", "transformers", "numpy", *OPTIONAL):
            found.append(f"{one.name} {installed}")
        if not one.specifier.contains(installed, prereleases=True):
            detail = f"{one.name} {installed} is installed, {one.specifier} is needed"
            yield note(one.name, "fault", detail, f"pip install '{_bare(one)}'")
    yield note("versions", "ok", ", ".join(dict.fromkeys(found)))


def _bare(requirement: Requirement) -> str:
    return f"{requirement.name}{requirement.specifier}"


def _builds() -> Iterator[Finding]:
    """Builds of PyTorch and of CUDA's libraries that do not go together."""
    majors: dict[str, set[str]] = {}
    for one in distributions():
        if named := re.fullmatch(r"(nvidia-.+)-cu(\d+)", one.name or ""):
            majors.setdefault(named[1], set()).add(named[2])
    twice = sorted(f"{name}-cu{{{','.join(sorted(both))}}}" for name, both in majors.items() if len(both) > 1)
    if twice:
        yield note(
            "CUDA libraries",
            "warning",
            f"{', '.join(twice)} are installed for two CUDA versions, whose files overwrite each other",
            f"uninstall those of the version that torch {torch.__version__} is not for, and reinstall the others",
        )
    if DRIVER.exists() and not torch.cuda.is_available():
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        detail = f"there is an NVIDIA driver, and torch {torch.__version__}, {build}, cannot use it"
        yield note("CUDA", "warning", detail, "install a torch that is built for this driver's CUDA version")


def _threads() -> Finding:
    value = os.environ.get("OMP_NUM_THREADS")
    detail = f"OMP_NUM_THREADS={value or ''}, {torch.get_num_threads()} threads; a small model is slower with many"
    remedy = "OMP_NUM_THREADS=1 for small models, the number of physical cores for large ones"
    return note("threads", "warning", detail, remedy).unless(bool(value))


def _kernels(device: torch.device) -> Finding:
    looked_at, on_cuda = f"kernels on {device}", device.type == "cuda"
    try:
        check_switch()
    except ValueError as error:
        return note(looked_at, "fault" if on_cuda else "warning", str(error), f"unset {SWITCH}")
    if not on_cuda:
        return note(looked_at, "ok", "PyTorch computes; Triton kernels are for CUDA")
    runs = use_triton(torch.empty(0, device=device))
    capability = ".".join(map(str, torch.cuda.get_device_capability(device)))
    name = f"{torch.cuda.get_device_name(device)}, compute capability {capability}"
    if runs:
        return note(looked_at, "ok", f"Triton kernels on {name}")
    if find_spec("triton") is None:
        return note(looked_at, "warning", f"PyTorch computes on {name}: no Triton", "pip install 'triton>=3.4'")
    return note(looked_at, "warning", f"PyTorch computes on {name}: {SWITCH} switches kernels off", f"unset {SWITCH}")
