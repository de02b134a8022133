"""What a template is made of: slots filled with words and numbers from a private source of randomness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TypeVar

Value = TypeVar("Value")

# The last fifth of every pool of values is kept out of training.
HELD_OUT_SHARE = 5
# Share of the words of a document that come from other words than the pools, where there are any.
OTHER_WORDS_SHARE = 0.35


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
        other_words: where given, they take the place of a share of the pools' words.
    """

    def __init__(self, rng: Random, held_out: bool = False, other_words: Sequence[str] = ()) -> None:
        self._rng, self._held_out, self._other_words = rng, held_out, other_words

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
        """The value, or another word in its form."""
        if self._other_words and self._rng.random() < OTHER_WORDS_SHARE:
            word = self._rng.choice(self._other_words)
            if isinstance(value, str):
                return _in_place_of(value, word)  # type: ignore[return-value]
            if isinstance(value, tuple) and all(isinstance(form, str) for form in value):
                stem = min(value, key=len)
                if all(form.startswith(stem) for form in value):  # singular and plural, verb and past
                    return tuple(word + form[len(stem) :] for form in value)  # type: ignore[return-value]
        return value

    def _allowed(self, pool: Sequence[Value]) -> Sequence[Value]:
        held_out = held_out_part(pool)
        return held_out if self._held_out else pool[: -len(held_out)]


def held_out_part(pool: Sequence[Value]) -> Sequence[Value]:
    """The values of a pool that training never sees."""
    return pool[len(pool) - max(len(pool) // HELD_OUT_SHARE, 1) :]


def _in_place_of(value: str, word: str) -> str:
    """The word in place of the last one of `value`, capitalised and in plural as that."""
    before, space, last = value.rpartition(" ")
    if not last.isalpha():
        return value
    if last.endswith("s") and not word.endswith("s"):
        word += "s"
    return before + space + (word.capitalize() if last[0].isupper() else word)


Template = Callable[[Slots], Document]
