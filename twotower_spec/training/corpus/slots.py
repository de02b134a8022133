"""What a template is made of: slots filled with words and numbers from a private source of randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

Value = TypeVar("Value")

# The last fifth of every pool of values is kept out of training.
HELD_OUT_SHARE = 5


@dataclass(frozen=True)
class Document:
    """One generated text.

    Attributes:
        prompt: the part a reader of held-out prompts is given.
        completion: the part that follows from it.
    """

    prompt: str
    completion: str

    @property
    def text(self) -> str:
        """The whole document."""
        return self.prompt + self.completion


class Slots:
    """Values for the slots of one document.

    Args:
        rng: private generator; the only source of randomness of a template.
        held_out: choose from the held-out fifth of every pool instead of from the rest.
    """

    def __init__(self, rng: Random, held_out: bool = False) -> None:
        self._rng, self._held_out = rng, held_out

    def pick(self, pool: Sequence[Value]) -> Value:
        """One value of a pool."""
        return self._rng.choice(self._allowed(pool))

    def pick_distinct(self, pool: Sequence[Value], count: int) -> list[Value]:
        """Different values of a pool, in random order."""
        return self._rng.sample(self._allowed(pool), count)

    def number(self, low: int, high: int) -> int:
        """An integer, both ends included; numbers are in both splits."""
        return self._rng.randint(low, high)

    def _allowed(self, pool: Sequence[Value]) -> Sequence[Value]:
        start = len(pool) - max(len(pool) // HELD_OUT_SHARE, 1)
        return pool[start:] if self._held_out else pool[:start]


Template = Callable[[Slots], Document]
