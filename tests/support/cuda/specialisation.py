"""What Triton compiles a kernel anew for: constants, dtypes, and what is known of integers and addresses."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

INT32_MAX = (1 << 31) - 1


def specialisation(grid: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    """Names the compiled kernel that a launch needs; launches of equal names share one.

    Args:
        grid: the launcher of Triton's interpreter.
        args, kwargs: of the launch.
    """
    given = {**dict(zip(grid.arg_names, args, strict=False)), **kwargs}
    left_alone = _unspecialised(grid.fn)
    known = (
        (name, value if name in grid.constexprs or name not in grid.arg_names else _known_of(value, name in left_alone))
        for name, value in given.items()
    )
    return grid.fn.__name__, *known


def _unspecialised(kernel: Any) -> list[str]:
    """Arguments of which the compiler is told nothing."""
    function = getattr(sys.modules[kernel.__module__], kernel.__name__)
    names: list[str] = function.kwargs.get("do_not_specialize") or []
    return names


def _known_of(value: Any, is_left_alone: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, value.data_ptr() % 16 == 0
    if value is None or isinstance(value, (bool, float)):
        return type(value).__name__
    width = "i32" if value <= INT32_MAX else "i64"
    if is_left_alone:
        return width
    return 1 if value == 1 else (width, value % 16 == 0)
