"""Triton's interpreter, so that kernels run on a CPU inside this process."""

import os
from importlib.util import find_spec
from typing import Any

import numpy as np


def interpret_kernels() -> None:
    """Makes `@triton.jit` functions that are defined from now on run in the interpreter, in this process only.

    Triton's own library functions are defined when it is imported, so this must come first.
    """
    if find_spec("triton") is None:
        return
    os.environ["TRITON_INTERPRET"] = "1"
    try:
        import triton
        import triton.language
    finally:
        del os.environ["TRITON_INTERPRET"]
    triton.knobs.propagate_env = False  # otherwise the next line would set the variable again
    triton.knobs.runtime.interpret = True
    _compute_bfloat16_as_devices_do()


def _compute_bfloat16_as_devices_do() -> None:
    """Mends bfloat16 in Triton 3.9's interpreter, which truncates where a device rounds, and multiplies as integers."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder = interpreter.InterpreterBuilder
    convert, dot, cast = interpreter._convert_float, builder.create_dot, builder.cast_impl

    def to_nearest(x: np.ndarray, source: Any, target: Any, mode: Any) -> np.ndarray:
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(x, source, target, mode)
        bits = x.view(np.uint32)
        nearest = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(x), 0x7FC0, nearest).astype(np.uint16)

    def widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    interpreter._convert_float = to_nearest
    builder.create_dot = lambda self, a, b, *others: dot(self, widened(a), widened(b), *others)
    builder.cast_impl = lambda self, source, to: cast(self, widened(source), to)
