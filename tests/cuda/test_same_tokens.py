"""On emulated devices, with kernels in the interpreter, every way of using the model gives the tokens of a CPU."""

from functools import cache
from typing import Any

import pytest

from tests.cuda.paths import PATHS, placed
from tests.support.cuda import emulated_devices


@cache
def on_a_cpu(path: str) -> Any:
    return PATHS[path](placed())


SOME = ("mask_diffusion, sampled", "drafts, sampled", "drafts ahead")
OTHERS = [("cuda:0", "cuda:0"), ("cuda:0", "cpu"), ("cpu", "cuda:0")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "context_device", "denoiser_device"),
    [*((path, "cuda:0", "cuda:1") for path in PATHS), *((path, *devices) for devices in OTHERS for path in SOME)],
)
def test_tokens_are_those_of_a_cpu(path: str, context_device: str, denoiser_device: str) -> None:
    expected = on_a_cpu(path)
    with emulated_devices():
        assert PATHS[path](placed(context_device, denoiser_device)) == expected
