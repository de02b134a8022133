"""Every kernel is compiled for the GPUs that count, with the settings that dispatch uses; spills fail."""

import subprocess
import sys

import pytest

from twotower_kernels.compilation import OPS


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS)
def test_kernels_compile_for_every_gpu_without_spills(op: str, capfd: pytest.CaptureFixture[str]) -> None:
    # In a process of its own: in this one @triton.jit makes functions of the interpreter.
    done = subprocess.run(
        [sys.executable, "-m", "twotower_kernels.compilation", op], capture_output=True, text=True, check=False
    )
    with capfd.disabled():
        sys.stdout.write(f"\n{done.stdout}")
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) > 3
