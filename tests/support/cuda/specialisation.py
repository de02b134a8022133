"""Properties that Triton compiles a kernel anew for: constants, dtypes, and what is known of integers and addresses."""

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
    options = getattr(sys.modules[grid.fn.__module__], grid.fn.__name__).kwargs
    unknown = {*(options.get("do_not_specialize") or ()), *(options.get("do_not_specialize_on_alignment") or ())}
    known = (
        (name, value if name in grid.constexprs or name not in grid.arg_names else _known_of(value, name in unknown))
        for name, value in given.items()
    )
    return grid.fn.__name__, *known


def _known_of(value: Any, is_left_alone: bool) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, not is_left_alone and value.data_ptr() % 16 == 0
    if value is None or isinstance(value, (bool, float)):
        return type(value).__name__
    width = "i32" if value <= INT32_MAX else "i64"
    if is_left_alone:
        return width
    return 1 if value == 1 else (width, value % 16 == 0)
