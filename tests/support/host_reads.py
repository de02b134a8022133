"""Host reads of tensors: what would make a host wait for its device, counted on a CPU."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

REPOSITORY = Path(__file__).parents[2]
# Values that Python sees, whatever operator computes them.
READING_METHODS = {
    "__bool__",
    "__int__",
    "__float__",
    "__index__",
    "__array__",
    "__contains__",
    "__iter__",
    "item",
    "tolist",
    "numpy",
    "cpu",
}
# Operators whose result has a shape, or is a number, that depends on values.
READING_OPERATORS = {
    "_local_scalar_dense",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "unique_consecutive",
    "equal",
    "is_nonzero",
    "bincount",
}
# PyTorch's way through experts on a CPU visits those that were chosen; kernels on a device visit blocks of a table.
CPU_ONLY = ("kernels/twotower_kernels/experts/op.py",)


class HostReads:
    """A context that lists where tensors are read by the host: `file:line method`, of this project's innermost line."""

    def __init__(self, but_in: Collection[str] = ()) -> None:
        """Leaves out what happens in functions of these names, which read copies that have landed on the host."""
        self.found: list[str] = []
        self._but_in = but_in
        self._modes = (_Methods(self._note), _Operators(self._note))

    def __enter__(self) -> HostReads:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, value, trace)

    def _note(self, name: str) -> None:
        frames = traceback.extract_stack()
        if any(frame.name in self._but_in for frame in frames):
            return
        for frame in reversed(frames):
            path = Path(frame.filename)
            if path == Path(__file__) or not path.is_relative_to(REPOSITORY) or ".venv" in path.parts:
                continue
            place = str(path.relative_to(REPOSITORY))
            if place not in CPU_ONLY:
                self.found.append(f"{place}:{frame.lineno} {name}")
            return


class _Methods(TorchFunctionMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if getattr(func, "__name__", "") in READING_METHODS:
            self._note(func.__name__)
        return func(*args, **(kwargs or {}))


class _Operators(TorchDispatchMode):
    def __init__(self, note: Callable[[str], None]) -> None:
        super().__init__()
        self._note = note

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        name = func._schema.name.partition("::")[2]
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]
        )
        if name in READING_OPERATORS or by_mask:
            self._note(f"{name} by a mask" if by_mask else name)
        return func(*args, **(kwargs or {}))
