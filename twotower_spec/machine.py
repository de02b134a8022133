"""Description of the machine that a figure was measured on: hardware, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path

import torch
import transformers


def machine_info() -> dict[str, str | int | None]:
    """Processor, cores, threads, GPU, versions and commit, each as text or number."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
    }


def describe_machine() -> str:
    """Describes the machine in one line."""
    info = machine_info()
    hardware = f"{info['processor']}, {info['cores']} cores, {info['threads']} threads" + (
        f", {info['gpu']}" if info["gpu"] else ", no GPU"
    )
    return f"{hardware}; Python {info['python']}, torch {info['torch']}, transformers {info['transformers']}"


def commit() -> str | None:
    """Commit of this code, with `-dirty` where files differ from it; None outside a git checkout."""
    root = Path(__file__).parents[1]
    if not (root / ".git").exists():
        return None
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        out = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return out.stdout.strip() or None


def _processor() -> str:
    """Processor's model name as Linux gives it, or else as Python does."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
