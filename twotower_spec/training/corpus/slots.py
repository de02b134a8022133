"""What a template is made of: slots filled with words and numbers from a private source of randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

Value = TypeVar("Value")

# The last fifth of every pool of values is kept out of training.
HELD_OUT_SHARE = 5
# Syllables of invented words.
CONSONANTS = (
    "b",
    "br",
    "c",
    "ch",
    "d",
    "dr",
    "f",
    "g",
    "gr",
    "h",
    "j",
    "k",
    "l",
    "m",
    "n",
    "p",
    "pl",
    "r",
    "s",
    "st",
    "t",
    "tr",
    "v",
    "w",
)
VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "ou")
ENDINGS = ("", "l", "n", "nd", "r", "rt", "t", "x")


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
        invented: share of the words that are made up. A model that meets new words all the time has to copy them from
            the prompt; one that only meets those of the pools learns the pools instead.
    """

    def __init__(self, rng: Random, held_out: bool = False, invented: float = 0.0) -> None:
        self._rng, self._held_out, self._invented = rng, held_out, invented

    def pick(self, pool: Sequence[Value]) -> Value:
        """One value of a pool."""
        return self._vary(self._rng.choice(self._allowed(pool)))

    def pick_distinct(self, pool: Sequence[Value], count: int) -> list[Value]:
        """Different values of a pool, in random order."""
        return [self._vary(value) for value in self._rng.sample(self._allowed(pool), count)]

    def number(self, low: int, high: int) -> int:
        """An integer, both ends included; numbers are in both splits."""
        return self._rng.randint(low, high)

    def _vary(self, value: Value) -> Value:
        """The value, or an invented one of its form."""
        if self._invented and self._rng.random() < self._invented:
            if isinstance(value, str):
                return self._like(value)  # type: ignore[return-value]
            if isinstance(value, tuple) and all(isinstance(word, str) for word in value):
                stem = min(value, key=len)
                if all(word.startswith(stem) for word in value):  # singular and plural, verb and past
                    made_up = self._like(stem, plural=False)
                    return tuple(made_up + word[len(stem) :] for word in value)  # type: ignore[return-value]
        return value

    def _like(self, value: str, plural: bool = True) -> str:
        """A made-up word in place of the last one of `value`, capitalised and in plural as that."""
        before, space, word = value.rpartition(" ")
        if not word.isalpha():
            return value
        made_up = "".join(
            self._rng.choice(CONSONANTS) + self._rng.choice(VOWELS) for _ in range(self._rng.randint(2, 3))
        ) + self._rng.choice(ENDINGS)
        made_up += "s" if plural and word.endswith("s") else ""
        return before + space + (made_up.capitalize() if word[0].isupper() else made_up)

    def _allowed(self, pool: Sequence[Value]) -> Sequence[Value]:
        start = len(pool) - max(len(pool) // HELD_OUT_SHARE, 1)
        return pool[start:] if self._held_out else pool[:start]


Template = Callable[[Slots], Document]
