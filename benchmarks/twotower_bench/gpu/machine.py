"""Driver of the GPU."""

from __future__ import annotations

import shutil
import subprocess


def driver_version() -> str | None:
    """Version of the NVIDIA driver, if `nvidia-smi` is there to say it."""
    if not shutil.which("nvidia-smi"):
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    return done.stdout.strip().partition("\n")[0] or None
