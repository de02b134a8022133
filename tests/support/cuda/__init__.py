"""CUDA without CUDA: devices emulated on a CPU, which note what a real one would feel."""

from tests.support.cuda.devices import emulated_devices
from tests.support.cuda.usage import Usage

__all__ = ["Usage", "emulated_devices"]
