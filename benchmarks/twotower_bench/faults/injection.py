"""Faults that are put into a running engine: what is called at a stage of a round fails in one of several ways."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

import torch

# A stage of a real engine, a method there, and its arguments: does the work of a call that fails.
Effect = Callable[..., Any]


class Injection:
    """Says which calls of a stage fail, and counts those that did.

    Attributes:
        num_fired: calls that failed.
        hang_s: seconds of a call that hangs.
    """

    def __init__(self, hang_s: float) -> None:
        """Lets all calls pass at first."""
        self.num_fired, self.hang_s = 0, hang_s
        self._every, self._most, self._num_calls = 0, 0, 0

    def begin(self, every: int, most: int) -> None:
        """Lets one of so many calls fail from now on, the next one first, and so many of them at most."""
        self._every, self._most, self._num_calls = every, most, 0

    def end(self) -> None:
        """Lets all calls pass again."""
        self._every = 0

    @property
    def is_active(self) -> bool:
        """Whether calls may fail now."""
        return self._every > 0 and self._most > 0

    def fires(self) -> bool:
        """Whether this call fails."""
        if not self.is_active:
            return False
        self._num_calls += 1
        if (self._num_calls - 1) % self._every:
            return False
        self._most -= 1
        self.num_fired += 1
        return True


@contextmanager
def failing(owner: Any, name: str, effect: Effect, injection: Injection) -> Iterator[None]:
    """Puts an effect in place of those calls of a function that fail.

    Args:
        owner: of the function, an object, a class or a module.
        name: of the function.
        effect: is given the injection, the function and the arguments of the call.
        injection: says which calls.
    """
    real = getattr(owner, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if injection.fires():
            return effect(injection, real, *args, **kwargs)
        return real(*args, **kwargs)

    with patch.object(owner, name, call):
        yield


def raises(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
    """Raises when the work is done, so that it is left half done."""
    real(*args, **kwargs)
    raise RuntimeError("injected")


def runs_out_of_memory(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
    """Raises as PyTorch does where a device has no memory left."""
    real(*args, **kwargs)
    raise torch.OutOfMemoryError("injected")


def hangs(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
    """Takes its time."""
    time.sleep(injection.hang_s)
    return real(*args, **kwargs)


def gives(change: Callable[[Any], Any]) -> Effect:
    """Effect of a call that ends well, with a result that is changed."""

    def call(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
        return change(real(*args, **kwargs))

    return call


def takes(change: Callable[..., tuple[Any, ...]]) -> Effect:
    """Effect of a call that is given other arguments."""

    def call(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
        return real(*change(*args), **kwargs)

    return call


def within(around: Callable[[], AbstractContextManager[Any]]) -> Effect:
    """Effect of a call that finds something else changed while it lasts."""

    def call(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
        with around():
            return real(*args, **kwargs)

    return call


def after(damage: Callable[[], None]) -> Effect:
    """Effect of a call before which something was damaged."""

    def call(injection: Injection, real: Effect, *args: Any, **kwargs: Any) -> Any:
        damage()
        return real(*args, **kwargs)

    return call
